"""Batched kernels that change levels: color, tone and the two filters.

Each takes levels (n, C, H, W) of the colour channels, floating point in [0, ``pixels.white``],
magnitudes (n, 1, 1, 1) in the unit of Pillow's 0 .. 255, and the :class:`PixelFormat`, and returns
levels that may lie outside. Where ``pixels.whole``, levels are whole numbers counted from the low
end of the range, and intermediate results are rounded where Pillow rounds them, which makes the
truncated result of bytes equal to Pillow's; elsewhere nothing is rounded, and the result is
differentiable wherever the operation is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ola_augment.kernels.kind import BINS, FEW_BINS, PIXELS
from ola_augment.kernels.pixel_format import PixelFormat
from ola_augment.kernels.precision import apart, wide_dtype

LevelsKernel = Callable[[Tensor, Tensor, PixelFormat], Tensor]


def _nearest_level(levels: Tensor) -> Tensor:
    return torch.floor(levels + 0.5)


def _rounded(levels: Tensor, pixels: PixelFormat) -> Tensor:
    return _nearest_level(levels) if pixels.whole else levels


def _grey(levels: Tensor, pixels: PixelFormat) -> Tensor:
    """(n, 1, H, W): by the weights of the user, Pillow's for three channels, or the mean."""
    channels = levels.shape[1]
    if channels == 1:
        return levels
    if pixels.grey is not None:
        grey = _weighted(levels, pixels.grey)
    elif channels == 3:
        # Exact in single precision for bytes.
        red, green, blue = torch.split(levels, 1, dim=1)
        grey = (19595 * red + 38470 * green + 7471 * blue) / 65536
    elif pixels.whole:
        wide = wide_dtype(levels.device)
        grey = levels.sum(1, keepdim=True, dtype=wide) / channels
    else:
        grey = levels.mean(1, keepdim=True)
    return _rounded(grey, pixels).to(levels.dtype)


