"""The loss of a model at its best temperature: what it knows, however sure of itself it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

#: Factors of the outputs that are tried, the inverse temperatures; 1 leaves them as they are.
_FACTORS = tuple(2.0 ** (step / 4) for step in range(-12, 5))
#: Where the smallest of them is the best, it is halved down to this: a model that diverges gives
#: outputs of thousands.
_SMALLEST = 2.0**-40


class _Outputs:
    """A model that keeps what it gave, and gives it again multiplied by a factor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: list[Any] = []
        self.factor: float | None = None
        self._at = 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self.factor is None:
            self.kept.append(self.model(*inputs, **named))
            return self.kept[-1]
        kept = self.kept[self._at]
        self._at += 1
        return _scaled(kept, self.factor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def again(self, factor: float) -> None:
        self.factor, self._at = factor, 0


def calibrated(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Sequence[Sequence[Any]],
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The loss at the best temperature, one for all batches (Guo et al., 2017), differentiable.

    Each batch goes through the model once. Where the loss does not come from the model's outputs
    alone, as with models that compute it themselves, the loss is what it is.

    Args:
        model: in the state it is to be measured in.
        loss: called as ``loss(model, *batch)``: the mean loss of a batch.
        batches: one or more.
        sizes: of the batches; None are alike.

    Returns:
        The mean of the batches' losses, weighted by their sizes; a scalar.

    References:
        `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`__
    """
    watched = [_Outputs(model) for _ in batches]
    counts = sizes or [1] * len(batches)

    def mean() -> Tensor:
        pairs = zip(watched, batches, strict=True)
        losses = torch.stack([loss(outputs, *batch) for outputs, batch in pairs])
        return (losses * losses.new_tensor(counts)).sum() / sum(counts)

    plain = mean()
    kept = [output for outputs in watched for output in outputs.kept]
    if not kept or not all(_can_be_scaled(output) for output in kept):
        return plain

    def at(factor: float) -> Tensor:
        for outputs in watched:
            outputs.again(factor)
        return mean()

    with torch.no_grad():
        values = {factor: float(at(factor)) for factor in _FACTORS}
        best = min(values, key=values.__getitem__)
        while best == min(values) > _SMALLEST:
            values[best / 2] = float(at(best / 2))
            best = min(values, key=values.__getitem__)
    return at(best)


def _can_be_scaled(output: Any) -> bool:
    logits = getattr(output, "logits", output)
    return isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1


def _scaled(output: Any, factor: float) -> Any:
    """Outputs, or an object with ``logits``, whose other entries stay as they are."""
    if isinstance(output, Tensor):
        return output * factor
    logits = output.logits * factor
    if isinstance(output, tuple):  # with names
        return output._replace(logits=logits)  # type: ignore[attr-defined]
    changed = copy.copy(output)
    try:
        changed.logits = logits
    except AttributeError:  # it cannot be set
        return SimpleNamespace(logits=logits)
    return changed
