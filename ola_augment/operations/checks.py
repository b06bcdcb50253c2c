"""What the kernels accept; numba's read and write without bounds: nothing else may reach them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

#: Pixels are indexed by 32-bit integers.
_MOST_PIXELS = 2**31 - 1


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images.

    Raises:
        TypeError: no tensor, or another dtype than uint8 or floating point.
        ValueError: another shape than (B, C, H, W) with C 1 or 3 and at least one pixel, or values
            outside [0, 1], NaN included; those are looked at on the CPU only, because on an
            accelerator that waits for it.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating in [0, 1], got {images.dtype}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have shape (B, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    check_size(*images.shape[2:])
    if images.dtype == torch.uint8 or images.device.type != "cpu" or not images.numel():
        return
    low, high = (float(end) for end in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"floating images must lie in [0, 1], got {low!r} .. {high!r}")


def check_size(height: int, width: int) -> None:
    """Refuse an image without pixels, or with more than the kernels can count.

    Raises:
        ValueError: as said.
    """
    if height < 1 or width < 1 or height * width > _MOST_PIXELS:
        raise ValueError(
            f"images must have 1 .. {_MOST_PIXELS:,} pixels, got height {height}, width {width}"
        )


def is_bilinear(interpolation: InterpolationMode) -> bool:
    """Whether to interpolate bilinearly.

    Raises:
        ValueError: neither NEAREST nor BILINEAR.
    """
    if interpolation not in (InterpolationMode.NEAREST, InterpolationMode.BILINEAR):
        raise ValueError(f"interpolation must be NEAREST or BILINEAR, got {interpolation!r}")
    return bool(interpolation is InterpolationMode.BILINEAR)


def fill_per_channel(fill: float | Sequence[float], images: Tensor) -> tuple[float, ...]:
    """Fill values of each channel, in the scale of the images.

    Raises:
        TypeError: neither a number nor a sequence of numbers.
        ValueError: neither one value nor one per channel, or one outside of the images' range.
    """
    channels, high = images.shape[1], 1 if images.is_floating_point() else 255
    values = tuple(fill) if isinstance(fill, Sequence) else (fill,)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise TypeError(f"fill must be a number or a sequence of numbers, got {fill!r}")
    if len(values) not in (1, channels):
        raise ValueError(f"fill must hold one value or one per channel ({channels}), got {fill!r}")
    if not all(math.isfinite(value) and 0 <= value <= high for value in values):
        raise ValueError(f"fill must lie in 0 .. {high} for {images.dtype} images, got {fill!r}")
    return values if len(values) == channels else values * channels
