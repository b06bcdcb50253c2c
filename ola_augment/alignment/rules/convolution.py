"""Convolutions. Lemma 3: <d l_i / d K, g> = <delta_i, x_i * g>, the layer run with g as kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .rule import Rule, Use, pair, sum_to_channels


def convolution(function: Callable[..., Tensor]) -> Callable[..., Iterator[Use]]:
    """For y = x * K + b, with whatever stride, padding, dilation and groups the layer has."""

    def uses(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
    ) -> Iterator[Use]:
        yield weight, pair(lambda x, w: function(x, w, None, *settings, **named), input)
        yield bias, sum_to_channels

    return uses


def _batched(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.dim() - (weight.dim() - 1)


_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip

RULES: dict[Callable[..., Any], Rule] = {
    function: Rule(convolution(function), _batched) for function in _CONVOLUTIONS
}
