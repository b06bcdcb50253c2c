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


def _met(argument: Any, factor: Callable[[Tensor], Tensor]) -> Use:
    """The use of a factor or term; a real one's gradient is real, whatever it meets."""
    if not isinstance(argument, Tensor):
        return argument, broadcast(torch.Size(), factor)
    if argument.is_complex():
        return argument, broadcast(argument.shape, factor)
    return argument, broadcast(argument.shape, lambda delta: _real(factor(delta)))


def _real(gradient: Tensor) -> Tensor:
    return gradient.real if gradient.is_complex() else gradient


def add(input: Any, other: Any, *, alpha: complex = 1) -> Iterator[Use]:
    """For y = a + alpha b."""
    yield _met(input, lambda delta: delta)
    yield _met(other, lambda delta: alpha.conjugate() * delta)


def subtract(input: Any, other: Any, *, alpha: complex = 1) -> Iterator[Use]:
    """For y = a - alpha b."""
    return add(input, other, alpha=-alpha)


def subtract_from(input: Any, other: Any, *, alpha: complex = 1) -> Iterator[Use]:
    """For y = b - alpha a."""
    return add(other, input, alpha=-alpha)


def multiply(input: Any, other: Any) -> Iterator[Use]:
    """For y = a b; the gradient of a complex factor is delta times the other's conjugate."""
    for argument, factor in ((input, other), (other, input)):
        if isinstance(argument, Tensor) and argument.requires_grad:
            yield _met(argument, _times(factor))


def _times(factor: Any) -> Any:
    if not isinstance(factor, Tensor):
        return lambda delta: delta * factor.conjugate()
    kept = keep(factor)
    return lambda delta: delta * kept.conj()


def cat(tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Iterator[Use]:
    """Each tensor receives its own segment of delta."""
    start, dim = 0, dim if axis is None else axis
    for tensor in tensors:
        size = tensor.shape[dim]
        yield tensor, _segment(tensor, dim, start, size)
        start += size


def _segment(tensor: Tensor, dim: int, start: int, size: int) -> MakeTerm:
    _, of_segment = _met(tensor, torch.clone)  # a view would keep the whole of delta alive
    dims = tensor.dim()

    def term(delta: Tensor, layout: Layout) -> Term:
        if layout.batch > 1 and layout.dim == dim % dims:
            raise RuntimeError(
                "a parameter is concatenated along the dimension that holds the examples; such "
                "rows belong to no example"
            )
        found: Term = of_segment(delta.narrow(dim, start, size), layout)
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
