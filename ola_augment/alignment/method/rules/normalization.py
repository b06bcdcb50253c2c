"""Normalisations. y = gamma xhat + beta, so <d l_i / d gamma, g> = <delta_i xhat_i, g>.

xhat, the layer without its affine part, is computed from the input again when delta arrives.
BatchNorm in training mode: xhat_i depends on the whole batch, and delta_i is example i's share of
the derivative of the total loss; the shares sum to the derivative of the total.

torch's functions hand over all of their arguments, defaults too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.registry import RULES, Rule, Use
from ola_augment.alignment.method.rules.rule import sum_to_channels, sum_to_shape
from ola_augment.alignment.method.storage import widen
from ola_augment.alignment.method.terms import ExampleGradient


def _channels(
    normalized: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None
) -> Iterator[Use]:
    """Scale and shift per channel, dimension 1."""

    def scale(delta: Tensor, layout: Layout) -> ExampleGradient:
        return sum_to_channels(widen(delta) * normalized(), layout)

    yield weight, scale
    yield bias, sum_to_channels


def _trailing(
    normalized: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None, shape: list[int]
) -> Iterator[Use]:
    """Scale and shift per element of the trailing dimensions ``shape``."""
    size = torch.Size(shape)
    yield weight, lambda d, layout: sum_to_shape(widen(d) * normalized(), layout, size)
    yield bias, lambda d, layout: sum_to_shape(d, layout, size)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Iterator[Use]:
    """Batch statistics when training, the running ones otherwise."""

    def scale(delta: Tensor, layout: Layout) -> ExampleGradient:
        # sum delta xhat = (sum delta (x - c) - (mean - c) sum delta) / std for any c; c near the
        # mean keeps single precision. No tensor of the size of xhat is normalised for it.
        if training:
            center = widen(input)[:1].transpose(0, 1).flatten(1).mean(1)
            shifted = widen(input) - _along_channels(center, input)
            count = input.numel() / input.shape[1]
            by_row = shifted.reshape(*shifted.shape[:2], -1)
            offset = by_row.sum((0, 2)) / count
            second = torch.linalg.vector_norm(by_row, dim=2).square().sum(0) / count
            deviation = (second - offset**2 + eps).sqrt()
        else:
            assert running_mean is not None
            assert running_var is not None
            shifted = widen(input) - _along_channels(running_mean, input)
            offset, deviation = torch.zeros_like(running_mean), (running_var + eps).sqrt()
        # In place: these are the largest tensors of a network.
        products = sum_to_channels(shifted.mul_(widen(delta)), layout).gradient
        totals = sum_to_channels(delta, layout).gradient
        return ExampleGradient((products - offset * totals) / deviation)

    yield weight, scale
    yield bias, sum_to_channels


def _along_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *(1,) * (like.dim() - 2))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Iterator[Use]:
    """Each example's own statistics, or the running ones."""
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)

    def normalized() -> Tensor:
        return F.instance_norm(widen(input), mean, var, use_input_stats=use_input_stats, eps=eps)

    return _channels(normalized, weight, bias)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Iterator[Use]:
    """Statistics over groups of channels."""
    return _channels(lambda: F.group_norm(widen(input), num_groups, eps=eps), weight, bias)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Iterator[Use]:
    """Statistics over the trailing dimensions."""
    shape = list(normalized_shape)
    return _trailing(lambda: F.layer_norm(widen(input), shape, eps=eps), weight, bias, shape)


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> Iterator[Use]:
    """Root mean square over the trailing dimensions, no shift."""
    shape = list(normalized_shape)
    # eps=None means the machine epsilon of the input's own dtype.
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    return _trailing(lambda: F.rms_norm(widen(input), shape, eps=epsilon), weight, None, shape)


def _first(*_: Any, **__: Any) -> int:
    return 1


def _before_trailing(input: Tensor, normalized_shape: list[int], *_: Any, **__: Any) -> int:
    return input.dim() - len(normalized_shape)


def _native(uses: Callable[..., Iterator[Use]]) -> Callable[..., Iterator[Use]]:
    """Of ``torch.layer_norm`` and its kin, which ``torch.nn.functional`` wraps."""

    def native(
        input: Tensor,
        shape: Any,
        weight: Any = None,
        bias: Any = None,
        *rest: Any,
        eps: float = 1e-5,
        **_: Any,
    ) -> Iterator[Use]:
        return uses(input, shape, weight, bias, rest[0] if rest else eps)

    return native


def _native_rms(
    input: Tensor, normalized_shape: list[int], weight: Any = None, eps: float | None = None
) -> Iterator[Use]:
    return rms_norm(input, normalized_shape, weight, eps)


def _native_statistics(uses: Callable[..., Iterator[Use]]) -> Callable[..., Iterator[Use]]:
    def native(
        input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, by_batch: bool,
        momentum: float, eps: float, *_: Any, **__: Any,
    ) -> Iterator[Use]:  # fmt: skip
        return uses(input, mean, var, weight, bias, by_batch, momentum, eps)

    return native


RULES |= {
    torch.batch_norm: Rule(_native_statistics(batch_norm), _first),
    torch.instance_norm: Rule(_native_statistics(instance_norm), _first),
    torch.group_norm: Rule(_native(group_norm), _first),
    torch.layer_norm: Rule(_native(layer_norm), _before_trailing),
    torch.rms_norm: Rule(_native_rms, _before_trailing),
    F.batch_norm: Rule(batch_norm, _first),
    F.instance_norm: Rule(instance_norm, _first),
    F.group_norm: Rule(group_norm, _first),
    F.layer_norm: Rule(layer_norm, _before_trailing),
    F.rms_norm: Rule(rms_norm, _before_trailing),
}
