"""The shape of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ola_augment.alignment.layout import Layout, sum_rows_to
from ola_augment.alignment.storage import widen
from ola_augment.alignment.terms import Adjoint, ExampleGradient, Pair, Term

# From the gradient of the function's output, and where its examples lie, to what is kept.
MakeTerm = Callable[[Tensor, Layout], Term]
# A tensor argument that may hold a parameter, and the term its use gives.
Use = tuple[Tensor | None, MakeTerm]


@dataclass(frozen=True)
class Rule:
    """What a function's parameters receive.

    Args:
        uses: called with the function's own arguments; yields a `Use` per argument that may hold a
            parameter. Nothing is computed before the output's gradient arrives.
        leading: called with the function's own arguments and ``output``; the number of leading
            dimensions of the output among which the examples may lie.
        subject: the argument whose values tell examples apart when the layout is verified: the
            first one, or None for the output. Its leading dimensions are those of the output.
    """

    uses: Callable[..., Iterator[Use]]
    leading: Callable[..., int]
    subject: int | None = 0


def pair(
    operator: Callable[..., Tensor], *inputs: Tensor, adjoint: Adjoint | None = None
) -> MakeTerm:
    """The rule of Lemmas 2 and 3: keep input and output gradient.

    Args:
        operator: (*inputs, w) -> output, linear in w.
        inputs: what the operator reads besides w.
        adjoint: per-example gradients of w, from (B, rows, ...) output gradients and inputs.
    """
    kept = tuple(keep(tensor) for tensor in inputs)
    return lambda delta, layout: Pair(operator, kept, widen(delta), layout, adjoint)


def keep(tensor: Tensor) -> Tensor:
    """A tensor without its graph; a copy of a parameter's, which the optimizer overwrites."""
    return tensor.detach().clone() if tensor.requires_grad else tensor


def sum_to_channels(delta: Tensor, layout: Layout) -> ExampleGradient:
    """(N, C, ...) -> per-example sums (B, C)."""
    rows = layout.rows(widen(delta))
    return ExampleGradient(rows.sum([dim for dim in range(1, rows.dim()) if dim != 2]))


def sum_to_shape(delta: Tensor, layout: Layout, shape: torch.Size) -> ExampleGradient:
    """(..., *shape) -> per-example sums (B, *shape)."""
    return ExampleGradient(sum_rows_to(layout.rows(widen(delta)), shape))
