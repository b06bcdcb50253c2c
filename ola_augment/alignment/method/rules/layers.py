"""Linear layers, convolutions and embeddings, whose pairs are large: Lemmas 2 and 3.

Linear: <d l_i / d W, g> = <delta_i, x_i g^T>; convolution: <d l_i / d K, g> = <delta_i, x_i * g>,
the layer run with g as kernel; the bias: <delta_i, g>; an embedding: <delta_i, g[indices_i]>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.registry import RULES, MakeTerm, Rule, Use
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
    return _positions(delta).mT @ _positions(input.to(delta.dtype))


def _weight_norms(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor | None:
    delta = _positions(delta)
    if not _gram_is_cheaper(delta.shape[1], shape):
        return None
    return gram_norms(delta, _positions(input.to(delta.dtype)))


def _positions(rows: Tensor) -> Tensor:
    """(B, ..., C) -> (B, T, C); T is 1 for a vector, which a single example may be."""
    return rows.unsqueeze(1).flatten(1, -2)


def _gram_is_cheaper(positions: int, shape: torch.Size, groups: int = 1) -> bool:
    """Whether two products of T x T cost less than the gradient of w, of a shape (O, ...)."""
    outputs, inputs = shape[0] // groups, shape[1:].numel()
    return positions * (outputs + inputs) <= outputs * inputs


def gram_norms(left: Tensor, right: Tensor) -> Tensor:
    """Squared norms of L_i^T R_i, for (B, ..., T, O) and (B, ..., T, I): <L_i L_i^T, R_i R_i^T>."""
    return ((left @ left.mT) * (right @ right.mT)).flatten(1).sum(1)


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


# stride, padding, dilation, transposed, output_padding, groups
Settings = tuple[Any, Any, Any, bool, Any, int]


def convolution(
    function: Callable[..., Tensor], settings_of: Callable[..., Settings]
) -> Callable[..., Iterator[Use]]:
    """For y = x * K + b, with whatever stride, padding, dilation and groups the layer has."""

    def uses(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
    ) -> Iterator[Use]:
        def operator(x: Tensor, w: Tensor) -> Tensor:
            return function(x, w, None, *settings, **named)

        if input.dim() < weight.dim():  # a single example without its dimension
            yield from _unbatched(uses(input.unsqueeze(0), weight, bias, *settings, **named))
            return
        adjoint = of_kernel(weight.dim() - 2, settings_of(*settings, **named))
        yield weight, pair(operator, input, adjoint=adjoint)
        yield bias, sum_to_channels

    return uses


def _unbatched(uses: Iterator[Use]) -> Iterator[Use]:
    for w, term in uses:

        def of_one(delta: Tensor, layout: Layout, term: MakeTerm = term) -> Term:
            found: Term = term(delta.unsqueeze(0), layout)
            return found

        yield w, of_one


def of_kernel(spatial: int, settings: Settings) -> Adjoint | None:
    """Per-example kernel gradients; None for paddings by name.

    Args:
        spatial: number of spatial dimensions.
        settings: stride, padding, dilation, transposed, output_padding, groups.
    """
    if any(isinstance(setting, str) for setting in settings):
        return None
    stride, padding, dilation, transposed, output_padding, groups = settings
    stride, padding, dilation, output_padding = (
        [setting] * spatial if isinstance(setting, int) else list(setting)
        for setting in (stride, padding, dilation, output_padding)
    )
    rest = (stride, padding, dilation, transposed, output_padding, groups)

    def gradients(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
        kernel = delta.new_empty(1).expand(shape)  # only its shape is read
        found = delta.new_empty(len(delta), *shape)
        for own, x, gradient in zip(delta, input.to(delta.dtype), found, strict=True):
            gradient.copy_(
                torch.ops.aten.convolution_backward(
                    own, x, kernel, None, *rest, (False, True, False)
                )[1]
            )
        return found

    def norms(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor | None:
        # A transposed convolution is one of delta, with x in place of the output's gradient.
        whole, part = (delta, input.to(delta.dtype))[:: 1 if transposed else -1]
        positions = part.shape[1] * part.shape[3:].numel()
        if part.dim() != spatial + 3 or not _gram_is_cheaper(positions, shape, groups):
            return None
        return torch.cat(
            [
                _kernel_norms(x, d, shape, stride, padding, dilation, groups)
                for x, d in zip(
                    torch.split(whole, _AT_ONCE), torch.split(part, _AT_ONCE), strict=True
                )
            ]
        )

    return Adjoint(gradients, norms)


#: Examples of which windows are laid out together: they should stay in the processor's cache.
_AT_ONCE = 4


def _kernel_norms(
    input: Tensor, delta: Tensor, shape: torch.Size, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Tensor:  # fmt: skip
    """Squared norms of the per-example kernel gradients, from rows (B, n, C, ...)."""
    batch, n = input.shape[:2]
    input, delta = input.flatten(0, 1), delta.flatten(0, 1)
    padded = F.pad(input, [side for size in reversed(padding) for side in (size, size)])
    outer, inner = padded.stride()[:2], padded.stride()[2:]
    # (B n, C, *kernel, *out): what each output position sees.
    windows = padded.as_strided(
        (*padded.shape[:2], *shape[2:], *delta.shape[2:]),
        (
            *outer,
            *(step * one for step, one in zip(dilation, inner, strict=True)),
            *(step * one for step, one in zip(stride, inner, strict=True)),
        ),
    )
    # (B, groups, I, n T) and (B, groups, O, n T)
    seen = windows.reshape(batch, n, groups, shape[1:].numel(), -1).movedim(1, 3).flatten(3)
    given = delta.reshape(batch, n, groups, shape[0] // groups, -1).movedim(1, 3).flatten(3)
    return gram_norms(given.mT, seen.mT)


def _plain(stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Settings:
    return stride, padding, dilation, False, 0, groups


def _transposed(
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1
) -> Settings:
    return stride, padding, dilation, True, output_padding, groups


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
        return ((delta @ delta.mT) * equal).flatten(1).sum(1)

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


def _batched(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.dim() - (weight.dim() - 1)


_CONVOLUTIONS: dict[Callable[..., Tensor], Callable[..., Settings]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _plain),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed
    ),
}

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
    **{f: Rule(convolution(f, settings), _batched) for f, settings in _CONVOLUTIONS.items()},
}

RULES.update(_RULES)
