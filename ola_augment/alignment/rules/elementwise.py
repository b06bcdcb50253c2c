"""Raw parameters met by activations: positional embeddings, class tokens, layer scales, PReLU.

Where a parameter is broadcast over the examples its per-example gradient is delta (times the other
factor) summed over the broadcast dimensions, and is kept as such; where it carries the examples'
dimension itself (an expanded class token) each example meets its own rows of the tangent.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.layout import Layout
from ola_augment.alignment.rules.rule import (
    MakeTerm,
    Rule,
    Use,
    keep,
    sum_to_channels,
    sum_to_shape,
)
from ola_augment.alignment.storage import widen
from ola_augment.alignment.terms import Pair, Term


def _broadcast(shape: torch.Size, factor: Callable[[Tensor], Tensor]) -> MakeTerm:
    """D l / d (broadcast w) = factor(delta), brought back to ``shape``."""

    def term(delta: Tensor, layout: Layout) -> Term:
        gradient = factor(widen(delta))
        from_right = gradient.dim() - layout.dim
        carries_examples = len(shape) >= from_right and shape[-from_right] != 1
        if layout.batch > 1 and carries_examples:
            return Pair(lambda w: w.expand(gradient.shape), (), gradient, layout)
        return sum_to_shape(gradient, layout, shape)

    return term


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def add(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Iterator[Use]:
    """For y = a + alpha b."""
    yield input, _broadcast(_shape(input), lambda delta: delta)
    yield other, _broadcast(_shape(other), lambda delta: alpha * delta)


def subtract(input: Any, other: Any, *, alpha: float = 1) -> Iterator[Use]:
    """For y = a - alpha b."""
    return add(input, other, alpha=-alpha)


def subtract_from(input: Any, other: Any) -> Iterator[Use]:
    """For y = b - a."""
    return add(other, input, alpha=-1)


def multiply(input: Any, other: Any) -> Iterator[Use]:
    """For y = a b."""
    for argument, factor in ((input, other), (other, input)):
        kept = keep(factor) if isinstance(factor, Tensor) else factor
        yield argument, _broadcast(_shape(argument), functools.partial(operator.mul, kept))


def divide(input: Any, other: Any) -> Iterator[Use]:
    """For y = a / b: the derivative in b is -delta a / b^2."""
    a, b = (keep(value) if isinstance(value, Tensor) else value for value in (input, other))
    yield input, _broadcast(_shape(input), lambda delta: delta / b)
    yield other, _broadcast(_shape(other), lambda delta: -delta * a / b**2)


def where(condition: Tensor, input: Any, other: Any) -> Iterator[Use]:
    """For y = a where the condition holds, b elsewhere."""
    yield input, _broadcast(_shape(input), lambda delta: delta * condition)
    yield other, _broadcast(_shape(other), lambda delta: delta * ~condition)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Iterator[Use]:
    """Each tensor receives its own segment of delta."""
    start = 0
    for tensor in tensors:
        shape, size = tensor.shape, tensor.shape[dim]
        yield tensor, _segment(shape, dim, start, size)
        start += size


def _segment(shape: torch.Size, dim: int, start: int, size: int) -> MakeTerm:
    def term(delta: Tensor, layout: Layout) -> Term:
        if layout.batch > 1 and layout.dim == dim % len(shape):
            raise RuntimeError(
                "a parameter is concatenated along the dimension that holds the examples; such "
                "rows belong to no example"
            )
        # A copy: a view would keep the whole of delta alive.
        return _broadcast(shape, torch.clone)(delta.narrow(dim, start, size), layout)

    return term


def prelu(input: Tensor, weight: Tensor) -> Iterator[Use]:
    """For y = max(x, 0) + a min(x, 0), one a or one per channel."""

    def slope(delta: Tensor, layout: Layout) -> Term:
        product = widen(delta) * widen(input).clamp(max=0)
        if weight_size == 1:
            return sum_to_shape(product.unsqueeze(-1), layout, torch.Size((1,)))
        return sum_to_channels(product, layout)

    weight_size = weight.numel()
    yield weight, slope


def _everywhere(*_: Any, output: Tensor, **__: Any) -> int:
    return output.dim()


_FUNCTIONS: dict[Callable[..., Iterator[Use]], tuple[Callable[..., Any], ...]] = {
    add: (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    subtract: (torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__),
    subtract_from: (torch.rsub, Tensor.__rsub__),
    multiply: (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    divide: (torch.div, Tensor.div, Tensor.__truediv__),
    where: (torch.where,),
    cat: (torch.cat, torch.concat),
}  # fmt: skip

RULES: dict[Callable[..., Any], Rule] = {
    **{f: Rule(uses, _everywhere, None) for uses, fs in _FUNCTIONS.items() for f in fs},
    F.prelu: Rule(prelu, lambda input, *_, **__: 1),
}
