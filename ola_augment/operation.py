"""Operation: one image operation and the range of its magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from ola_augment.kernels.table import TABLE

Kernel = Callable[..., Tensor]
MatrixFunction = Callable[[Tensor, int, int], Tensor]

#: For a user's own operation, whose kernel gets them in single precision.
_OWN_DOMAIN = (-1e30, 1e30)
_LARGEST_PER = 10**6


@dataclass(frozen=True)
class Operation:
    """An image operation and its range of magnitudes.

    The magnitude of bin k out of ``num_bins`` is ``low + (high - low) * k / (num_bins - 1)``. With
    ``integer`` the distance from ``low`` is truncated to a whole number. With ``side`` it is a
    number of pixels that grows with that side of the image, no further than up to ``up_to``:
    ``high`` is for a side of ``per``.

    Args:
        name: one of the built-in operations (the keys of ``ola_augment.kernels.table.TABLE``, named
            as in the paper's Table 3), or any other name together with a ``kernel`` or ``matrix``.
        low: magnitude of bin 0; None (with ``high``) for an operation that takes no magnitude.
        high: magnitude of the last bin.
        integer: truncate toward ``low``, for degrees, bits, thresholds and pixels.
        signed: negate the magnitude with probability 1/2.
        side: ``"width"`` or ``"height"`` for magnitudes in pixels that scale with the image.
        per: the side in pixels that ``high`` is given for, 1 .. 1,000,000.
        up_to: the side in pixels up to which magnitudes grow, 1 .. 1,000,000: larger images get
            those of this side; None: they grow with any side.
        kernel: a user's own operation, ``kernel(images, magnitudes) -> images``, called with
            float32 images (n, C, H, W), their range brought and clamped to [0, 1], and signed
            magnitudes (n,) float32 (zeros without a magnitude). The result, of the same shape, is
            floating and clamped to [0, 1] where it differs from the images, or uint8, whose levels
            are 0 .. 255; other dtypes and scales, and NaN, are refused. A kernel that does not take
            any number of channels may have a method ``check_channels(channels)`` that raises a
            ValueError for others: it is asked before anything is drawn. One that takes a part of
            the image away may have ``erases = True`` and ``erased(magnitudes, centers, height,
            width)``, which pixels as (n, height, width) bool: masks lose them as well, if there is
            a ``matrix``, too (of (n, 2, 3) identities, where nothing moves).
        matrix: a user's own geometric operation, ``matrix(magnitudes, height, width) -> matrices``,
            called with signed magnitudes (n,) float64. Row by row the result, (n, 2, 3), says which
            point of the image each point (x, y) of the result shows: ``matrix @ (x, y, 1)``, in
            pixels whose centres lie at + 0.5, as in ``PIL.Image.transform`` with AFFINE. Images,
            masks, boxes and points follow it; together with a ``kernel`` that moves the image,
            only the others do.
        random: whether the ``kernel`` has randomness of its own. It then gets a third argument,
            (n, 2) float32 in [0, 1), drawn for each image and slot and recorded in
            ``Actions.centers``: a kernel that computes all its randomness from them is replayed.

    Raises:
        ValueError: the name is unknown and has neither kernel nor matrix, the magnitudes are not
            finite, only one end is given, an end is outside what the operation accepts, ``side``
            for magnitudes that are no pixels, ``per`` out of range, or ``random`` without a
            ``kernel``.
        TypeError: an argument of another type, or a function that is not callable and hashable.

    Example:
        >>> Operation("rotate", 0, 135, integer=True, signed=True).magnitude(30, 31, 32, 32)
        135
        >>> def gamma(images, magnitudes):
        ...     return images ** magnitudes.view(-1, 1, 1, 1)
        >>> Operation("gamma", 0.5, 2.0, kernel=gamma).domain
        (-1e+30, 1e+30)
    """

    name: str
    low: float | None = None
    high: float | None = None
    integer: bool = False
    signed: bool = False
    side: Literal["width", "height"] | None = None
    per: int = 32
    kernel: Kernel | None = field(default=None, repr=False)
    matrix: MatrixFunction | None = field(default=None, repr=False)
    random: bool = False
    up_to: int | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        self._check_types()
        own = f"operation {self.name!r}"
        if not self._has_own_function and self.name not in TABLE:
            raise ValueError(
                f"unknown {own}; built in are {', '.join(TABLE)}; "
                "for your own operation pass kernel=... or matrix=..."
            )
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"{own}: give both low and high or neither, got low={self.low}, high={self.high}"
            )
        if self.side not in (None, "width", "height"):
            raise ValueError(f"{own}: side must be 'width', 'height' or None, got {self.side!r}")
        if not 1 <= self.per <= _LARGEST_PER:
            raise ValueError(f"{own}: per must lie in 1 .. {_LARGEST_PER:,}, got {self.per}")
        if self.up_to is not None and (self.side is None or not 1 <= self.up_to <= _LARGEST_PER):
            raise ValueError(
                f"{own}: up_to must lie in 1 .. {_LARGEST_PER:,} and needs a side, got {self.up_to}"
            )
        if self.random and self.kernel is None:
            raise ValueError(f"{own}: random is for a kernel of your own, pass kernel=...")
        self._check_domain()
        if self.side is not None and (
            self.low is None or not (self._has_own_function or TABLE[self.name].unit == "px")
        ):
            raise ValueError(f"{own}: side is for magnitudes in pixels, got side={self.side!r}")

    def _check_types(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name of an operation must be a str, got {self.name!r}")
        own = f"operation {self.name!r}"
        for end in ("low", "high"):
            if (value := getattr(self, end)) is not None:
                object.__setattr__(self, end, _finite(f"{own}: {end}", value))
        for flag in ("integer", "signed", "random"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{own}: {flag} must be a bool, got {getattr(self, flag)!r}")
        object.__setattr__(self, "per", whole(f"{own}: per", self.per))
        if self.up_to is not None:
            object.__setattr__(self, "up_to", whole(f"{own}: up_to", self.up_to))
        for function in ("kernel", "matrix"):
            value = getattr(self, function)
            if value is not None and not callable(value):
                raise TypeError(f"{function} of {own} must be callable: {value!r}")
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"{function} of {own} must be hashable, as functions and modules are, got a "
                    f"{type(value).__name__}"
                ) from None

    @property
    def _has_own_function(self) -> bool:
        return self.kernel is not None or self.matrix is not None

    def _check_domain(self) -> None:
        own = f"operation {self.name!r}"
        domain = self.domain
        if domain is None:
            if self.low is not None or self.signed:
                raise ValueError(f"{own} takes no magnitude and no sign")
            return
        if self.low is None:
            if not self._has_own_function:
                raise ValueError(f"{own} needs magnitudes: pass low and high")
            return
        assert self.high is not None
        if not inside(domain, (self.low, self.high), self.signed):
            raise ValueError(
                f"{own} accepts magnitudes in [{domain[0]:g}, {domain[1]:g}], "
                f"got low={self.low}, high={self.high}, signed={self.signed}"
            )

    @property
    def domain(self) -> tuple[float, float] | None:
        """Ends of the magnitudes that are accepted, signs included; None: takes no magnitude."""
        return _OWN_DOMAIN if self._has_own_function else TABLE[self.name].domain

    def magnitude(self, magnitude_bin: int, num_bins: int, height: int, width: int) -> float:
        """Magnitude of a bin, without its sign; 0.0 where the operation takes none.

        Args:
            magnitude_bin: 0 .. num_bins - 1.
            num_bins: how many bins the search space has.
            height: of the image, in pixels.
            width: of the image, in pixels.

        Returns:
            In the operation's own unit: degrees, pixels, bits, grey levels or a factor.

        Raises:
            ValueError: there is no such bin.
        """
        if not 0 <= magnitude_bin < num_bins or num_bins < 2:
            raise ValueError(
                f"magnitude_bin must lie in 0 .. num_bins - 1 of at least 2 bins, "
                f"got {magnitude_bin} of {num_bins}"
            )
        if self.low is None:
            return 0.0
        assert self.high is not None
        if magnitude_bin == num_bins - 1 and self.side is None and not self.integer:
            return self.high  # computed, it may lie an ulp outside of what is accepted
        span, steps = self.high - self.low, float(num_bins - 1)
        if self.side is not None:
            reach = width if self.side == "width" else height
            span *= reach if self.up_to is None else min(reach, self.up_to)
            steps *= self.per
        # Multiplied before divided: k * (span / steps) can fall just under a whole number.
        distance = span * magnitude_bin / steps
        return self.low + (int(distance) if self.integer else distance)


def inside(domain: tuple[float, float], ends: tuple[float, float], signed: bool) -> bool:
    """Whether magnitudes lie in a domain, negated too if they are signed."""
    reached = (*ends, *(-end for end in ends)) if signed else ends
    return all(domain[0] <= end <= domain[1] for end in reached)


def _finite(name: str, value: Any) -> float:
    """A plain number; ints stay ints.

    Raises:
        TypeError: no real number.
        ValueError: NaN, infinite, or too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        as_float = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer too large for a float") from None
    if not math.isfinite(as_float):
        raise ValueError(f"{name} must be finite, got {value}")
    return int(value) if isinstance(value, Integral) else as_float


def whole(name: str, value: Any) -> int:
    """A plain int.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)