def _weighted(levels: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Sum over the channels, from the first to the last, in double precision."""
    bands = torch.split(levels.to(wide_dtype(levels.device)), 1, dim=1)
    total = apart(weights[0] * bands[0])
    for weight, band in zip(weights[1:], bands[1:], strict=True):
        total = total + apart(weight * band)
    return total


def _mean_grey(levels: Tensor, pixels: PixelFormat) -> Tensor:
    """(n, 1, 1, 1): the mean of the grey image, whose pixels Pillow has rounded before."""
    n, channels, height, width = levels.shape
    if not pixels.whole:
        return _grey(levels, pixels).mean((1, 2, 3), keepdim=True)
    if pixels.grey is not None:
        totals = levels.sum((2, 3), keepdim=True, dtype=torch.int64)
        mean = _weighted(totals, pixels.grey) / (height * width)
        return _nearest_level(mean).to(levels.dtype)
    grey = _grey(levels, pixels) if channels == 3 else levels
    total, size = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64), grey[:1].numel()
    if n == 0 or size == 0:
        return total.to(levels.dtype)
    return torch.div(2 * total + size, 2 * size, rounding_mode="floor").to(levels.dtype)


def _blend(degenerate: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    return degenerate + apart(factor * (levels - degenerate))


def _box_sum(levels: Tensor, size: int) -> Tensor:
    """Sums over all size x size windows that fit: (n, C, H - size + 1, W - size + 1)."""
    for dim in (2, 3):
        fitting = max(levels.shape[dim] - size + 1, 0)
        starts = range(min(size, levels.shape[dim] - fitting + 1))
        windows = [levels.narrow(dim, start, fitting) for start in starts]
        levels = sum(windows[2:], windows[0] + windows[1]) if len(windows) > 1 else windows[0]
    return levels


def _inside(levels: Tensor, border: int) -> Tensor:
    return levels[
        ..., border : max(levels.shape[2] - border, 0), border : max(levels.shape[3] - border, 0)
    ]


def auto_contrast(levels: Tensor, _: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageOps.autocontrast``: stretch each channel to the range; a constant one stays."""
    values = levels.to(wide_dtype(levels.device)) if pixels.whole else levels
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    # Not white / tensor, which torch computes by way of the reciprocal.
    scale = torch.full_like(low, pixels.white) / torch.where(high > low, high - low, pixels.white)
    stretched = (
        apart(values * scale) + apart(-low * scale) if pixels.whole else (values - low) * scale
    )
    return torch.where(high > low, stretched, values)


def equalize(levels: Tensor, _: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageOps.equalize`` with as many levels as there are, or bins of floats; no gradient."""
    planes, size = levels.shape[0] * levels.shape[1], levels.shape[2] * levels.shape[3]
    bins = grades = int(pixels.white) + 1
    if not pixels.whole:
        bins, grades = BINS if size >= PIXELS else FEW_BINS, FEW_BINS
    if size < bins:  # no step
        return levels
    scale = (bins - 1) / pixels.white
    # On a device values are not looked at before: NaN must not become an index.
    nearest = _nearest_level(levels.detach() * scale).nan_to_num_().clamp_(0, bins - 1)
    index = nearest.reshape(planes, size).long()
    histogram = _histograms(index, bins)
    grey = torch.arange(bins, device=levels.device)
    last = (grey * (histogram > 0)).amax(1, keepdim=True)
    step = (size - histogram.gather(1, last)) // (grades - 1)
    seen = histogram.cumsum(1) - histogram
    divisor = step.clamp(min=1)
    # The grades of many bins are what those of few round to.
    grade = (step // 2 + seen) // divisor if bins == grades else seen / divisor
    table = grade.clamp(max=grades - 1).to(levels.dtype) / ((grades - 1) / pixels.white)
    equalized = table.gather(1, index).view_as(levels)
    return torch.where(step.view(*levels.shape[:2], 1, 1) > 0, equalized, levels)


def _histograms(index: Tensor, bins: int) -> Tensor:
    """How often each of the levels occurs in each row: (N, P) int64 to (N, bins) integers."""
    planes, one = len(index), torch.ones((), dtype=torch.int32, device=index.device)
    histograms = torch.zeros(planes, bins, dtype=torch.int32, device=index.device)
    if index.device.type == "cpu":
        return histograms.scatter_add_(1, index, one.expand_as(index))
    # All in one flat tensor: there scatter_add_ can be deterministic.
    index = (index + bins * torch.arange(planes, device=index.device)[:, None]).flatten()
    return histograms.view(-1).scatter_add_(0, index, one.expand_as(index)).view(planes, bins)


def solarize(levels: Tensor, threshold: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageOps.solarize``: invert the levels from threshold / 256 of the range up.

    Floats from the first whole threshold on, as bytes; above 255 there is none.
    """
    if pixels.whole:
        bound = threshold * (pixels.white + 1)
    else:
        first = torch.where(threshold > 255, torch.inf, threshold.ceil())
        bound = first * pixels.white
    return torch.where(256 * levels < bound, levels, pixels.white - levels)


def posterize(levels: Tensor, bits: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageOps.posterize``: keep the upper bits, of floats those of the nearest 255th."""
    if not pixels.whole:
        levels = _nearest_level(levels)
    count = pixels.white + 1 if pixels.whole else 256
    step = count * 2.0 ** -bits.trunc()
    return torch.floor(torch.floor(levels / step) * step)


def invert(levels: Tensor, _: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageOps.invert``."""
    return pixels.white - levels


def brightness(levels: Tensor, factor: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageEnhance.Brightness``: blend with black."""
    return factor * levels


def contrast(levels: Tensor, factor: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageEnhance.Contrast``: blend with the mean of the grey image."""
    return _blend(_mean_grey(levels, pixels), levels, factor)


def color(levels: Tensor, factor: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageEnhance.Color``: blend with the grey image; one channel stays as it is."""
    return _blend(_grey(levels, pixels), levels, factor) if levels.shape[1] > 1 else levels


def sharpness(levels: Tensor, factor: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageEnhance.Sharpness``: blend with ``ImageFilter.SMOOTH``; the border of 1 stays."""
    inside = _inside(levels, 1)
    smooth = _rounded((_box_sum(levels, 3) + 4 * inside) / 13, pixels)
    result = levels.clone()
    _inside(result, 1).copy_(_blend(smooth, inside, factor))
    return result


def blur(levels: Tensor, _: Tensor, pixels: PixelFormat) -> Tensor:
    """``ImageFilter.BLUR``: mean of the outer 16 of 5 x 5 pixels; the border of 2 stays."""
    ring = _box_sum(levels, 5) - _box_sum(_inside(levels, 1), 3)
    result = levels.clone()
    _inside(result, 2).copy_(_rounded(ring / 16, pixels))
    return result


def run_on_levels(
    kernel: LevelsKernel,
    images: Tensor,
    magnitudes: Tensor,
    leaves_range: bool,
    pixels: PixelFormat,
) -> Tensor:
    """Run a kernel on the colours of images, truncating whole levels as Pillow does.

    Values that the kernel leaves as they are come back bit for bit, also outside of the range.

    Args:
        kernel: one of the above.
        images: (n, C, H, W) uint8, int32 (which stands for the other integers), float32 or float64.
        magnitudes: (n,) floating point.
        leaves_range: whether to clamp what the kernel changes.
        pixels: what the images are.
    """
    if pixels.alpha:
        colors, alpha = images[:, :-1], images[:, -1:]
        opaque = replace(pixels, channels=pixels.colors, alpha=False)
        return torch.cat(
            (run_on_levels(kernel, colors, magnitudes, leaves_range, opaque), alpha), dim=1
        )
    if pixels.whole:
        return _run_on_whole_levels(kernel, images, magnitudes, leaves_range, pixels)
    unit = pixels.white / (pixels.high - pixels.low)
    levels = (images - pixels.low) * unit if pixels.low else images * unit
    result = kernel(levels, magnitudes.to(levels.dtype).view(-1, 1, 1, 1), pixels)
    same = result == levels
    result = result / unit
    if pixels.low:
        result = result + pixels.low
    if leaves_range:
        result = torch.where(same, result, result.clamp(pixels.low, pixels.high))
    return as_they_came(images, result, same)


def _run_on_whole_levels(
    kernel: LevelsKernel,
    images: Tensor,
    magnitudes: Tensor,
    leaves_range: bool,
    pixels: PixelFormat,
) -> Tensor:
    # Pillow blends bytes in single precision, which is exact for their sums.
    dtype = torch.float32 if pixels.of_bytes else wide_dtype(images.device)
    levels = images.to(dtype)
    levels = levels - pixels.low if pixels.low else levels
    result = kernel(levels, magnitudes.to(dtype).view(-1, 1, 1, 1), pixels)
    limited = result.clamp(0, pixels.white) if leaves_range else result
    if pixels.of_bytes:
        return limited.to(images.dtype)
    limited = torch.where(result == levels, levels, limited).floor() + pixels.low
    held = torch.iinfo(pixels.dtype)
    return limited.clamp(held.min, held.max).to(images.dtype)


def as_they_came(images: Tensor, result: Tensor, same: Tensor) -> Tensor:
    """A result with the very values of the images where it is the same but for rounding.

    The gradient stays the result's; the difference of numbers this close is exact.
    """
    return result + torch.where(same, images - result, 0).detach()
