"""What every (operation, magnitude bin, sign) of a space means to the kernels, as arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ola_augment.actions import Actions
from ola_augment.space import SearchSpace

Matrix = tuple[float, float, float, float, float, float]


class Kind(IntEnum):
    """The kernels; several operations share one and differ in their parameters only."""

    IDENTITY = 0
    TABLE = 1  # one value per grey level, known before the image is seen
    AUTO_CONTRAST = 2
    EQUALIZE = 3
    CONTRAST = 4
    COLOR = 5
    SHARPNESS = 6
    BLUR = 7
    AFFINE = 8
    CUTOUT = 9
    CUSTOM = 10  # a user's own kernel


KINDS: dict[str, Kind] = {
    "identity": Kind.IDENTITY,
    "auto_contrast": Kind.AUTO_CONTRAST,
    "equalize": Kind.EQUALIZE,
    "rotate": Kind.AFFINE,
    "solarize": Kind.TABLE,
    "color": Kind.COLOR,
    "posterize": Kind.TABLE,
    "contrast": Kind.CONTRAST,
    "brightness": Kind.TABLE,
    "sharpness": Kind.SHARPNESS,
    "shear_x": Kind.AFFINE,
    "shear_y": Kind.AFFINE,
    "translate_x": Kind.AFFINE,
    "translate_y": Kind.AFFINE,
    "blur": Kind.BLUR,
    "invert": Kind.TABLE,
    "flip_lr": Kind.AFFINE,
    "flip_ud": Kind.AFFINE,
    "cutout": Kind.CUTOUT,
}


def rotation(degrees: float, height: int, width: int) -> Matrix:
    """Matrix of ``PIL.Image.rotate``: counter-clockwise about the centre.

    Entries are rounded to 15 digits as there, and so are the quarter turns that Pillow makes by
    transposing: written as matrices they move every pixel to the same place.
    """
    degrees %= 360.0
    if degrees == 180 or (degrees in (90, 270) and height == width):
        cos, sin = (-1.0, 0.0) if degrees == 180 else (0.0, 1.0 if degrees == 90 else -1.0)
    else:
        cos = round(math.cos(math.radians(degrees)), 15)
        sin = round(math.sin(math.radians(degrees)), 15)
    x, y = width / 2, height / 2
    return (
        cos,
        -sin,
        cos * -x + -sin * -y + 0.0 + x,
        sin,
        cos,
        sin * -x + cos * -y + 0.0 + y,
    )


#: (magnitude, height, width) -> (a, b, c, d, e, f): the pixel at (x, y) of the result, centres at
#: + 0.5, comes from (a x + b y + c, d x + e y + f), as in ``PIL.Image.transform`` with AFFINE.
MATRICES: dict[str, Callable[[float, int, int], Matrix]] = {
    "rotate": rotation,
    "shear_x": lambda m, height, width: (1, m, 0, 0, 1, 0),
    "shear_y": lambda m, height, width: (1, 0, 0, m, 1, 0),
    "translate_x": lambda m, height, width: (1, 0, m, 0, 1, 0),
    "translate_y": lambda m, height, width: (1, 0, 0, 0, 1, m),
    "flip_lr": lambda m, height, width: (-1, 0, width, 0, 1, 0),
    "flip_ud": lambda m, height, width: (1, 0, 0, 0, -1, height),
}

_GREY = np.arange(256)

#: magnitude -> (256,) the new value of each grey level, before it is truncated to uint8.
TABLES: dict[str, Callable[[float], NDArray[np.generic]]] = {
    "solarize": lambda threshold: np.where(threshold > _GREY, _GREY, 255 - _GREY),
    "posterize": lambda bits: _GREY & ~(2 ** (8 - int(bits)) - 1),
    # Pillow blends with black in single precision.
    "brightness": lambda factor: (_GREY.astype(np.float32) * np.float32(factor)).clip(0, 255),
    "invert": lambda _: 255 - _GREY,
}


@dataclass(frozen=True, eq=False)
class Drawn:
    """The rows of a :class:`Program` that were drawn for B examples in S slots.

    Attributes:
        kinds: (B, S) int64, ``Kind.IDENTITY`` where nothing is applied.
        parameters: (B, S, 6) float64, as in the program.
        fixed: (B, S, 6) int64, as in the program; for ``CUTOUT`` the first and last + 1 of the
            rows, then of the columns, that are blackened.
    """

    kinds: NDArray[np.int64]
    parameters: NDArray[np.float64]
    fixed: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Program:
    """A search space for images of one size, ready for the kernels.

    Attributes:
        space: the search space.
        height: of the images.
        width: of the images.
        kinds: (A,) int64, the :class:`Kind` of each operation.
        parameters: (A, bins, 2, 6) float64, the last but one for sign +1 and -1: the matrix of an
            ``AFFINE`` operation; otherwise the magnitude, then zeros.
        fixed: (A, bins, 2, 6) int64, for ``AFFINE`` operations: the source of the pixel in column
            x and row y is (f0 x + f1 y + f2, f3 x + f4 y + f5) >> 16.
        tables: (A, bins, 256) uint8, the new values of a ``TABLE`` operation.
    """

    space: SearchSpace
    height: int
    width: int
    kinds: NDArray[np.int64]
    parameters: NDArray[np.float64]
    fixed: NDArray[np.int64]
    tables: NDArray[np.uint8]

    def look_up(self, actions: Actions) -> Drawn:
        """Kinds and parameters of what was drawn for each example and slot."""
        ops, bins = actions.ops.numpy(), actions.magnitude_bins.numpy()
        negative = (actions.signs.numpy() < 0).astype(np.int64)
        kinds = np.where(actions.keep.numpy(), self.kinds[ops], Kind.IDENTITY)
        drawn = Drawn(kinds, self.parameters[ops, bins, negative], self.fixed[ops, bins, negative])
        cutout = kinds == Kind.CUTOUT
        drawn.fixed[cutout, :4] = self._boxes(drawn.parameters[cutout, 0], actions, cutout)
        return drawn

    def _boxes(
        self, sides: NDArray[np.float64], actions: Actions, where: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """First and last + 1 of the rows and columns of cutouts, (n, 4), not yet clipped."""
        side = sides.astype(np.int64)
        sizes = np.array([self.height, self.width], np.float64)
        first = np.floor(actions.centers.numpy()[where] * sizes).astype(np.int64)
        first -= side[:, None] // 2
        last = first + side[:, None]
        return np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], -1)


@lru_cache(maxsize=64)
def program(space: SearchSpace, height: int, width: int) -> Program:
    """Tabulate a search space for images of one size; shared between calls, not to be written."""
    bins = space.num_magnitude_bins
    magnitudes = space.magnitudes(height, width).numpy()
    parameters = np.zeros((len(space), bins, 2, 6))
    fixed = np.zeros((len(space), bins, 2, 6), np.int64)
    tables = np.zeros((len(space), bins, 256), np.uint8)
    kinds = np.zeros(len(space), np.int64)
    for a, operation in enumerate(space.operations):
        kinds[a] = Kind.CUSTOM if operation.kernel is not None else KINDS[operation.name]
        # Only drawn signs count: an operation that is not signed ignores them.
        signed = magnitudes[a, :, None] * ((1, -1) if operation.signed else (1, 1))
        parameters[a, :, :, 0] = signed
        if kinds[a] == Kind.AFFINE:
            matrix = MATRICES[operation.name]
            rows = [matrix(float(m), height, width) for m in signed.flat]
            parameters[a] = np.array(rows).reshape(bins, 2, 6)
            fixed[a] = fixed_point(parameters[a])
        if kinds[a] == Kind.TABLE:
            tables[a] = [TABLES[operation.name](m).astype(np.uint8) for m in magnitudes[a]]
    return Program(space, height, width, kinds, parameters, fixed, tables)


def fixed_point(matrices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Affine matrices (..., 6) in Pillow's 16.16 fixed point, taken at the pixel centres.

    Pillow rounds entries to the nearest 1/65536, except where rows stay rows and columns stay
    columns: there it truncates coordinates in floating point, which rounding down agrees with.
    """
    a, b, c, d, e, f = np.moveaxis(matrices, -1, 0)
    rounding = np.where((b == 0) & (d == 0), 0.0, 0.5)
    entries = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return np.stack([np.floor(v * 65536.0 + rounding) for v in entries], -1).astype(np.int64)
