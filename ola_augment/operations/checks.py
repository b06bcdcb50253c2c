"""What the kernels accept; numba's read and write without bounds: nothing else may reach them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment.kernels.functional import unwrapped
from ola_augment.kernels.pixel_format import DTYPES, PixelFormat, ValueRange
from ola_augment.space import SearchSpace

Fill = float | Sequence[float] | None

#: How far outside of [0, 1] the values of a batch may lie on average. Bicubic resizing (torch's,
#: a = -0.75) leaves 0.001 in photographs, 0.015 in drawn digits and 0.034 in black and white noise.
OVERSHOOT = 0.035

#: What a fill may be where no ``value_range`` says more.
_WIDEST = (0, 65535)

#: Pixels are indexed by 32-bit integers, those of a border of one pixel too.
_MOST_PIXELS = 2**31 - 1
_MODES = {
    InterpolationMode.NEAREST: False,
    # The same for an affine matrix: they differ where an image is resized.
    InterpolationMode.NEAREST_EXACT: False,
    InterpolationMode.BILINEAR: True,
}
_PILLOW = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR}


def check_images(images: Tensor) -> None:
    """Refuse what is no image, by its type, dtype and shape.

    Args:
        images: (..., C, H, W).

    Raises:
        TypeError: no tensor, of a dtype that there are no kernels for, or inside of ``vmap``.
        ValueError: another shape than (..., C, H, W) with at least one channel and pixel.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    unwrapped(images)
    if images.is_nested or images.layout != torch.strided or images.device.type == "meta":
        raise TypeError(_no_dense_values(images))
    if images.dtype not in DTYPES:
        raise TypeError(other_dtype(images.dtype))
    check_shape(tuple(images.shape))


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse another shape than (..., C, H, W) with at least one channel and pixel.

    Raises:
        ValueError: as said.
    """
    if len(shape) < 3 or shape[-3] < 1:
        raise ValueError(
            f"images must have shape (..., C, H, W) with 1 or more channels, got {shape}"
        )
    check_size(*shape[-2:])


def _no_dense_values(images: Tensor) -> str:
    if images.is_nested:
        return "images must be a dense tensor, got a nested one; list(images.unbind()) is a list"
    if images.device.type == "meta":
        return "images must have values, those on the device meta have none"
    return f"images must be a dense tensor, got {images.layout}; images.to_dense() is one"


def other_dtype(dtype: torch.dtype, *, array: bool = False) -> str:
    """Why a dtype is refused, and what to do.

    Args:
        dtype: that images must not have.
        array: they are NumPy's.
    """
    name = "image" if array else "images"
    in_bytes = f"{name}.astype(np.uint8)" if array else f"{name}.to(torch.uint8)"
    in_floats = f"{name}.astype(np.float32)" if array else f"{name}.float()"
    if dtype == torch.bool:
        way = f"{in_bytes} * 255 is black and white; a mask is wrapped in tv_tensors.Mask({name})"
    elif dtype.is_complex:
        way = f"abs({name}) is real"
    elif dtype.is_floating_point:
        way = in_floats
    else:
        in_shorts = in_bytes.replace("uint8", "int16")
        way = (
            f"levels of 0 .. 255, as Hugging Face's array columns hold them in int64, become "
            f"{in_bytes}; others are scaled to [0, 1], ({in_floats} - low) / (high - low), or, if "
            f"16 bits hold them, become {in_shorts} or uint16 with value_range=(low, high)"
        )
    return (
        f"{name} must be uint8, uint16, int16 with a value_range, or floating, got {dtype}; {way}"
    )


def check_scale(batch: Sequence[Tensor], pixels: PixelFormat) -> None:
    """Refuse floating images whose values plainly mean another scale than their range.

    What resizing leaves outside is kept as it came: decided for all images together, so that one of
    many does not end an epoch.

    Args:
        batch: tensors of any shape; those of integers are passed over.
        pixels: what they are.

    Raises:
        ValueError: values that lie outside of the range by more than :data:`OVERSHOOT` of it on
            average, or that are NaN or infinite.
    """
    floats = [x.detach() for x in batch if x.is_floating_point() and x.numel()]
    if not floats:
        return
    ends = [x.aminmax() for x in floats]
    low, high = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    if all(bool(x.isfinite()) for end in ends for x in end):
        most = OVERSHOOT * (pixels.high - pixels.low)
        if low >= pixels.low - most and high <= pixels.high + most:
            return
        beyond = [(x - x.clamp(pixels.low, pixels.high)).abs().float() for x in floats]
        count = sum(x.numel() for x in floats)
        if sum(float(x.mean()) * x.numel() for x in beyond) / count <= most:
            return
        share = 100 * sum(int((x > 0).sum()) for x in beyond) / count
        raise ValueError(
            f"floating images must lie in [{pixels.low:g}, {pixels.high:g}], got {low:.6g} .. "
            f"{high:.6g}, {share:.3g} % of the values outside: more than resizing leaves; levels "
            "of 0 .. 255 are divided by 255, another range is said by value_range=(low, high), and "
            "normalising by mean and deviation comes after augmenting"
        )
    count = sum(int((~x.isfinite()).sum()) for x in floats)
    share = 100 * count / sum(x.numel() for x in floats)
    raise ValueError(
        f"floating images must be finite, got NaN or infinite in {share:.3g} % of the values; if "
        "these mean missing pixels, replace them by 0 (nan_to_num of torch and NumPy) and, to know "
        "them afterwards, pass a tv_tensors.Mask of where they were beside the images"
    )


def check_size(height: int, width: int) -> None:
    """Refuse an image without pixels, or with more than the kernels can count, border included.

    Raises:
        ValueError: as said.
    """
    if height < 1 or width < 1 or (height + 2) * (width + 2) > _MOST_PIXELS:
        raise ValueError(
            f"images must have 1 pixel or more, and with a border of one at most {_MOST_PIXELS:,} "
            f"pixels, got height {height}, width {width}"
        )


@lru_cache(maxsize=256)
def check_channels(space: SearchSpace, channels: int) -> None:
    """Refuse images that some kernel of a user's own says it cannot take, drawn or not.

    Raises:
        ValueError: what its method ``check_channels`` raised.
    """
    for operation in space.operations:
        check = getattr(operation.kernel, "check_channels", None)
        if check is not None:
            check(channels)


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


def as_fill(fill: Fill, value_range: ValueRange | None = None) -> tuple[float, ...]:
    """A fill for some image as plain numbers, one for all channels or one for each; None: no one.

    Raises:
        TypeError: neither a number nor a sequence of numbers.
        ValueError: an empty sequence, or a value that no image can hold.
    """
    if fill is None:
        return ()
    values = tuple(fill) if isinstance(fill, Sequence) else (fill,)
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise TypeError(f"fill must be a number or a sequence of numbers, got {fill!r}")
    if not values:
        raise ValueError(f"fill must hold one value or one per channel, got {fill!r}")
    low, high = value_range or _WIDEST
    if not all(low <= value <= high for value in values):
        raise ValueError(f"fill must lie in {low:g} .. {high:g}, got {fill!r}")
    return tuple(float(value) for value in values)


@lru_cache(maxsize=256)
def fill_per_channel(fill: tuple[float, ...], pixels: PixelFormat) -> tuple[float, ...]:
    """The values of :func:`as_fill` for each channel of an image, in its scale; black by default.

    Args:
        fill: what :func:`as_fill` gives.
        pixels: what the images are.

    Raises:
        ValueError: not one value nor one per channel, or the scale of the other kind of images:
            above 1 for floating ones, a fraction below 1 for integers.
    """
    channels = pixels.channels
    if not fill:
        return (pixels.low,) * channels
    if len(fill) not in (1, channels):
        raise ValueError(f"fill must hold one value or one per channel ({channels}), got {fill}")
    images = f"{pixels.dtype}".removeprefix("torch.") if pixels.whole else "floating"
    if not all(pixels.low <= value <= pixels.high for value in fill):
        raise ValueError(
            f"fill must lie in {pixels.low:g} .. {pixels.high:g} for {images} images, got {fill}"
        )
    if pixels.whole and any(0 < value < 1 for value in fill):
        raise ValueError(
            f"fill must be {pixels.low:g} or lie in 1 .. {pixels.high:g} for {images} images, got "
            f"{fill}"
        )
    return fill if len(fill) == channels else fill * channels
