"""Search spaces: which operations there are, and what each magnitude bin means (Table 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]

#: Built-in operations and the magnitudes each accepts, both ends included; None: no magnitude.
DOMAINS: dict[str, tuple[float, float] | None] = {
    "identity": None,
    "auto_contrast": None,
    "equalize": None,
    "rotate": (-math.inf, math.inf),
    "solarize": (0, 256),
    "color": (0, math.inf),
    "posterize": (0, 8),
    "contrast": (0, math.inf),
    "brightness": (0, math.inf),
    "sharpness": (0, math.inf),
    "shear_x": (-math.inf, math.inf),
    "shear_y": (-math.inf, math.inf),
    "translate_x": (-math.inf, math.inf),
    "translate_y": (-math.inf, math.inf),
    "blur": None,
    "invert": None,
    "flip_lr": None,
    "flip_ud": None,
    "cutout": (0, math.inf),
}


@dataclass(frozen=True)
class Operation:
    """An image operation and its range of magnitudes.

    The magnitude of bin k out of ``num_bins`` is ``low + (high - low) * k / (num_bins - 1)``. With
    ``integer`` the distance from ``low`` is truncated to a whole number. With ``side`` it is a
    number of pixels that grows with that side of the image: ``high`` is for a side of ``per``.

    Args:
        name: one of the built-in operations (the keys of :data:`DOMAINS`, named as in the paper's
            Table 3), or any other name together with a ``kernel``.
        low: magnitude of bin 0; None (with ``high``) for an operation that takes no magnitude.
        high: magnitude of the last bin.
        integer: truncate toward ``low``, for degrees, bits, thresholds and pixels.
        signed: negate the magnitude with probability 1/2.
        side: ``"width"`` or ``"height"`` for magnitudes in pixels that scale with the image.
        per: the side in pixels that ``high`` is given for.
        kernel: a user's own operation, ``kernel(images, magnitudes) -> images``, called with
            float32 images (n, C, H, W) in [0, 1] and signed magnitudes (n,) float32 (zeros
            without a magnitude). The result, of the same shape, is clamped to [0, 1].

    Raises:
        ValueError: the name is unknown and has no kernel, the magnitudes are not finite, only one
            end is given, or an end is outside what the operation accepts.
        TypeError: the kernel is not callable.
    """

    name: str
    low: float | None = None
    high: float | None = None
    integer: bool = False
    signed: bool = False
    side: Literal["width", "height"] | None = None
    per: int = 32
    kernel: Kernel | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kernel is not None and not callable(self.kernel):
            raise TypeError(f"kernel of operation {self.name!r} must be callable: {self.kernel!r}")
        if self.kernel is None and self.name not in DOMAINS:
            raise ValueError(
                f"unknown operation {self.name!r}; built in are {', '.join(DOMAINS)}; "
                "for your own operation pass kernel=..."
            )
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"operation {self.name!r}: give both low and high or neither, "
                f"got low={self.low}, high={self.high}"
            )
        if self.side not in (None, "width", "height"):
            raise ValueError(
                f"operation {self.name!r}: side must be 'width', 'height' or None, "
                f"got {self.side!r}"
            )
        if self.per < 1:
            raise ValueError(f"operation {self.name!r}: per must be at least 1, got {self.per}")
        self._check_domain()

    def _check_domain(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        if not all(math.isfinite(end) for end in ends):
            raise ValueError(f"operation {self.name!r}: magnitudes must be finite, got {ends}")
        if self.kernel is not None:
            return
        domain = DOMAINS[self.name]
        if domain is None:
            if ends or self.signed:
                raise ValueError(f"operation {self.name!r} takes no magnitude and no sign")
            return
        if not ends:
            raise ValueError(f"operation {self.name!r} needs magnitudes: pass low and high")
        reached = [-end for end in ends] + ends if self.signed else ends
        if not all(domain[0] <= end <= domain[1] for end in reached):
            raise ValueError(
                f"operation {self.name!r} accepts magnitudes in [{domain[0]}, {domain[1]}], "
                f"got low={self.low}, high={self.high}, signed={self.signed}"
            )

    def magnitude(self, magnitude_bin: int, num_bins: int, height: int, width: int) -> float:
        """Magnitude of a bin, without its sign; 0.0 where the operation takes none.

        Args:
            magnitude_bin: 0 .. num_bins - 1.
            num_bins: how many bins the search space has.
            height: of the image, in pixels.
            width: of the image, in pixels.
        """
        if self.low is None or self.high is None:
            return 0.0
        span, steps = self.high - self.low, float(num_bins - 1)
        if self.side is not None:
            span *= width if self.side == "width" else height
            steps *= self.per
        # Multiplied before divided: k * (span / steps) can fall just under a whole number.
        distance = span * magnitude_bin / steps
        return self.low + (int(distance) if self.integer else distance)


@dataclass(frozen=True)
class SearchSpace:
    """A table of operations and a number of magnitude bins.

    Args:
        operations: at least one, with distinct names. ``Actions.ops`` indexes this tuple.
        num_magnitude_bins: at least 2.
        name: only for printing and for files.

    Raises:
        TypeError: an entry is not an :class:`Operation`.
        ValueError: no operation, a name that occurs twice, or fewer than 2 bins.

    Example:
        >>> space = SearchSpace((Operation("identity"), Operation("rotate", 0, 30, signed=True)))
        >>> len(space), space.num_magnitude_bins
        (2, 31)
    """

    operations: tuple[Operation, ...]
    num_magnitude_bins: int = 31
    name: str = "custom"

    def __post_init__(self) -> None:
        operations = tuple(self.operations)
        for operation in operations:
            if not isinstance(operation, Operation):
                raise TypeError(f"operations must be Operation objects, got {operation!r}")
        names = [operation.name for operation in operations]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"operations must be at least one, with distinct names; got {names}")
        if isinstance(self.num_magnitude_bins, bool) or not isinstance(
            self.num_magnitude_bins, int
        ):
            raise TypeError(f"num_magnitude_bins must be an int, got {self.num_magnitude_bins!r}")
        if self.num_magnitude_bins < 2:
            raise ValueError(f"num_magnitude_bins must be at least 2: {self.num_magnitude_bins}")
        object.__setattr__(self, "operations", operations)

    def __len__(self) -> int:
        return len(self.operations)

    @classmethod
    def rand_augment(cls, num_magnitude_bins: int = 31) -> SearchSpace:
        """RA, the 14 operations of RandAugment (left column of the paper's Table 3)."""
        return cls(
            _shared(degrees=30, bits=4, factors=(0.1, 1.9), shear=0.3, pixels=10),
            num_magnitude_bins,
            "rand_augment",
        )

    @classmethod
    def wide_long(cls, num_magnitude_bins: int = 31) -> SearchSpace:
        """WideLong, 19 operations with wide ranges (right column of the paper's Table 3)."""
        more = (
            Operation("blur"),
            Operation("invert"),
            Operation("flip_lr"),
            Operation("flip_ud"),
            # 0.6 of the width; as 6 pixels in 10 it stays exact.
            Operation("cutout", 0, 6, integer=True, side="width", per=10),
        )
        return cls(
            _shared(degrees=135, bits=6, factors=(0.01, 2.0), shear=0.99, pixels=32) + more,
            num_magnitude_bins,
            "wide_long",
        )

    def magnitudes(self, height: int, width: int) -> Tensor:
        """Every magnitude of the space for images of one size, without signs.

        Returns:
            (A, num_magnitude_bins) float64; row i belongs to ``operations[i]``. Shared between
            calls: do not write into it.
        """
        return _magnitude_table(self, height, width)

    def __str__(self) -> str:
        bins = (0, (self.num_magnitude_bins - 1) // 2, self.num_magnitude_bins - 1)
        rows = [("operation", *(f"bin {k}" for k in bins), "signed")]
        for operation in self.operations:
            shown = ["-"] * 3
            if operation.low is not None:
                values = (operation.magnitude(k, self.num_magnitude_bins, 32, 32) for k in bins)
                unit = " px" if operation.side else ""
                shown = [f"{value:.4g}{unit}" for value in values]
            rows.append((operation.name, *shown, "yes" if operation.signed else "no"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.ljust(size) if column == 0 else cell.rjust(size)
                for column, (cell, size) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        title = (
            f"SearchSpace {self.name!r}: {len(self)} operations, "
            f"{self.num_magnitude_bins} magnitude bins (pixels for 32x32 images)"
        )
        return "\n".join([title, *lines])


def named_space(space: str | SearchSpace, num_magnitude_bins: int = 31) -> SearchSpace:
    """Look up a search space by name; a :class:`SearchSpace` is returned as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a space.
    """
    if isinstance(space, SearchSpace):
        return space
    if not isinstance(space, str):
        raise TypeError(f"space must be a name or a SearchSpace, got {type(space).__name__}")
    makers = {"rand_augment": SearchSpace.rand_augment, "wide_long": SearchSpace.wide_long}
    if space not in makers:
        raise ValueError(f"unknown space {space!r}; known are {', '.join(makers)}")
    return makers[space](num_magnitude_bins)


def _shared(
    degrees: int, bits: int, factors: tuple[float, float], shear: float, pixels: int
) -> tuple[Operation, ...]:
    """Build the 14 operations that both spaces have, in the order of Table 3."""
    return (
        Operation("identity"),
        Operation("auto_contrast"),
        Operation("equalize"),
        Operation("rotate", 0, degrees, integer=True, signed=True),
        Operation("solarize", 256, 0, integer=True),
        Operation("color", *factors),
        Operation("posterize", 8, 8 - bits, integer=True),
        Operation("contrast", *factors),
        Operation("brightness", *factors),
        Operation("sharpness", *factors),
        Operation("shear_x", 0, shear, signed=True),
        Operation("shear_y", 0, shear, signed=True),
        Operation("translate_x", 0, pixels, integer=True, signed=True, side="width"),
        Operation("translate_y", 0, pixels, integer=True, signed=True, side="height"),
    )


@lru_cache(maxsize=64)
def _magnitude_table(space: SearchSpace, height: int, width: int) -> Tensor:
    bins = range(space.num_magnitude_bins)
    return torch.tensor(
        [
            [op.magnitude(k, space.num_magnitude_bins, height, width) for k in bins]
            for op in space.operations
        ],
        dtype=torch.float64,
    )
