"""Linear layers and embeddings, whose pairs are large: Lemma 2.

Linear: <d l_i / d W, g> = <delta_i, x_i g^T>; the bias: <delta_i, g>; an embedding:
<delta_i, g[indices_i]>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.registry import RULES, Rule, Use
from ola_augment.alignment.method.rules.generic import linear as linear_in_each
from ola_augment.alignment.method.rules.rule import (
    broadcast,
    everywhere,
    pair,
    sum_to_channels,
    sum_to_shape,
)
from ola_augment.alignment.method.storage import widen
from ola_augment.alignment.method.terms import Adjoint, Term


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
    """For y = x W^T + b."""
    yield weight, pair(F.linear, input, adjoint=_OF_LINEAR)
    if bias is not None:
        shape = bias.shape
        yield bias, lambda delta, layout: sum_to_shape(delta, layout, shape)


def _weight_gradients(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """delta_i^T x_i, (B, O, I), summed over an example's rows (B, T, O) and (B, T, I)."""
    return _positions(delta).mT @ _positions(input.to(delta.dtype)).conj()


def _weight_norms(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor | None:
    delta = _positions(delta)
    if not gram_is_cheaper(delta.shape[1], shape):
        return None
    return gram_norms(delta, _positions(input.to(delta.dtype)))


def _positions(rows: Tensor) -> Tensor:
    """(B, ..., C) -> (B, T, C); T is 1 for a vector, which a single example may be."""
    return rows.unsqueeze(1).flatten(1, -2)


def gram_is_cheaper(positions: int, shape: torch.Size, groups: int = 1) -> bool:
    """Whether two products of T x T cost less than the gradient of w, of a shape (O, ...)."""
    outputs, inputs = shape[0] // groups, shape[1:].numel()
    return positions * (outputs + inputs) <= outputs * inputs


def gram_norms(left: Tensor, right: Tensor) -> Tensor:
    """Squared norms of L_i^T R_i, for (B, ..., T, O) and (B, ..., T, I): <L_i L_i^T, R_i R_i^T>.

    Of complex gradients, L_i^T conj(R_i), too.
    """
    norms: Tensor = ((left @ left.mH) * (right @ right.mH).conj()).flatten(1).sum(1)
    return norms.real if norms.is_complex() else norms


_OF_LINEAR = Adjoint(_weight_gradients, _weight_norms)


def bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[Use]:
    """y_k = x1^T W_k x2 + b_k."""
    yield weight, pair(F.bilinear, input1, input2)
    if bias is not None:
        shape = bias.shape
        yield bias, lambda delta, layout: sum_to_shape(delta, layout, shape)


def affine_product(
    input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Use]:
    """For y = beta b + alpha L R (addmm, baddbmm)."""
    yield input, broadcast(input.shape, lambda delta: beta * delta)
    yield left, pair(lambda right, w: alpha * (w @ right), right)
    yield right, pair(lambda left, w: alpha * (left @ w), left)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Use]:
    """The row of ``padding_idx`` receives no gradient; torch hands over its defaults, too."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise RuntimeError(
            "embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be aligned "
            "exactly; use an embedding without them"
        )
    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def rows(indices: Tensor, w: Tensor) -> Tensor:
        out = F.embedding(indices, w)
        return out if padding is None else out * (indices != padding).unsqueeze(-1)

    def gradients(delta: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        found = delta.new_zeros(len(delta), *shape)
        for own, index, gradient in zip(delta, indices, found, strict=True):
            own = own if padding is None else own * (index != padding).unsqueeze(-1)
            gradient.index_add_(0, index.flatten(), own.unsqueeze(0).flatten(0, -2))
        return found

    def norms(delta: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        # Positions that read the same row meet: <D D^T, equal indices>.
        delta, indices = _positions(delta), indices.unsqueeze(1).flatten(1)
        equal = indices.unsqueeze(1) == indices.unsqueeze(2)
        if padding is not None:
            equal &= (indices != padding).unsqueeze(1)
        norms: Tensor = ((delta @ delta.mH) * equal).flatten(1).sum(1)
        return norms.real if norms.is_complex() else norms

    yield weight, pair(rows, input, adjoint=Adjoint(gradients, norms))


def native_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *settings: Any, **named: Any
) -> Iterator[Use]:
    """Of ``torch.embedding``, which ``torch.nn.functional`` wraps."""
    rest = dict(zip(("scale_grad_by_freq", "sparse"), settings, strict=False)) | named
    return embedding(indices, weight, padding_idx if padding_idx >= 0 else None, **rest)


def prelu(input: Tensor, weight: Tensor) -> Iterator[Use]:
    """For y = max(x, 0) + a min(x, 0), one a or one per channel."""

    def slope(delta: Tensor, layout: Layout) -> Term:
        product = widen(delta) * widen(input).clamp(max=0)
        if size == 1:
            return sum_to_shape(product.unsqueeze(-1), layout, torch.Size((1,)))
        return sum_to_channels(product, layout)

    size = weight.numel()
    yield weight, slope


def _all_but_last(input: Tensor, *_: Any, **__: Any) -> int:
    return input.dim() - 1


_RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(linear, _all_but_last),
    F.bilinear: Rule(bilinear, _all_but_last),
    F.embedding: Rule(embedding, lambda input, *_, **__: input.dim()),
    torch.embedding: Rule(native_embedding, lambda weight, indices, *_, **__: indices.dim(), 1),
    F.embedding_bag: Rule(linear_in_each(F.embedding_bag), lambda *_, **__: 1, None),
    F.prelu: Rule(prelu, lambda input, *_, **__: 1),
    torch.addmm: Rule(affine_product, everywhere, None),
    Tensor.addmm: Rule(affine_product, everywhere, None),
    torch.baddbmm: Rule(affine_product, everywhere, None),
    Tensor.baddbmm: Rule(affine_product, everywhere, None),
}

RULES.update(_RULES)
