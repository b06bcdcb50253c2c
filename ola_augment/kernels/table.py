"""The table of built-in operations: all that is known about each stands in its row.

Search spaces take the accepted magnitudes from it, the kernels what to run, the documentation its
table, and the tests what to try. A new operation is one row and one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ola_augment.kernels import levels
from ola_augment.kernels.affine import Matrix, rotation
from ola_augment.kernels.kind import GEOMETRIC, Kind
from ola_augment.kernels.levels import LevelsKernel

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LookUp:
    """Runs exactly as magnitude -> (256,), the new value of each level before truncation.

    ``kind``: which compiled kernel does the same without a table, at any depth, if one does.
    """

    values: Callable[[float], NDArray[np.generic]]
    kind: Kind = Kind.BATCHED


@dataclass(frozen=True)
class Affine:
    """Runs exactly as (magnitude, height, width) -> matrix from the result to the source.

    ``mirrored``: the dimension of (B, C, H, W) that it reverses, if that is all it does.
    """

    matrix: Callable[[float, int, int], Matrix]
    mirrored: int | None = None


@dataclass(frozen=True)
class Row:
    """One built-in operation.

    Attributes:
        name: as in the paper's Table 3.
        domain: the magnitudes it accepts, both ends included; None if it takes none. Wide enough
            for any use, and narrow enough that no kernel overflows.
        unit: of its magnitudes; those in pixels may scale with a side of the image.
        exact: how uint8 images on the CPU are computed: a look-up table, a matrix, or one of the
            compiled kernels; ``Kind.BATCHED`` where the batched kernel does that too.
        batched: the batched kernel on grey levels; None where the exact form determines it
            (``Affine``, ``Kind.IDENTITY`` and ``Kind.CUTOUT``).
        bound: largest difference in grey levels between k / 255 and the uint8 result, for the
            magnitudes of both spaces and nearest interpolation.
        gradient: whether the gradient with respect to floating images is not 0 everywhere.
        pillow: what it is in Pillow, for the documentation (Markdown).
        neutral: the magnitude at which it changes nothing, if there is one; of geometric operations
            the matrix tells.
        leaves_range: whether the batched kernel can lead out of the range of its images, so that
            what it changes is clamped.

    Raises:
        TypeError: the row is incomplete.
        ValueError: a domain that is no finite interval, or a negative bound.
    """

    name: str
    domain: tuple[float, float] | None
    unit: Literal["", "degrees", "bits", "px"]
    exact: LookUp | Affine | Kind
    batched: LevelsKernel | None
    bound: float
    gradient: bool
    pillow: str
    neutral: float | None = None
    leaves_range: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.exact, LookUp | Affine | Kind) or self.exact in _NEED_A_FUNCTION:
            raise TypeError(f"operation {self.name!r}: exact={self.exact!r} cannot be run")
        if (self.batched is None) != (self.kind in _DETERMINED):
            wanted = "needs no" if self.batched else "needs a"
            raise TypeError(f"operation {self.name!r}: {self.kind!r} {wanted} batched kernel")
        domain = self.domain
        if domain is not None and not -math.inf < domain[0] <= domain[1] < math.inf:
            raise ValueError(f"operation {self.name!r}: domain {domain} is no finite interval")
        if not self.bound >= 0:
            raise ValueError(f"operation {self.name!r}: bound must be 0 or more, got {self.bound}")

    @property
    def kind(self) -> Kind:
        """Which exact kernel runs it."""
        if isinstance(self.exact, Affine):
            return Kind.AFFINE
        return self.exact.kind if isinstance(self.exact, LookUp) else self.exact

    @property
    def geometric(self) -> bool:
        """Whether it moves pixels, so that masks, boxes and points follow."""
        return self.kind == Kind.AFFINE


_NEED_A_FUNCTION = GEOMETRIC
_DETERMINED = (Kind.AFFINE, Kind.IDENTITY, Kind.CUTOUT)


def tabulate(*rows: Row) -> dict[str, Row]:
    """Rows by name.

    Raises:
        ValueError: a name that occurs twice.
    """
    table = {row.name: row for row in rows}
    if len(table) < len(rows):
        raise ValueError(f"operations must have distinct names, got {[row.name for row in rows]}")
    return table


def _shear_x(m: float, height: int, width: int) -> Matrix:
    return 1, m, 0, 0, 1, 0


def _shear_y(m: float, height: int, width: int) -> Matrix:
    return 1, 0, 0, m, 1, 0


def _translate_x(m: float, height: int, width: int) -> Matrix:
    return 1, 0, m, 0, 1, 0


def _translate_y(m: float, height: int, width: int) -> Matrix:
    return 1, 0, 0, 0, 1, m


def _flip_lr(_: float, height: int, width: int) -> Matrix:
    return -1, 0, width, 0, 1, 0


def _flip_ud(_: float, height: int, width: int) -> Matrix:
    return 1, 0, 0, 0, -1, height


_GREY = np.arange(256)


def _solarize(threshold: float) -> NDArray[np.generic]:
    return np.where(threshold > _GREY, _GREY, 255 - _GREY)


def _posterize(bits: float) -> NDArray[np.generic]:
    step: int = 2 ** (8 - int(bits))
    return _GREY // step * step


def _brightness(factor: float) -> NDArray[np.generic]:
    # Pillow blends with black in single precision.
    return (_GREY.astype(np.float32) * np.float32(factor)).clip(0, 255)


def _invert(_: float) -> NDArray[np.generic]:
    return 255 - _GREY


#: Degrees, matrix entries, pixels: coordinates stay far below what 64-bit integers hold.
_ANY = (-1e6, 1e6)
#: Blending factors and sides: 255 times them stays finite in single precision.
_FROM_0 = (0.0, 1e6)

# fmt: off
TABLE: dict[str, Row] = tabulate(
    #   name, domain, unit, exact, batched, bound, gradient, Pillow, neutral, leaves_range
    Row("identity", None, "", Kind.IDENTITY, None, 0, True,
        "unchanged"),
    Row("auto_contrast", None, "", Kind.AUTO_CONTRAST, levels.auto_contrast, 1, True,
        "`ImageOps.autocontrast`", leaves_range=True),
    Row("equalize", None, "", Kind.EQUALIZE, levels.equalize, 0, False,
        "`ImageOps.equalize`"),
    Row("rotate", _ANY, "degrees", Affine(rotation), None, 0, True,
        "`Image.rotate`, counter-clockwise about the centre"),
    Row("solarize", (0, 256), "", LookUp(_solarize, Kind.SOLARIZE), levels.solarize, 0, True,
        "`ImageOps.solarize(threshold)`", 256),
    Row("color", _FROM_0, "", Kind.COLOR, levels.color, 1.5, True,
        "`ImageEnhance.Color`", 1, True),
    Row("posterize", (0, 8), "bits", LookUp(_posterize, Kind.POSTERIZE), levels.posterize, 0, False,
        "`ImageOps.posterize(bits)`; 0 bits give black", 8),
    Row("contrast", _FROM_0, "", Kind.CONTRAST, levels.contrast, 1.5, True,
        "`ImageEnhance.Contrast`", 1, True),
    Row("brightness", _FROM_0, "", LookUp(_brightness, Kind.BRIGHTNESS), levels.brightness, 1, True,
        "`ImageEnhance.Brightness`", 1, True),
    Row("sharpness", _FROM_0, "", Kind.SHARPNESS, levels.sharpness, 1.5, True,
        "`ImageEnhance.Sharpness`", 1, True),
    Row("shear_x", _ANY, "", Affine(_shear_x), None, 0, True,
        "`Image.transform(AFFINE)`, (1, m, 0, 0, 1, 0)"),
    Row("shear_y", _ANY, "", Affine(_shear_y), None, 0, True,
        "`Image.transform(AFFINE)`, (1, 0, 0, m, 1, 0)"),
    Row("translate_x", _ANY, "px", Affine(_translate_x), None, 0, True,
        "`Image.transform(AFFINE)`, (1, 0, m, 0, 1, 0)"),
    Row("translate_y", _ANY, "px", Affine(_translate_y), None, 0, True,
        "`Image.transform(AFFINE)`, (1, 0, 0, 0, 1, m)"),
    Row("blur", None, "", Kind.BLUR, levels.blur, 0.5, True,
        "`filter(ImageFilter.BLUR)`"),
    Row("invert", None, "", LookUp(_invert, Kind.INVERT), levels.invert, 0, True,
        "`ImageOps.invert`"),
    Row("flip_lr", None, "", Affine(_flip_lr, 3), None, 0, True,
        "`transpose(FLIP_LEFT_RIGHT)`"),
    Row("flip_ud", None, "", Affine(_flip_ud, 2), None, 0, True,
        "`transpose(FLIP_TOP_BOTTOM)`"),
    Row("cutout", _FROM_0, "px", Kind.CUTOUT, None, 0, True,
        "none: a black square, random centre, clipped at the border", 0),
)
# fmt: on
