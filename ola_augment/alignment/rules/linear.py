"""Linear maps. Lemma 2: <d l_i / d W, g> = <delta_i, x_i g^T>; the bias: <delta_i, g>."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.rules.rule import Rule, Use, pair, sum_to_shape


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
    """For y = x W^T + b."""
    yield weight, pair(F.linear, input, adjoint=_weight_gradients)
    if bias is not None:
        shape = bias.shape
        yield bias, lambda delta, layout: sum_to_shape(delta, layout, shape)


def _weight_gradients(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """delta_i^T x_i, summed over an example's rows."""
    return delta.flatten(1, -2).mT @ input.to(delta.dtype).flatten(1, -2)


def bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[Use]:
    """y_k = x1^T W_k x2 + b_k."""
    yield weight, pair(F.bilinear, input1, input2)
    if bias is not None:
        shape = bias.shape
        yield bias, lambda delta, layout: sum_to_shape(delta, layout, shape)


def product(function: Callable[..., Tensor]) -> Callable[..., Iterator[Use]]:
    """A matrix product, linear in either factor."""

    def uses(input: Tensor, other: Tensor) -> Iterator[Use]:
        yield input, pair(lambda other, w: function(w, other), other)
        yield other, pair(function, input)

    return uses


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Use]:
    """For y = beta b + alpha x W."""
    shape = input.shape
    yield input, lambda delta, layout: sum_to_shape(beta * delta, layout, shape)
    yield mat1, pair(lambda mat2, w: alpha * (w @ mat2), mat2)
    yield mat2, pair(lambda mat1, w: alpha * (mat1 @ w), mat1)


def einsum(equation: str, operands: list[Tensor], **_: Any) -> Iterator[Use]:
    """A sum of products, linear in each operand."""
    for slot, operand in enumerate(operands):
        others = operands[:slot] + operands[slot + 1 :]

        def operator(*tensors: Tensor, slot: int = slot) -> Tensor:
            *rest, w = tensors
            return torch.einsum(equation, *rest[:slot], w, *rest[slot:])

        yield operand, pair(operator, *others)


def _all_but_last(input: Tensor, *_: Any, **__: Any) -> int:
    return input.dim() - 1


_PRODUCTS: tuple[Callable[..., Tensor], ...] = (
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
    torch.bmm, Tensor.bmm, torch.mv, Tensor.mv,
)  # fmt: skip

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(linear, _all_but_last),
    F.bilinear: Rule(bilinear, _all_but_last),
    torch.addmm: Rule(addmm, lambda *_, **__: 1, subject=None),
    torch._VF.einsum: Rule(einsum, lambda *_, output, **__: output.dim(), subject=None),  # type: ignore[attr-defined]
    **{f: Rule(product(f), lambda *_, output: output.dim(), subject=None) for f in _PRODUCTS},
}
