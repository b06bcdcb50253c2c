"""What the kernels accept; numba's read and write without bounds: nothing else may reach them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

Fill = float | Sequence[float] | None

#: Floating images may leave [0, 1] by this much and are clamped. The most that bicubic resizing
#: (torch's, a = -0.75) can add is 0.445 at either end.
OVERSHOOT = 0.5

#: Pixels are indexed by 32-bit integers.
_MOST_PIXELS = 2**31 - 1
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MODES = {
    InterpolationMode.NEAREST: False,
    # The same for an affine matrix: they differ where an image is resized.
    InterpolationMode.NEAREST_EXACT: False,
    InterpolationMode.BILINEAR: True,
}
_PILLOW = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR}


def check_images(images: Tensor, *, values: bool = True) -> None:
    """Refuse what is no image.

    Args:
        images: (..., C, H, W).
        values: look at the values of floating images too.

    Raises:
        TypeError: no tensor, or another dtype than uint8, float16, bfloat16, float32, float64.
        ValueError: another shape than (..., C, H, W) with C 1 or 3 and at least one pixel, or
            floats that leave [0, 1] by more than :data:`OVERSHOOT`, NaN included.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and images.dtype not in _FLOATING:
        raise TypeError(
            f"images must be uint8 or floating in [0, 1], got {images.dtype}; convert them before, "
            "integers with torchvision's v2.ToDtype(torch.uint8, scale=True)"
        )
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"images must have shape (..., C, H, W) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    check_size(*images.shape[-2:])
    if images.dtype == torch.uint8 or not images.numel() or not values:
        return
    low, high = (float(end) for end in images.detach().aminmax())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise ValueError(
            f"floating images must lie in [0, 1] (up to {OVERSHOOT} outside is clamped), got "
            f"{low!r} .. {high!r}; scale them (divide by 255) or pass uint8"
        )


def check_size(height: int, width: int) -> None:
    """Refuse an image without pixels, or with more than the kernels can count.

    Raises:
        ValueError: as said.
    """
    if height < 1 or width < 1 or height * width > _MOST_PIXELS:
        raise ValueError(
            f"images must have 1 .. {_MOST_PIXELS:,} pixels, got height {height}, width {width}"
        )


def as_interpolation(interpolation: InterpolationMode | str | int) -> InterpolationMode:
    """An interpolation in any of torchvision's forms: a mode, its name, or Pillow's number.

    Raises:
        ValueError: none of NEAREST, NEAREST_EXACT and BILINEAR.
    """
    mode: Any = interpolation
    if isinstance(mode, str):
        mode = next((known for known in _MODES if known.value == mode), mode)
    elif isinstance(mode, int) and not isinstance(mode, bool):
        mode = _PILLOW.get(mode, mode)
    if not isinstance(mode, InterpolationMode) or mode not in _MODES:
        raise ValueError(
            "interpolation must be NEAREST or BILINEAR (NEAREST_EXACT is taken for NEAREST), got "
            f"{interpolation!r}; the kernels have no other"
        )
    return mode


def is_bilinear(interpolation: InterpolationMode | str | int) -> bool:
    """Whether to interpolate bilinearly.

    Raises:
        ValueError: as :func:`as_interpolation`.
    """
    return _MODES[as_interpolation(interpolation)]


def as_fill(fill: Fill) -> tuple[float, ...]:
    """A fill for some image as plain numbers, one for all channels or one for each; None is black.

    Raises:
        TypeError: neither a number nor a sequence of numbers.
        ValueError: neither one value nor three, or one outside 0 .. 255.
    """
    values = (0.0,) if fill is None else tuple(fill) if isinstance(fill, Sequence) else (fill,)
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise TypeError(f"fill must be a number or a sequence of numbers, got {fill!r}")
    if len(values) not in (1, 3):
        raise ValueError(f"fill must hold one value or one per channel (1 or 3), got {fill!r}")
    if not all(0 <= value <= 255 for value in values):
        raise ValueError(f"fill must lie in 0 .. 255, got {fill!r}")
    return tuple(float(value) for value in values)


@lru_cache(maxsize=256)
def fill_per_channel(fill: tuple[float, ...], channels: int, whole: bool) -> tuple[float, ...]:
    """The values of :func:`as_fill` for each channel of an image, in its scale.

    Args:
        fill: what :func:`as_fill` gives.
        channels: of the image.
        whole: uint8, where fractions are truncated, not floating.

    Raises:
        ValueError: not one value nor one per channel, or the scale of the other kind of images:
            above 1 for floating ones, a fraction below 1 for uint8.
    """
    if len(fill) not in (1, channels):
        raise ValueError(f"fill must hold one value or one per channel ({channels}), got {fill}")
    if not whole and max(fill) > 1:
        raise ValueError(f"fill must lie in 0 .. 1 for floating images, got {fill}")
    if whole and any(0 < value < 1 for value in fill):
        raise ValueError(f"fill must be 0 or lie in 1 .. 255 for uint8 images, got {fill}")
    return fill if len(fill) == channels else fill * channels
