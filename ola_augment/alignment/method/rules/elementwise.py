"""Raw parameters met by activations: positional embeddings, class tokens, layer scales.

These are the most frequent; `generic` has the other elementwise functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.registry import RULES, MakeTerm, Rule, Use
from ola_augment.alignment.method.rules.rule import broadcast, everywhere, keep
from ola_augment.alignment.method.terms import Term


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def add(input: Any, other: Any, *, alpha: float = 1) -> Iterator[Use]:
    """For y = a + alpha b."""
    yield input, broadcast(_shape(input), lambda delta: delta)
    yield other, broadcast(_shape(other), lambda delta: alpha * delta)


def subtract(input: Any, other: Any, *, alpha: float = 1) -> Iterator[Use]:
    """For y = a - alpha b."""
    return add(input, other, alpha=-alpha)


def subtract_from(input: Any, other: Any) -> Iterator[Use]:
    """For y = b - a."""
    return add(other, input, alpha=-1)


def multiply(input: Any, other: Any) -> Iterator[Use]:
    """For y = a b; the gradient of a complex factor is delta times the other's conjugate."""
    for argument, factor in ((input, other), (other, input)):
        if isinstance(argument, Tensor) and argument.requires_grad:
            yield argument, broadcast(argument.shape, _times(factor))


def _times(factor: Any) -> Any:
    if not isinstance(factor, Tensor):
        return lambda delta: delta * factor
    kept = keep(factor)
    return lambda delta: delta * kept.conj()


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
        found: Term = broadcast(shape, torch.clone)(delta.narrow(dim, start, size), layout)
        return found

    return term


_FUNCTIONS: dict[Callable[..., Iterator[Use]], tuple[Callable[..., Any], ...]] = {
    add: (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    subtract: (torch.sub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__),
    subtract_from: (torch.rsub, Tensor.__rsub__),
    multiply: (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    cat: (torch.cat, torch.concat, torch.concatenate),
}

RULES.update({f: Rule(uses, everywhere, None) for uses, fs in _FUNCTIONS.items() for f in fs})
