"""Convolutions. Lemma 3: <d l_i / d K, g> = <delta_i, x_i * g>, the layer run with g as kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment.rules.rule import Rule, Use, pair, sum_to_channels
from ola_augment.alignment.terms import Adjoint

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


def _batched(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.dim() - (weight.dim() - 1)


_CONVOLUTIONS: dict[Callable[..., Tensor], Callable[..., Settings]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _plain),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed
    ),
}

RULES: dict[Callable[..., Any], Rule] = {
    function: Rule(convolution(function, settings_of), _batched)
    for function, settings_of in _CONVOLUTIONS.items()
}
