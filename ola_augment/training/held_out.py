"""Gradients of images that are never trained on, as a running mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ola_augment.alignment.proof import trainable_parameters
from ola_augment.training.reward import mean_over_ranks

#: Called as ``loss(model, *batch)``: the mean loss of a held-out batch.
BatchLoss = Callable[..., Tensor]


class HeldOut:
    """The reference gradient of an :class:`OLALearner` that was given held-out batches.

    Args:
        batches: a list or loader of batches, read again from the start after the last.
        smoothing: of the running mean, in [0, 1).
        loss: None is cross entropy of a batch (inputs, targets), uint8 inputs scaled to [0, 1].

    Raises:
        ValueError: ``smoothing`` out of range, or batches that can be read once only.
    """

    def __init__(
        self, batches: Iterable[Any], smoothing: float, loss: BatchLoss | None = None
    ) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        self._batches = _Cycle(batches)
        self.smoothing = smoothing
        self._loss = loss or _cross_entropy
        self._mean: dict[str, Tensor] = {}

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The running mean with the gradient of the next batch, by parameter name.

        Gradients and buffers of the model stay as they are. A gradient that is not finite is
        returned as it is, and does not enter the mean.
        """
        new = self._of(model, self._batches.next())
        if not all(bool(gradient.isfinite().all()) for gradient in new.values()):
            return new
        mean, share = self._mean, 1 - self.smoothing
        self._mean = {
            name: torch.lerp(mean[name], gradient, share) if name in mean else gradient
            for name, gradient in new.items()
        }
        return self._mean

    def _of(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        moved = [part.to(device) if isinstance(part, Tensor) else part for part in batch]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            loss = self._loss(model, *moved)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        return {
            name: mean_over_ranks(gradient)
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }

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
        self._batches = batches
        self._iterator: Iterator[Any] = iter(())
        self._read = 0
        self.position = 0

    def next(self) -> tuple[Any, ...]:
        if self._read != self.position:  # just loaded
            self._iterator = itertools.islice(iter(self._batches), self.position, None)
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator, self.position = iter(self._batches), 0
            batch = next(self._iterator, None)
            if batch is None:
                raise ValueError("reference holds no batch")
        self.position += 1
        self._read = self.position
        return tuple(batch)


def _cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    inputs = inputs if inputs.is_floating_point() else inputs.float() / 255
    return F.cross_entropy(model(inputs), targets)
