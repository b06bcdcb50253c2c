"""The shape of a rule, and the table of them.

Letters in shapes: B examples, T positions of one example, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment.calls.arguments import Function
from ola_augment.alignment.calls.layout import Layout, sum_rows_to
from ola_augment.alignment.calls.registry import RULES, MakeTerm, Rule, Use
from ola_augment.alignment.method.storage import widen
from ola_augment.alignment.method.terms import Adjoint, ExampleGradient, Pair, Term

# What a registered rule yields: argument, operator, what the operator reads besides g.
DerivativeUse = tuple[Tensor | None, Callable[..., Tensor], tuple[Tensor, ...]]


def register_rule(
    function: Function,
) -> Callable[[Callable[..., Iterable[DerivativeUse]]], Callable[..., Iterable[DerivativeUse]]]:
    """Teach the engine a function that reads parameters and data.

    The decorated generator takes the function's own arguments and yields, for each tensor argument
    w that may hold a parameter, ``(w, operator, inputs)``: ``operator(*inputs, g)`` is the
    derivative of the function's output along g in place of w, of the output's shape. For a
    function that is linear in w it is the function itself with g as w (Lemmas 2 and 3 of the OLA
    paper): an output (B, T, O) = input (B, T, I) times w (O, I) has the derivative (B, T, O) =
    input times g, g being (O, I). The engine finds the dimension of the examples B by itself,
    keeps ``inputs`` and the output's gradient delta, and sums delta times the derivative per
    example. A wrong rule is found by the self-check of the first captures.

    What a rule lifts is no longer refused: a layer that was (`torch.nn.LSTM`, say) is aligned when
    the function that it calls (``torch._VF.lstm``) has a rule. A later rule replaces an earlier
    one.

    Args:
        function: a function that torch hands to a ``TorchFunctionMode``: torch's own, a custom
            operator (``torch.ops``), or one of yours decorated with
            ``torch.overrides.wrap_torch_function``. It has one floating output and writes nothing.

    Returns:
        The decorator, which returns the generator as it is.

    Raises:
        TypeError: ``function`` is not callable.

    Example:
        >>> import torch
        >>> from ola_augment.alignment import register_rule
        >>> @torch.overrides.wrap_torch_function(lambda x, w: (x, w))
        ... def squared_linear(x, w):
        ...     return x @ (w * w).T
        >>> @register_rule(squared_linear)
        ... def _(x, w):
        ...     yield w, lambda x, w, g: x @ (2 * w * g).T, (x, w)
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")

    def register(
        derivative: Callable[..., Iterable[DerivativeUse]],
    ) -> Callable[..., Iterable[DerivativeUse]]:
        def uses(*args: Any, **kwargs: Any) -> Iterator[Use]:
            for argument, operator, inputs in derivative(*args, **kwargs):
                yield argument, pair(operator, *inputs)

        RULES[function] = Rule(uses, everywhere, None)
        return derivative

    return register


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


def broadcast(shape: torch.Size, factor: Callable[[Tensor], Tensor]) -> MakeTerm:
    """A tensor of a shape met by broadcasting, where d l / d (broadcast w) = factor(delta).

    Where it is broadcast over the examples its gradient is summed down to its shape, and kept as
    such; where it carries the examples' dimension itself (an expanded class token) each example
    meets its own rows of the tangent.
    """

    def term(delta: Tensor, layout: Layout) -> Term:
        gradient = factor(widen(delta))
        from_right = gradient.dim() - layout.dim
        if layout.batch > 1 and len(shape) >= from_right and shape[-from_right] != 1:
            return Pair(lambda w: w.expand(gradient.shape), (), gradient, layout)
        return sum_to_shape(gradient, layout, shape)

    return term


def everywhere(*_: Any, output: Tensor, **__: Any) -> int:
    """The examples may lie along any dimension of the output."""
    return output.dim()
