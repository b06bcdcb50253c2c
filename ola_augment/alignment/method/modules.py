"""What the forward pass of a module calls, where a module is all that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# What a module's forward calls: the function and its arguments.
_Call = tuple[Callable[..., Tensor], tuple[Any, ...]]


def _convolution(function: Callable[..., Tensor]) -> Callable[[Any, Tensor], _Call]:
    def call(module: Any, x: Tensor) -> _Call:
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        settings = (module.stride, padding, module.dilation, module.groups)
        return function, (x, module.weight, module.bias, *settings)

    return call


def _transposed(function: Callable[..., Tensor]) -> Callable[[Any, Tensor], _Call]:
    def call(module: Any, x: Tensor) -> _Call:
        settings = (
            module.stride,
            module.padding,
            module.output_padding,
            module.groups,
            module.dilation,
        )
        return function, (x, module.weight, module.bias, *settings)

    return call


def _batch_norm(module: Any, x: Tensor) -> _Call:
    by_batch = module.training or module.running_mean is None
    statistics = (module.running_mean, module.running_var)
    affine = (module.weight, module.bias)
    return F.batch_norm, (x, *statistics, *affine, by_batch, 0.0, module.eps)


#: For each type of module, from it and its input to the call.
CALLS: dict[type[nn.Module], Callable[[Any, Tensor], _Call]] = {
    nn.Linear: lambda m, x: (F.linear, (x, m.weight, m.bias)),
    nn.Conv1d: _convolution(F.conv1d),
    nn.Conv2d: _convolution(F.conv2d),
    nn.Conv3d: _convolution(F.conv3d),
    nn.ConvTranspose1d: _transposed(F.conv_transpose1d),
    nn.ConvTranspose2d: _transposed(F.conv_transpose2d),
    nn.ConvTranspose3d: _transposed(F.conv_transpose3d),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: lambda m, x: (
        F.layer_norm,
        (x, m.normalized_shape, m.weight, m.bias, m.eps),
    ),
    nn.GroupNorm: lambda m, x: (F.group_norm, (x, m.num_groups, m.weight, m.bias, m.eps)),
    nn.PReLU: lambda m, x: (F.prelu, (x, m.weight)),
    nn.Embedding: lambda m, x: (F.embedding, (x, m.weight, m.padding_idx)),
}
