"""Whether derivatives of losses sum to the gradient that their backward gave."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Received:
    """The gradients that a backward gave the losses and the parameters."""

    def __init__(self, losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.weights = torch.zeros_like(losses, requires_grad=False)
        self._handles = [
            parameter.register_hook(functools.partial(self._add, name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]
        if losses.requires_grad:
            self._handles.append(losses.register_hook(self._weigh))  # type: ignore[no-untyped-call]

    def _add(self, name: str, gradient: Tensor) -> None:
        known = self.by_name.get(name)
        gradient = gradient.detach()
        self.by_name[name] = gradient.clone() if known is None else known + gradient

    def _weigh(self, gradient: Tensor) -> None:
        self.weights = self.weights + gradient.detach()

    def close(self) -> None:
        """No more is received."""
        for handle in self._handles:
            handle.remove()

    def off_by(self, alignments: Tensor, direction: Mapping[str, Tensor]) -> tuple[float, float]:
        """How far the weighted sum of alignments is from <gradient, g>, and the sum of sizes."""
        own = self.weights.double() * alignments.double()
        products = [
            (gradient.double() * direction[name].double()).sum()
            for name, gradient in self.by_name.items()
            if name in direction
        ]
        expected = torch.stack(products).sum() if products else own.new_zeros(())
        difference, size = (own.sum() - expected.to(own)).abs(), own.abs().sum()
        return float(difference), max(float(size), float(expected.abs()))


def check_sum(
    alignments: Tensor,
    received: Received,
    direction: Mapping[str, Tensor],
    error: float,
    rounding: float,
) -> None:
    """Refuse alignments that do not sum to <gradient, g>.

    Args:
        alignments: (B,) derivatives of the losses.
        received: the gradients of their backward.
        direction: g, by name.
        error: of the alignments' sizes, that their sum may be off by.
        rounding: what it may be off by besides.

    Raises:
        RuntimeError: they do not.
    """
    difference, sizes = received.off_by(alignments, direction)
    half = alignments.dtype in (torch.bfloat16, torch.float16)
    if difference > max(error, 0.05 if half else 0.0) * sizes + rounding:
        raise RuntimeError(
            "the derivatives of the losses along g do not sum to the product of g and the gradient "
            f"that was received (off by {difference / max(sizes, 1e-30):.1%}): the backward pass "
            "is not the derivative of the forward pass (a stop-gradient such as detach(), a "
            "straight-through estimator, gradient reversal, a hook that changes gradients, a "
            "penalty beside the losses), or an operator has no forward derivative; use "
            "GradientAlignment, with fallback=True for functions without a rule"
        )
