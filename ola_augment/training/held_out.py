"""Gradients of images that are never trained on, as a running mean."""

from __future__ import annotations

import itertools
import statistics
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from ola_augment.alignment.proof import trainable_parameters
from ola_augment.training.batches import TARGETS, drawing_nothing, move, read_batch
from ola_augment.training.calibration import calibrated
from ola_augment.training.checks import HeldOutClasses
from ola_augment.training.metrics import scale_to_float
from ola_augment.training.ranks import mean_over_ranks, means_over_ranks

#: Called as ``loss(model, *batch)``: the mean loss of a held-out batch.
BatchLoss = Callable[..., Tensor]
#: What a loss is measured on, where there are more.
_MOST_EXAMPLES = 256


class HeldOut:
    """The reference gradient of an :class:`OLALearner` that was given held-out batches.

    Args:
        batches: a list or loader of batches, read again from the start after the last.
        smoothing: of the running mean, in [0, 1).
        calibrate: take the gradient of the loss at the best temperature. A model that is too sure
            of itself asks for whatever makes it less sure, inverted images among it.
        loss: None is cross entropy of a batch (inputs, targets), inputs of uint8 and
            uint16 scaled to [0, 1].

    Raises:
        ValueError: ``smoothing`` out of range, or batches that can be read once only.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        smoothing: float,
        loss: BatchLoss | None = None,
        calibrate: bool = False,
    ) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        self._batches = _Cycle(batches)
        self.smoothing = smoothing
        self.calibrate = calibrate
        self._loss = loss or held_out_loss(None, None)
        self._count = 0
        self._classes = HeldOutClasses()
        self._halves: tuple[list[Any], list[Any]] = ([], [])
        self._mean: dict[str, Tensor] = {}

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The running mean with the gradient of the next batch, by parameter name.

        Gradients and buffers of the model stay as they are. A gradient that is not finite is
        returned as it is, and does not enter the mean.
        """
        batch = self._batches.next()
        self._classes.see(batch, first=self._batches.position == 1)
        new = self._of(model, batch)
        if not all(bool(gradient.isfinite().all()) for gradient in new.values()):
            return new
        mean, share = self._mean, 1 - self.smoothing
        # A layer that was replaced begins anew.
        fits = {n for n, gradient in new.items() if n in mean and mean[n].shape == gradient.shape}
        self._mean = {
            name: torch.lerp(mean[name], gradient, share) if name in fits else gradient
            for name, gradient in new.items()
        }
        return self._mean

    @property
    def examples(self) -> int:
        """How many there are."""
        if not self._count:
            with drawing_nothing():
                self._count = sum(map(_examples, self._batches))
        return self._count

    @property
    def halves(self) -> tuple[list[Any], list[Any]]:
        """Batches of the images that may train during a trial, and of those that tell.

        At most 256 images, or one batch, are read once and kept. What an image holds decides where
        it goes, so that ranks and resumed runs agree, whatever the order; a lone one tells.
        """
        if not self._halves[1]:
            with drawing_nothing():
                sample = self._batches.first(_MOST_EXAMPLES)
            self._classes.whole(sample)
            keys = [_keys(batch) for batch in sample]
            middle = statistics.median_high(itertools.chain(*keys))
            for half, trains in zip(self._halves, (True, False), strict=True):
                chosen = [torch.tensor([(k < middle) == trains for k in some]) for some in keys]
                pairs = zip(sample, chosen, strict=True)
                half += [_part(batch, where) for batch, where in pairs if where.any()]
        return self._halves

    def loss(self, model: nn.Module) -> float:
        """Loss of the second of the ``halves`` at the best temperature; mean over ranks.

        Buffers stay as they are.
        """
        device = next(iter(trainable_parameters(model).values())).device
        batches = [tuple(move(part, device) for part in batch) for batch in self.halves[1]]
        sizes = [_examples(batch) for batch in batches]
        with _same_buffers(model), torch.no_grad():
            return float(mean_over_ranks(calibrated(model, self._loss, batches, sizes)))

    def _of(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        with _same_buffers(model):
            moved = tuple(move(part, device) for part in batch)
            loss = (
                calibrated(model, self._loss, [moved])
                if self.calibrate
                else self._loss(model, *moved)
            )
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found = {
            name: gradient
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }
        return dict(zip(found, means_over_ranks(list(found.values())), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are, and the mean."""
        mean = {name: value.clone() for name, value in self._mean.items()}
        return {"position": self._batches.position, "mean": mean}

    def checked(self, state: Any, model: nn.Module) -> Callable[[], None]:
        """A function that restores :meth:`state_dict`; batches go on in the order they have now.

        Raises:
            ValueError: the state does not fit the model.
        """
        position = state.get("position") if isinstance(state, Mapping) else None
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            raise ValueError(f"state is damaged: position of the held-out batches {position!r}")
        mean, parameters = state.get("mean"), trainable_parameters(model)
        for name, part in mean.items() if isinstance(mean, Mapping) else [("", mean)]:
            known = parameters.get(name)
            if known is None or not isinstance(part, Tensor) or part.shape != known.shape:
                raise ValueError(f"state's held-out gradient of {name!r} does not fit the model")

        def restore() -> None:
            self._mean = {name: part.to(parameters[name], copy=True) for name, part in mean.items()}
            self._batches.position = position

        return restore


class _Cycle:
    """Batches without end, from a position on."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if iter(batches) is batches:  # it can be read once only
            raise ValueError("reference must be a list or loader of batches, got an iterator")
        if isinstance(batches, (list, tuple)) and any(hasattr(part, "shape") for part in batches):
            raise ValueError(
                "held-out reference must be a list or loader of batches, got tensors; [(images, "
                "targets)] is one batch, DataLoader(TensorDataset(images, targets), 64) makes more"
            )
        listed = isinstance(batches, (list, tuple, Dataset))
        if listed and not isinstance(batches, IterableDataset):
            refuse_example(next(iter(batches), None))
        self._batches = batches
        self._iterator: Iterator[Any] = iter(())
        self._read = 0
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def first(self, examples: int) -> list[tuple[Any, ...]]:
        """As many batches from the start as hold so many examples, but one at least."""
        found: list[tuple[Any, ...]] = []
        count = 0
        for batch in self._batches:
            count += _examples(batch)
            if found and count > examples:
                break
            found.append(_as_tuple(batch))
        if not found:
            raise ValueError("reference holds no batch")
        return found

    def next(self) -> tuple[Any, ...]:
        if self._read != self.position:  # just loaded
            with drawing_nothing():
                self._iterator = iter(self._batches)
                for _ in itertools.islice(self._iterator, self.position):
                    pass
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator, self.position = iter(self._batches), 0
            batch = next(self._iterator, None)
            if batch is None:
                raise ValueError("reference holds no batch")
        self.position += 1
        self._read = self.position
        return _as_tuple(batch)

    def __getstate__(self) -> dict[str, Any]:
        # An iterator stays with its process; the copy goes on at the same position.
        return {**self.__dict__, "_iterator": iter(()), "_read": -1}


def refuse_example(batch: Any) -> None:
    """Refuse a single example where a batch is wanted.

    Raises:
        ValueError: the label is one number.
    """
    label: Any = None
    if isinstance(batch, Mapping):
        label = next((batch[name] for name in TARGETS if name in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        label = batch[1]
    if isinstance(label, (int, float)) or (hasattr(label, "shape") and not len(label.shape)):
        raise ValueError(
            "held-out images must come in batches, images (B, ...) and targets (B,), got a single "
            "example: DataLoader(held_out, batch_size=64) makes batches of a data set"
        )


def _keys(batch: Any) -> list[int]:
    """A number for each example of a batch, by the bytes of its first tensor."""
    leaves = [part for leaf in tree_leaves(batch) for part in tree_leaves(_as_dict(leaf))]
    tensors = [part for part in leaves if isinstance(part, Tensor) and part.dim()]
    if not tensors:
        return [0]
    rows = tensors[0].detach().cpu().reshape(len(tensors[0]), -1).contiguous()
    return [zlib.crc32(row.view(torch.uint8).numpy().tobytes()) for row in rows]


def _part(batch: Any, where: Tensor) -> Any:
    """Some examples of a batch."""

    def chosen(part: Any) -> Any:
        if isinstance(part, Mapping):  # a kind of its own, as transformers' BatchFeature
            return {name: _part(entry, where) for name, entry in part.items()}
        whole = isinstance(part, Tensor) and part.dim()
        return part[where.to(part.device)] if whole else part

    return tree_map(chosen, batch)


def _examples(batch: Any) -> int:
    leaves = tree_leaves(batch)
    leaves = [part for leaf in leaves for part in tree_leaves(_as_dict(leaf))]
    sizes = [len(part) for part in leaves if isinstance(part, Tensor) and part.dim()]
    return sizes[0] if sizes else 1


def _as_dict(part: Any) -> Any:
    return dict(part) if isinstance(part, Mapping) else part


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def held_out_loss(
    loss: BatchLoss | None, preprocess: Callable[[Tensor], Tensor] | None
) -> BatchLoss:
    """The loss of a held-out batch: the one given, or cross entropy of pre-processed inputs.

    Raises:
        ValueError: both are given.
    """
    if loss is not None and preprocess is not None:
        raise ValueError("loss and preprocess are given: pre-process the inputs in the loss")
    return loss or _CrossEntropy(preprocess or scale_to_float)


class _CrossEntropy:
    """Cross entropy of pre-processed inputs; an object, so that a learner can be pickled."""

    def __init__(self, preprocess: Callable[[Tensor], Tensor]) -> None:
        self.preprocess = preprocess

    def __call__(self, model: nn.Module, *batch: Any) -> Tensor:
        refuse_example(batch[0] if len(batch) == 1 else batch)
        inputs, targets, _ = read_batch(batch[0] if len(batch) == 1 else batch)
        outputs = model(self.preprocess(inputs))
        return F.cross_entropy(getattr(outputs, "logits", outputs), targets)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
