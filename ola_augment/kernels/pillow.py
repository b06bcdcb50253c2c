"""Exact kernels for one image: Pillow itself, without compiling anything.

Its filters are slow on large images, its histograms and tables on small ones; what stands here
instead gives the same bits and is compared with them by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ola_augment.kernels.affine import Matrix
from ola_augment.kernels.kind import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Up to this many pixels Pillow's filters are faster than NumPy's sums, and its tables slower.
_SMALL = 64 * 64
_GREY = np.arange(256)
_IDENTITY = _GREY.astype(np.uint8)


def look_up(image: Image.Image, table: bytes) -> Image.Image:
    """``Image.point`` with the same 256 values for every channel."""
    return Image.frombytes(image.mode, image.size, image.tobytes().translate(table))


def auto_contrast(image: Image.Image) -> Image.Image:
    """``ImageOps.autocontrast``: stretch each channel to [0, 255]; a constant one stays."""
    if not _is_small(image):
        return ImageOps.autocontrast(image)
    return _look_up_bands(image, _stretch_table)


def equalize(image: Image.Image) -> Image.Image:
    """``ImageOps.equalize`` of each channel."""
    if not _is_small(image):
        return ImageOps.equalize(image)
    return _look_up_bands(image, _equalize_table)


def _stretch_table(band: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low, high = int(band.min()), int(band.max())
    if high == low:
        return _IDENTITY
    scale = 255.0 / (high - low)
    stretched = _GREY * scale + -low * scale
    table: NDArray[np.uint8] = np.minimum(np.maximum(stretched, 0.0), 255.0).astype(np.uint8)
    return table


def _equalize_table(band: NDArray[np.uint8]) -> NDArray[np.uint8]:
    counts = np.bincount(band, minlength=256)
    step = int(len(band) - counts[band.max()]) // 255
    if step == 0:
        return _IDENTITY
    below = step // 2 + counts.cumsum() - counts
    return np.minimum(below // step, 255).astype(np.uint8)


def affine(
    image: Image.Image, matrix: Matrix, bilinear: bool, fill: tuple[int, ...]
) -> Image.Image:
    """``Image.transform`` with AFFINE; ``fill`` holds a value for each channel."""
    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.NEAREST
    color = fill if len(fill) > 1 else fill[0]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=color)


def cutout(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Blacken the (left, top, right, bottom) of an image, clipped at its border."""
    image = image.copy()
    image.paste(0 if image.mode == "L" else (0, 0, 0), box)
    return image


def smooth(image: Image.Image) -> Image.Image:
    """``filter(ImageFilter.SMOOTH)``: 3x3, the centre five times, rounded; the border stays."""
    if _is_small(image):
        return image.filter(ImageFilter.SMOOTH)
    rows, step = _rows(image)
    total = _box_sum(rows, 3, step) + 4 * rows[1:-1, step:-step]
    # total / 13 rounded: no multiple of 1 / 13 lies half way.
    return _with_inside(image, (2 * total + 13) // 26, 1)


def blur(image: Image.Image) -> Image.Image:
    """``filter(ImageFilter.BLUR)``: mean of the outer 16 of 5x5, rounded; the border stays."""
    if _is_small(image):
        return image.filter(ImageFilter.BLUR)
    rows, step = _rows(image)
    ring = _box_sum(rows, 5, step)
    ring -= _box_sum(rows[1:-1, step:-step], 3, step)
    return _with_inside(image, (ring + 8) >> 4, 2)


def _sharpness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(smooth(image), image, factor)


#: The kinds that need nothing but a magnitude.
FUNCTIONS: dict[Kind, Callable[[Image.Image, float], Image.Image]] = {
    Kind.IDENTITY: lambda image, _: image,
    Kind.AUTO_CONTRAST: lambda image, _: auto_contrast(image),
    Kind.EQUALIZE: lambda image, _: equalize(image),
    Kind.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    Kind.COLOR: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    Kind.SHARPNESS: _sharpness,
    Kind.BLUR: lambda image, _: blur(image),
}


def from_array(array: NDArray[np.uint8]) -> Image.Image:
    """(C, H, W) with 1 or 3 channels to mode L or RGB; a copy."""
    channels, height, width = array.shape
    if channels == 3 and height * width <= _SMALL:
        pixels = array.transpose(1, 2, 0).tobytes()
        return Image.frombytes("RGB", (width, height), pixels)
    planes = [Image.frombytes("L", (width, height), plane.tobytes()) for plane in array]
    return planes[0] if len(planes) == 1 else Image.merge("RGB", planes)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Mode L or RGB to (C, H, W), contiguous; a copy."""
    if len(image.getbands()) == 1:
        return np.array(image)[None]
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")


def _is_small(image: Image.Image) -> bool:
    return image.width * image.height <= _SMALL


def _look_up_bands(
    image: Image.Image, table: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> Image.Image:
    """``Image.point`` with a table for each channel, made from its levels."""
    result = np.array(image)
    for band in result.reshape(image.width * image.height, -1).T:
        band[:] = table(band)[band]
    return Image.fromarray(result)


def _rows(image: Image.Image) -> tuple[NDArray[np.uint16], int]:
    """(H, W C) with the channels of a pixel side by side, and C."""
    array = np.asarray(image)
    return array.reshape(image.height, -1).astype(np.uint16), len(image.getbands())


def _box_sum(rows: NDArray[np.uint16], size: int, step: int) -> NDArray[np.uint16]:
    """Sums over the size x size windows that fit."""
    height, width = max(len(rows) - size + 1, 0), max(rows.shape[1] - (size - 1) * step, 0)
    down = rows[:height].copy()
    for offset in range(1, size):
        down += rows[offset : offset + height]
    total = down[:, :width].copy()
    for offset in range(step, size * step, step):
        total += down[:, offset : offset + width]
    return total


def _with_inside(image: Image.Image, inside: NDArray[np.integer[Any]], border: int) -> Image.Image:
    result = np.array(image)
    if inside.size:
        hole = result[border:-border, border:-border]
        hole[:] = inside.reshape(hole.shape)
    return Image.fromarray(result)
