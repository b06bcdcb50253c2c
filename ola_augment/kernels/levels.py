"""Batched kernels that change grey levels: color, tone and the two filters.

Each takes levels (n, C, H, W), floating point in [0, 255], magnitudes (n, 1, 1, 1) and ``whole``,
and returns levels that may lie outside of [0, 255]. With ``whole`` the levels are whole numbers and
intermediate results are rounded where Pillow rounds them, which makes the truncated result equal to
Pillow's; without, nothing is rounded, and the result is differentiable wherever the operation is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LevelsKernel = Callable[[Tensor, Tensor, bool], Tensor]

_HIGH = 255


def wide_dtype(device: torch.device) -> torch.dtype:
    """Double precision, in which Pillow computes, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _nearest_level(levels: Tensor) -> Tensor:
    return torch.floor(levels + 0.5)


def _rounded(levels: Tensor, whole: bool) -> Tensor:
    return _nearest_level(levels) if whole else levels


def _grey(levels: Tensor, whole: bool) -> Tensor:
    """(19595 R + 38470 G + 7471 B) / 65536, exact in float32; (n, 1, H, W)."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = torch.split(levels, 1, dim=1)
    return _rounded((19595 * red + 38470 * green + 7471 * blue) / 65536, whole)


def _blend(degenerate: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    return degenerate + factor * (levels - degenerate)


def _box_sum(levels: Tensor, size: int) -> Tensor:
    """Sums over all size x size windows that fit: (n, C, H - size + 1, W - size + 1)."""
    for dim in (2, 3):
        fitting = max(levels.shape[dim] - size + 1, 0)
        starts = range(min(size, levels.shape[dim] - fitting + 1))
        windows = [levels.narrow(dim, start, fitting) for start in starts]
        levels = torch.stack(windows).sum(0)
    return levels


def _inside(levels: Tensor, border: int) -> Tensor:
    return levels[
        ..., border : max(levels.shape[2] - border, 0), border : max(levels.shape[3] - border, 0)
    ]


def auto_contrast(levels: Tensor, _: Tensor, whole: bool) -> Tensor:
    """``ImageOps.autocontrast``: stretch each channel to [0, 255]; a constant one stays."""
    values = levels.to(wide_dtype(levels.device)) if whole else levels
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    # Not 255 / tensor, which torch computes by way of the reciprocal.
    scale = torch.full_like(low, _HIGH) / torch.where(high > low, high - low, _HIGH)
    return torch.where(high > low, values * scale + -low * scale, values)


def equalize(levels: Tensor, _: Tensor, whole: bool) -> Tensor:
    """``ImageOps.equalize``, by the histogram of the nearest whole levels; no gradient."""
    planes, pixels = levels.shape[0] * levels.shape[1], levels.shape[2] * levels.shape[3]
    grey = torch.arange(256, device=levels.device)
    # On a device values are not looked at before: NaN must not become an index.
    nearest = _nearest_level(levels.detach()).nan_to_num_().clamp_(0, _HIGH)
    index = nearest.reshape(planes, pixels).long()
    histogram = _histograms(index)
    last = (grey * (histogram > 0)).amax(1, keepdim=True)
    step = (pixels - histogram.gather(1, last)) // 255
    seen = step // 2 + histogram.cumsum(1) - histogram
    table = (seen // step.clamp(min=1)).clamp(max=_HIGH).to(levels.dtype)
    equalized = table.gather(1, index).view_as(levels)
    return torch.where(step.view(*levels.shape[:2], 1, 1) > 0, equalized, levels)


def _histograms(index: Tensor) -> Tensor:
    """How often each of 256 levels occurs in each row: (N, P) int64 to (N, 256) integers."""
    planes, one = len(index), torch.ones((), dtype=torch.int32, device=index.device)
    histograms = torch.zeros(planes, 256, dtype=torch.int32, device=index.device)
    if index.device.type == "cpu":
        return histograms.scatter_add_(1, index, one.expand_as(index))
    # All in one flat tensor: there scatter_add_ can be deterministic.
    index = (index + 256 * torch.arange(planes, device=index.device)[:, None]).flatten()
    return histograms.view(-1).scatter_add_(0, index, one.expand_as(index)).view(planes, 256)


def solarize(levels: Tensor, threshold: Tensor, whole: bool) -> Tensor:
    """``ImageOps.solarize``: invert the levels from the threshold up, by the nearest level."""
    return torch.where(_nearest_level(levels) < threshold, levels, _HIGH - levels)


def posterize(levels: Tensor, bits: Tensor, whole: bool) -> Tensor:
    """``ImageOps.posterize``: keep the upper bits of the nearest level; no gradient."""
    step = 2 ** (8 - bits.trunc())
    return torch.floor(_nearest_level(levels) / step) * step


def invert(levels: Tensor, _: Tensor, whole: bool) -> Tensor:
    """``ImageOps.invert``."""
    return _HIGH - levels


def brightness(levels: Tensor, factor: Tensor, whole: bool) -> Tensor:
    """``ImageEnhance.Brightness``: blend with black."""
    return factor * levels


def contrast(levels: Tensor, factor: Tensor, whole: bool) -> Tensor:
    """``ImageEnhance.Contrast``: blend with the mean of the grey image, rounded if ``whole``."""
    grey = _grey(levels, whole)
    if whole:
        size = levels.shape[2] * levels.shape[3]
        total = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64)
        mean = ((2 * total + size) // (2 * size)).to(levels.dtype)
    else:
        mean = grey.mean((1, 2, 3), keepdim=True)
    return _blend(mean, levels, factor)


def color(levels: Tensor, factor: Tensor, whole: bool) -> Tensor:
    """``ImageEnhance.Color``: blend with the grey image; one channel stays as it is."""
    return _blend(_grey(levels, whole), levels, factor) if levels.shape[1] > 1 else levels


def sharpness(levels: Tensor, factor: Tensor, whole: bool) -> Tensor:
    """``ImageEnhance.Sharpness``: blend with ``ImageFilter.SMOOTH``; the border of 1 stays."""
    inside = _inside(levels, 1)
    smooth = _rounded((_box_sum(levels, 3) + 4 * inside) / 13, whole)
    result = levels.clone()
    _inside(result, 1).copy_(_blend(smooth, inside, factor))
    return result


def blur(levels: Tensor, _: Tensor, whole: bool) -> Tensor:
    """``ImageFilter.BLUR``: mean of the outer 16 of 5 x 5 pixels; the border of 2 stays."""
    ring = _box_sum(levels, 5) - _box_sum(_inside(levels, 1), 3)
    result = levels.clone()
    _inside(result, 2).copy_(_rounded(ring / 16, whole))
    return result


def run_on_levels(
    kernel: LevelsKernel, images: Tensor, magnitudes: Tensor, leaves_range: bool
) -> Tensor:
    """Run a kernel on uint8 images, truncating as Pillow does, or on floating ones in [0, 1].

    Values that the kernel leaves as they are come back bit for bit, also outside of [0, 1].

    Args:
        kernel: one of the above.
        images: (n, C, H, W) uint8, float32 or float64.
        magnitudes: (n,) floating point.
        leaves_range: whether to clamp what the kernel changes.
    """
    whole = not images.is_floating_point()
    levels = images.float() if whole else images * _HIGH
    result = kernel(levels, magnitudes.to(levels.dtype).view(-1, 1, 1, 1), whole)
    if whole:
        return (result.clamp(0, _HIGH) if leaves_range else result).to(images.dtype)
    same = result == levels
    result = result / _HIGH
    if leaves_range:
        result = torch.where(same, result, result.clamp(0, 1))
    return as_they_came(images, result, same)


def as_they_came(images: Tensor, result: Tensor, same: Tensor) -> Tensor:
    """A result with the very values of the images where it is the same but for rounding.

    The gradient stays the result's; the difference of numbers this close is exact.
    """
    return result + torch.where(same, images - result, 0).detach()
