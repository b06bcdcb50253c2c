"""What executors are given: the rows of a program, and which of them each image goes through.

A row is one operation with one magnitude and sign, for images of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ola_augment.actions import Actions
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.pixel_format import PixelFormat
from ola_augment.operation import Operation

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Rendering(NamedTuple):
    """How steps are applied, the same for all of them.

    Attributes:
        fill: a value for each channel, in the scale of the images, for the pixels that a geometric
            operation uncovers; truncated for integers.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        pixels: what the images are.
    """

    fill: tuple[float, ...]
    bilinear: bool
    pixels: PixelFormat


@dataclass(frozen=True, eq=False)
class Program:
    """Rows of operations for images of one size, ready for the kernels.

    Attributes:
        operations: of a search space, or those of one image.
        height: of the images.
        width: of the images.
        of: (R,) int64, which operation a row is.
        kinds: (R,) int64, its :class:`Kind`; ``IDENTITY`` where it changes nothing.
        parameters: (R, 6) float64: the matrix of a geometric operation; otherwise the magnitude
            with its sign, then zeros.
        fixed: (R, 6) int64, of geometric operations: the source of the pixel in column x and row y
            is (f0 x + f1 y + f2, f3 x + f4 y + f5) >> 16, unless it is ``STEPPED``.
    """

    operations: tuple[Operation, ...]
    height: int
    width: int
    of: NDArray[np.int64]
    kinds: NDArray[np.int64]
    parameters: NDArray[np.float64]
    fixed: NDArray[np.int64]

    @cached_property
    def has_batched(self) -> bool:
        """Whether some operation has no compiled kernel."""
        return bool((self.kinds == Kind.BATCHED).any())

    def steps(self, actions: Actions) -> Steps:
        """What was drawn for each image from the space of this program."""
        ops, bins = actions.ops.numpy(), actions.magnitude_bins.numpy()
        count = len(self.of) // (2 * len(self.operations))
        rows = (ops * count + bins) * 2 + (actions.signs.numpy() < 0)
        rows = np.where(actions.keep.numpy(), rows, -1)
        return Steps(self, rows, np.ascontiguousarray(actions.centers.numpy()))


@dataclass(frozen=True, eq=False)
class Steps:
    """A short program for each image: rows of a table, from left to right.

    Attributes:
        program: whose rows they are.
        rows: (B, S) int64, -1 where nothing is applied.
        centers: (B, S, 2) float32, of cutouts and of a user's own random kernels.
    """

    program: Program
    rows: NDArray[np.int64]
    centers: NDArray[np.float32]

    @property
    def kinds(self) -> NDArray[np.int64]:
        """(B, S), ``Kind.IDENTITY`` where nothing is applied."""
        return np.where(self.rows >= 0, self.program.kinds[self.rows], Kind.IDENTITY)

    @property
    def fixed(self) -> NDArray[np.int64]:
        """(B, S, 6), as in the program; of cutouts :func:`boxes`."""
        fixed, cutout = self.program.fixed[self.rows], self.kinds == Kind.CUTOUT
        sides = self.program.parameters[self.rows[cutout], 0]
        size = self.program.height, self.program.width
        fixed[cutout, :4] = boxes(sides, self.centers[cutout], *size)
        return fixed

    def listed(self) -> list[list[Step]]:
        """The same in plain numbers, without what changes nothing."""
        return [
            [self._step(row, (y, x)) for row, (y, x) in zip(*image, strict=True) if row >= 0]
            for image in zip(self.rows.tolist(), self.centers.tolist(), strict=True)
        ]

    def _step(self, row: int, center: tuple[float, float]) -> Step:
        program = self.program
        return Step(
            *(program.operations[program.of[row]], Kind(program.kinds[row])),
            *(tuple(program.parameters[row].tolist()), tuple(program.fixed[row].tolist())),
            center,
        )


class Step(NamedTuple):
    """One step of one image, in plain numbers; as in :class:`Program` and :class:`Steps`."""

    operation: Operation
    kind: Kind
    parameters: tuple[float, ...]
    fixed: tuple[int, ...]
    center: tuple[float, float]


def boxes(
    sides: NDArray[np.float64], centers: NDArray[np.floating[Any]], height: int, width: int
) -> NDArray[np.int64]:
    """First and last + 1 of the rows, then of the columns, of cutouts, (n, 4); not yet clipped."""
    side = sides.astype(np.int64)[:, None]
    first = np.floor(centers * np.array([height, width], np.float64)).astype(np.int64) - side // 2
    return np.stack([first, first + side], -1).reshape(-1, 4)
