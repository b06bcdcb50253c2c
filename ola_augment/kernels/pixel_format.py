"""What the numbers of an image mean: the one description that every kernel is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import torch

ValueRange = tuple[float, float]

#: Ends of the range of each dtype, unless a ``value_range`` says others; None: it must.
DTYPES: dict[torch.dtype, ValueRange | None] = {
    torch.uint8: (0, 255),
    torch.uint16: (0, 65535),
    torch.int16: None,
    torch.float16: (0, 1),
    torch.bfloat16: (0, 1),
    torch.float32: (0, 1),
    torch.float64: (0, 1),
}
#: Floats beyond these would overflow in single precision.
_LARGEST, _NARROWEST = 1e30, 1e-30


@dataclass(frozen=True)
class PixelFormat:
    """Range, depth and channels of images, and how they become grey.

    Attributes:
        dtype: of the images.
        channels: of the images, all counted.
        low: what black is.
        high: what white is.
        alpha: whether the last channel is one: it moves and is cut out, colours leave it.
        grey: weights of the colour channels in the grey image, which add up to 1; None is Pillow's
            for three and the mean of all others.
    """

    dtype: torch.dtype
    channels: int
    low: float
    high: float
    alpha: bool = False
    grey: tuple[float, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether levels are integers, truncated where Pillow truncates."""
        return not self.dtype.is_floating_point

    @property
    def colors(self) -> int:
        """How many channels are no alpha."""
        return self.channels - self.alpha

    @property
    def white(self) -> float:
        """White, where black is 0: in levels of the range for integers, in 255ths for floats."""
        return self.high - self.low if self.whole else 255.0

    @property
    def of_bytes(self) -> bool:
        """Whether levels are those that Pillow's operations are defined on."""
        return self.dtype == torch.uint8 and (self.low, self.high) == (0, 255)

    @property
    def of_pillow(self) -> bool:
        """Whether Pillow itself has such an image, grey or of three colours."""
        return self.of_bytes and not self.alpha and self.grey is None and self.channels in (1, 3)


@lru_cache(maxsize=256)
def pixel_format(
    dtype: torch.dtype,
    channels: int,
    value_range: ValueRange | None = None,
    grey_weights: tuple[float, ...] | None = None,
    alpha: bool = False,
) -> PixelFormat:
    """Describe images.

    Args:
        dtype: one of :data:`DTYPES`.
        channels: at least 1.
        value_range: of :func:`as_value_range`.
        grey_weights: of :func:`as_grey_weights`.
        alpha: whether the last channel is one.

    Raises:
        TypeError: signed integers without a ``value_range``.
        ValueError: a range that the dtype does not hold, or not as many weights as colours.
    """
    ends = value_range or DTYPES[dtype]
    if ends is None:
        raise TypeError(
            f"{_name(dtype)} images have no black and white of their own: pass "
            "value_range=(low, high), such as (-1000, 2000) for CT; levels of 0 .. 255 become "
            "images.to(torch.uint8), of an array image.astype(np.uint8)"
        )
    if not dtype.is_floating_point:
        held = torch.iinfo(dtype)
        if not held.min <= ends[0] <= ends[1] <= held.max or any(end % 1 for end in ends):
            raise ValueError(
                f"value_range of {_name(dtype)} images must be whole, in {held.min} .. {held.max}, "
                f"got {ends}"
            )
    colors = channels - alpha
    if grey_weights is not None and len(grey_weights) != colors:
        raise ValueError(
            f"grey_weights must hold one weight per channel ({colors}), got {len(grey_weights)}"
        )
    grey = grey_weights if colors > 1 else None
    return PixelFormat(dtype, channels, float(ends[0]), float(ends[1]), alpha, grey)


def as_value_range(value_range: Any) -> ValueRange | None:
    """A range as two plain numbers; None stays None.

    Raises:
        TypeError: no two numbers.
        ValueError: not low < high, infinite, or too narrow or wide for single precision.
    """
    if value_range is None:
        return None
    low, high = _numbers("value_range", value_range, "two numbers (low, high)", 2)
    if not (low >= -_LARGEST and high <= _LARGEST and high - low >= _NARROWEST):
        raise ValueError(
            f"value_range must be (low, high) with low < high, within {_LARGEST:g}, got "
            f"({low!r}, {high!r})"
        )
    return low, high


def as_grey_weights(grey_weights: Any) -> tuple[float, ...] | None:
    """Weights of the channels as plain numbers that add up to 1; None stays None.

    Raises:
        TypeError: no sequence of numbers.
        ValueError: negative or infinite ones, or none above 0.
    """
    if grey_weights is None:
        return None
    weights = _numbers("grey_weights", grey_weights, "a sequence of numbers, one per channel")
    total = sum(weights)
    if not (min(weights, default=0) >= 0 and 0 < total < math.inf):
        raise ValueError(
            f"grey_weights must be 0 or more, finite, and not all 0, got {grey_weights!r}"
        )
    return tuple(weight / total for weight in weights)


def _numbers(name: str, value: Any, wanted: str, count: int | None = None) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    right = all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
    if not values or not right or len(values) != (count or len(values)):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    return tuple(v if isinstance(v, int) else float(v) for v in values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
