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

from ola_augment.alignment.layout import Layout
from ola_augment.alignment.rules.generic import linear as linear_in_each
from ola_augment.alignment.rules.rule import (
    RULES,
    Rule,
    Use,
    broadcast,
    everywhere,
    pair,
    sum_to_channels,
    sum_to_shape,
)
from ola_augment.alignment.storage import widen
from ola_augment.alignment.terms import Adjoint, Term


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
    """For y = x W^T + b."""
    yield weight, pair(F.linear, input, adjoint=_weight_gradients)
    if bias is not None:
        shape = bias.shape
        yield bias, lambda delta, layout: sum_to_shape(delta, layout, shape)


def _weight_gradients(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """delta_i^T x_i, (B, O, I), summed over an example's rows (B, T, O) and (B, T, I)."""
    return delta.flatten(1, -2).mT @ input.to(delta.dtype).flatten(1, -2)


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

        adjoint = kernel_gradients(weight.dim() - 2, settings_of(*settings, **named))
        yield weight, pair(operator, input, adjoint=adjoint)
        yield bias, sum_to_channels

    return uses


def kernel_gradients(spatial: int, settings: Settings) -> Adjoint | None:
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

    def adjoint(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
        kernel = delta.new_empty(1).expand(shape)  # only its shape is read
        gradients = delta.new_empty(len(delta), *shape)
        for own, x, gradient in zip(delta, input.to(delta.dtype), gradients, strict=True):
            gradient.copy_(
                torch.ops.aten.convolution_backward(
                    own, x, kernel, None, *rest, (False, True, False)
                )[1]
            )
        return gradients

    return adjoint


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
    """The row of ``padding_idx`` receives no gradient."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise RuntimeError(
            "embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be aligned "
            "exactly; use an embedding without them"
        )
    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def rows(indices: Tensor, w: Tensor) -> Tensor:
        out = F.embedding(indices, w)
        return out if padding is None else out * (indices != padding).unsqueeze(-1)

    yield weight, pair(rows, input)


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
    F.embedding_bag: Rule(linear_in_each(F.embedding_bag), lambda *_, **__: 1, None),
    F.prelu: Rule(prelu, lambda input, *_, **__: 1),
    torch.addmm: Rule(affine_product, everywhere, None),
    Tensor.addmm: Rule(affine_product, everywhere, None),
    torch.baddbmm: Rule(affine_product, everywhere, None),
    Tensor.baddbmm: Rule(affine_product, everywhere, None),
    **{f: Rule(convolution(f, settings), _batched) for f, settings in _CONVOLUTIONS.items()},
}

RULES.update(_RULES)
