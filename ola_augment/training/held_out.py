"""Gradients of images that are never trained on, as a running mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ola_augment.alignment._fsdp import (
    averaged_gradients,
    is_sharded,
    own_part,
    to_shard,
    to_whole,
)
from ola_augment.alignment.proof import trainable_parameters
from ola_augment.streams import world_size
from ola_augment.training.batches import are_names, drawing_nothing, examples_of, move, read_batch
from ola_augment.training.calibration import calibrated
from ola_augment.training.checks import HeldOutClasses
from ola_augment.training.given import are_counts, check_named
from ola_augment.training.held_out_batches import (
    Cycle,
    count_examples,
    halves_of,
    refuse_no_tensors,
)
from ola_augment.training.held_out_sample import sample_of
from ola_augment.training.metrics import scale_to_float
from ola_augment.training.ranks import (
    all_ranks,
    means_over_ranks,
    most_of_ranks,
    sum_over_ranks,
)
from ola_augment.training.restored import same_buffers

#: Called as ``loss(model, *batch)``: the mean loss of a held-out batch.
BatchLoss = Callable[..., Tensor]
#: What a loss is measured on, where there are more.
_MOST_EXAMPLES = 256
#: What rounding takes from a sum of probabilities.
_ROUNDED = 0.02


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
        self._batches = Cycle(batches)
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
        finite = all(bool(own_part(gradient).isfinite().all()) for gradient in new.values())
        if is_sharded(model):
            finite = all_ranks(finite, next(model.parameters()).device)
        if not finite:
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
        """How many there are on this rank."""
        self._count = self._count or count_examples(self._batches)
        return self._count

    @property
    def halves(self) -> tuple[list[Any], list[Any]]:
        """Batches of the images that may train during a trial, and of those that tell.

        At most 256 images, or as many as a batch has, are kept: all, or a sample of all
        (:func:`sample_of`), of each class a half (:func:`halves_of`).
        """
        if not self._halves[1]:
            with drawing_nothing():
                sample = sample_of(self._batches, _MOST_EXAMPLES)
            self._classes.whole(sample)
            self._halves = halves_of(sample)
        return self._halves

    def loss(self, model: nn.Module) -> float:
        """Loss of the second of the ``halves`` at the best temperature.

        The mean over the examples of all ranks. Buffers stay as they are.
        """
        device = next(iter(trainable_parameters(model).values())).device
        batches = [tuple(move(part, device) for part in batch) for batch in self.halves[1]]
        sizes = [examples_of(batch) for batch in batches]
        # Ranks that share parameters wait in the model for the one that has most batches.
        shares = is_sharded(model)
        more = most_of_ranks(len(batches), device) - len(batches) if shares else 0
        with same_buffers(model), torch.no_grad():
            found = calibrated(model, self._loss, batches, sizes)
            for _ in range(more):
                self._loss(model, *batches[-1])
        return float(means_over_ranks([found], sum(sizes))[0])

    def _of(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        moved = tuple(move(part, device) for part in batch)

        def loss() -> Tensor:
            if self.calibrate:
                return calibrated(model, self._loss, [moved])
            return self._loss(model, *moved)

        with same_buffers(model):
            if is_sharded(model):  # the mean over processes is one over examples
                own = torch.tensor(examples_of(batch), dtype=torch.float32, device=device)
                share = own * world_size() / sum_over_ranks(own)
                return averaged_gradients(model, lambda: loss() * share)
            gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
        found = {
            name: gradient
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }
        means = means_over_ranks(list(found.values()), examples_of(batch))
        return dict(zip(found, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are, and the mean."""
        mean = {name: to_whole(value) for name, value in self._mean.items()}
        return {"position": self._batches.position, "mean": mean}

    def checked(self, state: Any, model: nn.Module) -> Callable[[], None]:
        """A function that restores :meth:`state_dict`; batches go on in the order they have now.

        Raises:
            ValueError: the state does not fit the model.
        """
        position: Any = state.get("position") if isinstance(state, Mapping) else None
        if not are_counts(position):
            raise ValueError(f"state is damaged: position of the held-out batches {position!r}")
        mean, parameters = state.get("mean"), trainable_parameters(model)
        check_named("held-out gradient", mean, parameters)

        def restore() -> None:
            self._mean = {name: to_shard(part, parameters[name]) for name, part in mean.items()}
            self._batches.position = position

        return restore


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


def _refuse_no_classes(targets: Any) -> None:
    """Cross entropy would take several labels, or values, for probabilities of classes."""
    floats = isinstance(targets, Tensor) and targets.is_floating_point() and targets.dim() > 1
    if floats and bool(((targets.sum(1) - 1).abs() > _ROUNDED).any()):
        raise ValueError(
            "targets of held-out images are floats that do not sum to 1 over the classes, for "
            "which cross entropy is no loss: give the loss of the training, "
            "OLALearner.recommended(..., loss=lambda model, images, targets: "
            "criterion(model(normalize(images)), targets))"
        )


def _in_precision_of(model: nn.Module, inputs: Any) -> Any:
    """Floats in the one precision that all parameters have, as trainers give them to a model."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return inputs
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    first = next(dtypes, inputs.dtype)
    # Asked at every temperature: where nothing is to be done the first parameter says so.
    alike = first == inputs.dtype or all(other == first for other in dtypes)
    return inputs.to(first) if alike else inputs


class _CrossEntropy:
    """Cross entropy of pre-processed inputs; an object, so that a learner can be pickled."""

    def __init__(self, preprocess: Callable[[Tensor], Tensor]) -> None:
        self.preprocess = preprocess

    def __call__(self, model: nn.Module, *batch: Any) -> Tensor:
        given = batch[0] if len(batch) == 1 else tuple(p for p in batch if not are_names(p))
        refuse_no_tensors(given)
        inputs, targets, _ = read_batch(given, whose="held-out loader")
        _refuse_no_classes(targets)
        outputs = model(_in_precision_of(model, self.preprocess(inputs)))
        return F.cross_entropy(getattr(outputs, "logits", outputs), targets)
