"""Search spaces: which operations there are, and what each magnitude bin means (Table 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ola_augment.operation import Operation, inside, whole

__all__ = ["Operation", "SearchSpace", "named_space"]

_LARGEST_BINS = 10**4
_TRANSLATED: tuple[tuple[str, Literal["width", "height"]], ...] = (
    ("translate_x", "width"),
    ("translate_y", "height"),
)


@dataclass(frozen=True)
class SearchSpace:
    """A table of operations and a number of magnitude bins.

    Args:
        operations: at least one, with distinct names. ``Actions.ops`` indexes this tuple.
        num_magnitude_bins: 2 .. 10,000.
        name: only for printing and for files.

    Raises:
        TypeError: an entry is not an :class:`Operation`, bins that are no int, a name no str.
        ValueError: no operation, a name that occurs twice, or a number of bins out of range.

    Example:
        >>> space = SearchSpace((Operation("identity"), Operation("rotate", 0, 30, signed=True)))
        >>> len(space), space.num_magnitude_bins
        (2, 31)

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
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
        bins = whole("num_magnitude_bins", self.num_magnitude_bins)
        if not 2 <= bins <= _LARGEST_BINS:
            raise ValueError(
                f"num_magnitude_bins must be at least 2 and at most {_LARGEST_BINS:,}, got {bins}"
            )
        if not isinstance(self.name, str):
            raise TypeError(f"name of a space must be a str, got {self.name!r}")
        object.__setattr__(self, "num_magnitude_bins", bins)
        object.__setattr__(self, "operations", operations)

    def __len__(self) -> int:
        return len(self.operations)

    def __hash__(self) -> int:
        # Not over all operations: tables are looked up by space for every image.
        return hash((self.name, self.num_magnitude_bins, len(self.operations)))

    @classmethod
    def rand_augment(cls, num_magnitude_bins: int = 31) -> SearchSpace:
        """RA, the 14 operations of RandAugment (left column of the paper's Table 3).

        Args:
            num_magnitude_bins: 2 .. 10,000.

        Returns:
            The space, named ``"rand_augment"``.
        """
        return cls(
            _shared(degrees=30, bits=4, factors=(0.1, 1.9), shear=0.3, pixels=10),
            num_magnitude_bins,
            "rand_augment",
        )

    @classmethod
    def wide_long(cls, num_magnitude_bins: int = 31) -> SearchSpace:
        """WideLong, 19 operations with wide ranges (right column of the paper's Table 3).

        Images are translated by up to their whole side, as in the paper, whose images have 32
        pixels, and by no more than 32 pixels where they are larger, as in TrivialAugment: half of
        an image of 224 pixels uncovered on average, and nothing but black at the far end, would
        keep no label.

        Args:
            num_magnitude_bins: 2 .. 10,000.

        Returns:
            The space, named ``"wide_long"``.
        """
        more = (
            Operation("blur"),
            Operation("invert"),
            Operation("flip_lr"),
            Operation("flip_ud"),
            # 0.6 of the width; as 6 pixels in 10 it stays exact.
            Operation("cutout", 0, 6, integer=True, side="width", per=10),
        )
        return cls(
            _shared(135, 6, (0.01, 2.0), 0.99, pixels=32, up_to=32) + more,
            num_magnitude_bins,
            "wide_long",
        )

    @classmethod
    def trivial_augment(cls, num_magnitude_bins: int = 31) -> SearchSpace:
        """The 14 operations of TrivialAugment as torchvision has them (TrivialAugmentWide).

        Images of any size are translated by at most 32 pixels. The enhancing operations reach as
        far to either side of 1 over the bins, where torchvision draws a sign.

        Args:
            num_magnitude_bins: 2 .. 10,000.

        Returns:
            The space, named ``"trivial_augment"``.
        """
        wide = _shared(degrees=135, bits=6, factors=(0.01, 1.99), shear=0.99, pixels=32)
        changed = {
            "rotate": Operation("rotate", 0, 135, signed=True),
            "solarize": Operation("solarize", 255, 0),
        } | {
            name: Operation(name, 0, 32, integer=True, signed=True)
            for name in ("translate_x", "translate_y")
        }
        operations = tuple(changed.get(operation.name, operation) for operation in wide)
        return cls(operations, num_magnitude_bins, "trivial_augment")

    def magnitudes(self, height: int, width: int) -> Tensor:
        """Every magnitude of the space for images of one size, without signs.

        Args:
            height: of the images, in pixels.
            width: of the images, in pixels.

        Returns:
            (A, num_magnitude_bins) float64; row i belongs to ``operations[i]``. Shared between
            calls: do not write into it.

        Raises:
            ValueError: a magnitude that scales with the image leaves what its operation accepts,
                or a side below 1.
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
    makers = {
        "rand_augment": SearchSpace.rand_augment,
        "wide_long": SearchSpace.wide_long,
        "trivial_augment": SearchSpace.trivial_augment,
    }
    if space not in makers:
        raise ValueError(f"unknown space {space!r}; known are {', '.join(makers)}")
    return makers[space](num_magnitude_bins)


def _shared(
    degrees: int,
    bits: int,
    factors: tuple[float, float],
    shear: float,
    pixels: int,
    up_to: int | None = None,
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
        *(
            Operation(name, 0, pixels, integer=True, signed=True, side=side, up_to=up_to)
            for name, side in _TRANSLATED
        ),
    )


@lru_cache(maxsize=64)
def _magnitude_table(space: SearchSpace, height: int, width: int) -> Tensor:
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    bins = space.num_magnitude_bins
    rows = []
    for operation in space.operations:
        row = [operation.magnitude(k, bins, height, width) for k in range(bins)]
        domain = operation.domain
        if domain and not inside(domain, (min(row), max(row)), operation.signed):
            raise ValueError(
                f"operation {operation.name!r} accepts magnitudes in [{domain[0]:g}, "
                f"{domain[1]:g}], for images of {height} x {width} they reach "
                f"{min(row):g} .. {max(row):g}"
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
