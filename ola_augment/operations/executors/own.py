"""Operations that have no compiled kernel: a user's own, kornia's among them, and batched ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ola_augment.kernels.levels import as_they_came, run_on_levels
from ola_augment.kernels.pixel_format import PixelFormat
from ola_augment.kernels.table import TABLE
from ola_augment.operation import Operation


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
        TypeError: a user's own kernel returned no tensor.
        ValueError: it returned another shape than it was given.
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
