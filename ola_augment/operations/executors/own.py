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
        ValueError: it returned another device, shape or scale than it was given, or NaN.
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
    if as_it_is := _is_what_kernels_get(colors, pixels):
        given = colors
    elif pixels.of_bytes:
        given = colors.float() / span
    else:
        given = (colors.float() - pixels.low).clamp(0, span) / span
    # A kernel may write into what it is given, which is looked at again below.
    copied = not (as_it_is or pixels.of_bytes)
    assert operation.kernel is not None
    result = operation.kernel(given.clone() if copied else given, magnitudes.float(), *drawn)
    if not isinstance(result, Tensor):
        raise TypeError(f"{own} must return a tensor, got {type(result).__name__}")
    if result.layout != torch.strided or result.device != colors.device:
        raise ValueError(
            f"{own} must return a dense tensor on {colors.device}, where it was given one, got "
            f"{result.layout} on {result.device}"
        )
    if result.shape != colors.shape:
        raise ValueError(
            f"{own} must return the shape it was given, {tuple(colors.shape)}, got "
            f"{tuple(result.shape)}"
        )
    result = _in_floats(own, result)
    inside = _lies_inside(own, result)
    same = result == given if copied else torch.ones(1, dtype=torch.bool, device="cpu")
    result = result if inside else result.clamp(0, 1)
    if pixels.of_bytes:
        result = (result * 255).round().to(images.dtype)
    elif as_it_is:
        result = result.to(images.dtype)
    elif pixels.whole:
        result = (result * span).round() + pixels.low
        result = torch.where(same, colors, result.to(images.dtype))
    else:
        result = (result * span + pixels.low).to(images.dtype)
        result = as_they_came(colors, result, same)
    return torch.cat((result, images[:, pixels.colors :]), dim=1) if pixels.alpha else result


def _is_what_kernels_get(colors: Tensor, pixels: PixelFormat) -> bool:
    """Whether images are single floats in [0, 1], which are given as they are: copies cost most."""
    plain = colors.dtype == torch.float32 and (pixels.low, pixels.high) == (0, 1)
    if not plain or colors.requires_grad or colors.device.type != "cpu" or not colors.numel():
        return False
    low, high = torch.aminmax(colors)
    return low.item() >= 0 and high.item() <= 1


def _in_floats(own: str, result: Tensor) -> Tensor:
    """What a user's own kernel returned on the scale it was given, bytes as what they are.

    Raises:
        TypeError: another dtype.
    """
    if result.dtype == torch.uint8:
        return result.float() / 255
    if not result.is_floating_point():
        raise TypeError(
            f"{own} must return floats in [0, 1], as it was given, or uint8, got {result.dtype}: "
            "levels of 0 .. 255 are returned as result.to(torch.uint8)"
        )
    return result


def _lies_inside(own: str, result: Tensor) -> bool:
    """Whether a result is known to lie in [0, 1]: on the CPU alone, where it costs no waiting.

    Raises:
        ValueError: plainly another scale, or NaN.
    """
    if result.device.type != "cpu" or not result.numel():
        return False
    values = result.detach()
    low, high = (end.item() for end in torch.aminmax(values))
    if low >= 0 and high <= 1:
        return True
    beyond = float((values - values.clamp(0, 1)).abs().mean())
    if math.isnan(beyond):
        raise ValueError(
            f"{own} must return floats in [0, 1], as it was given, got NaN, which bytes would "
            "show as black: of flat or black images, perhaps, by a division or a logarithm"
        )
    if beyond > _FAR_OUTSIDE:
        raise ValueError(
            f"{own} must return floats in [0, 1], as it was given, got {low:g} .. {high:g}: levels "
            "of 0 .. 255 are returned as result / 255, anything else is clamped by the kernel"
        )
    return False
