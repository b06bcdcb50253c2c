"""Operations that have no compiled kernel: a user's own, kornia's among them, and batched ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ola_augment.kernels.levels import as_they_came, run_on_levels
from ola_augment.kernels.pixel_format import PixelFormat
from ola_augment.kernels.table import TABLE
from ola_augment.operation import Operation

#: On average; what goes less far beyond [0, 1] is clamped: bright, noisy or sharpened images.
_FAR_OUTSIDE = 8.0


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Which dtype the batched kernels are given: torch can do little with other integers."""
    if dtype.is_floating_point:
        return torch.promote_types(dtype, torch.float32)
    return dtype if dtype == torch.uint8 else torch.int32


def run_with_magnitudes(
    operation: Operation,
    images: Tensor,
    magnitudes: Tensor,
    centers: Tensor,
    pixels: PixelFormat,
) -> Tensor:
    """Run an operation that moves no pixels, or a user's own.

    Args:
        operation: neither geometric nor a cutout, unless it has a kernel.
        images: (n, C, H, W) of a dtype of :func:`computed_in`.
        magnitudes: (n,) floating point, with their signs.
        centers: (n, 2) float32, for a kernel with randomness of its own.
        pixels: what the images are.

    Raises:
        TypeError: a user's own kernel returned no tensor, or one that is no image.
        ValueError: it returned another shape or scale than it was given, or NaN.
    """
    if operation.kernel is not None:
        drawn = (centers,) if operation.random else ()
        return _run_own(operation, images, pixels, magnitudes, *drawn)
    row = TABLE[operation.name]
    if row.batched is None:
        return images
    return run_on_levels(row.batched, images, magnitudes, row.leaves_range, pixels)


def _run_own(
    operation: Operation,
    images: Tensor,
    pixels: PixelFormat,
    magnitudes: Tensor,
    *drawn: Tensor,
) -> Tensor:
    """Run a user's own kernel on colours in float32, the range of the images brought to [0, 1]."""
    own = f"kernel of operation {operation.name!r}"
    colors, span = images[:, : pixels.colors], pixels.high - pixels.low
    given = colors.float() if pixels.of_bytes else (colors.float() - pixels.low).clamp(0, span)
    given = given / span
    assert operation.kernel is not None
    result = operation.kernel(given, magnitudes.float(), *drawn)
    if not isinstance(result, Tensor):
        raise TypeError(f"{own} must return a tensor, got {type(result).__name__}")
    if result.shape != colors.shape:
        raise ValueError(
            f"{own} must return the shape it was given, {tuple(colors.shape)}, got "
            f"{tuple(result.shape)}"
        )
    result = _in_floats(own, result)
    same = result == given
    result = result.clamp(0, 1)
    if pixels.of_bytes:
        result = (result * 255).round().to(images.dtype)
    elif pixels.whole:
        result = (result * span).round() + pixels.low
        result = torch.where(same, colors, result.to(images.dtype))
    else:
        result = (result * span + pixels.low).to(images.dtype)
        result = as_they_came(colors, result, same)
    return torch.cat((result, images[:, pixels.colors :]), dim=1) if pixels.alpha else result


def _in_floats(own: str, result: Tensor) -> Tensor:
    """What a user's own kernel returned on the scale it was given, bytes as what they are.

    Raises:
        TypeError: another dtype.
        ValueError: plainly another scale, or NaN; looked at on the CPU only.
    """
    if result.dtype == torch.uint8:
        return result.float() / 255
    if not result.is_floating_point():
        raise TypeError(
            f"{own} must return floats in [0, 1], as it was given, or uint8, got {result.dtype}: "
            "levels of 0 .. 255 are returned as result.to(torch.uint8)"
        )
    if result.device.type == "cpu" and result.numel():
        values = result.detach()
        beyond = float((values - values.clamp(0, 1)).abs().mean())
        if math.isnan(beyond):
            raise ValueError(
                f"{own} must return floats in [0, 1], as it was given, got NaN, which bytes would "
                "show as black: of flat or black images, perhaps, by a division or a logarithm"
            )
        if beyond > _FAR_OUTSIDE:
            raise ValueError(
                f"{own} must return floats in [0, 1], as it was given, got "
                f"{float(values.min()):g} .. {float(values.max()):g}: levels of 0 .. 255 are "
                "returned as result / 255, anything else is clamped by the kernel"
            )
    return result
