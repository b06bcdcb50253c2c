"""What every (operation, magnitude bin, sign) of a space means to the kernels, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.kernels.affine import fixed_point, reaches_far, scales
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.table import TABLE, Affine, LookUp
from ola_augment.operation import Operation
from ola_augment.space import SearchSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Drawn:
    """The rows of a :class:`Program` that were drawn for B examples in S slots.

    Attributes:
        kinds: (B, S) int64, ``Kind.IDENTITY`` where nothing is applied.
        parameters: (B, S, 6) float64, as in the program.
        fixed: (B, S, 6) int64, as in the program; for ``CUTOUT`` the first and last + 1 of the
            rows, then of the columns, that are blackened.
        far: (B, S) bool, as in the program.
    """

    kinds: NDArray[np.int64]
    parameters: NDArray[np.float64]
    fixed: NDArray[np.int64]
    far: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Program:
    """Operations for images of one size, ready for the kernels.

    Attributes:
        operations: those of a search space, or of the slots of one example.
        height: of the images.
        width: of the images.
        kinds: (A,) int64, the :class:`Kind` of each operation on bytes.
        ranged: (A,) int64, on more than a byte of levels.
        parameters: (A, bins, 2, 6) float64, the last but one for sign +1 and -1: the matrix of an
            ``AFFINE`` operation; otherwise the magnitude, then zeros.
        fixed: (A, bins, 2, 6) int64, for ``AFFINE`` operations: the source of the pixel in column
            x and row y is (f0 x + f1 y + f2, f3 x + f4 y + f5) >> 16.
        tables: (A, bins, 256) uint8, the new values of a ``TABLE`` operation.
        neutral: (A, bins, 2) bool, where an operation changes nothing.
        scales: whether some matrix stretches rows and columns.
        far: (A, bins, 2) bool, which matrices reach where Pillow leaves fixed point.
    """

    operations: tuple[Operation, ...]
    height: int
    width: int
    kinds: NDArray[np.int64]
    ranged: NDArray[np.int64]
    parameters: NDArray[np.float64]
    fixed: NDArray[np.int64]
    tables: NDArray[np.uint8]
    neutral: NDArray[np.bool_]
    scales: bool
    far: NDArray[np.bool_]

    def look_up(self, actions: Actions) -> Drawn:
        """Kinds and parameters of what was drawn for each example and slot."""
        ops, bins = actions.ops.numpy(), actions.magnitude_bins.numpy()
        negative = (actions.signs.numpy() < 0).astype(np.int64)
        applied = actions.keep.numpy() & ~self.neutral[ops, bins, negative]
        kinds = np.where(applied, self.kinds[ops], Kind.IDENTITY)
        at = (ops, bins, negative)
        drawn = Drawn(kinds, self.parameters[at], self.fixed[at], self.far[at])
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


_UNMOVED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def kind_of(operation: Operation) -> Kind:
    """Which kernel runs an operation; a user's own comes before a built-in one of its name."""
    if operation.kernel is not None:
        return Kind.BATCHED
    return Kind.AFFINE if operation.matrix is not None else TABLE[operation.name].kind


def ranged_kind_of(operation: Operation) -> Kind:
    """Which compiled kernel runs an operation on more than a byte of levels."""
    kind = kind_of(operation)
    return TABLE[operation.name].ranged if kind == Kind.TABLE else kind


@lru_cache(maxsize=64)
def program(space: SearchSpace, height: int, width: int) -> Program:
    """Tabulate a search space for images of one size; shared between calls, not to be written.

    Raises:
        ValueError: a magnitude outside of what its operation accepts at this size, or a user's
            own matrices of a wrong shape, not finite or not invertible.
        TypeError: a user's own ``matrix`` that returned no tensor.
    """
    magnitudes = space.magnitudes(height, width).numpy()
    return tabulated(space.operations, magnitudes, height, width)


def tabulated(
    operations: tuple[Operation, ...], magnitudes: NDArray[np.float64], height: int, width: int
) -> Program:
    """What :func:`program` makes of a space, of any operations and magnitudes (A, bins).

    Raises:
        ValueError, TypeError: as there.
    """
    count, bins = magnitudes.shape
    parameters = np.zeros((count, bins, 2, 6))
    fixed = np.zeros((count, bins, 2, 6), np.int64)
    tables = np.zeros((count, bins, 256), np.uint8)
    neutral, far = np.zeros((2, count, bins, 2), bool)
    kinds = np.array([kind_of(operation) for operation in operations], np.int64)
    ranged = np.array([ranged_kind_of(operation) for operation in operations], np.int64)
    for a, operation in enumerate(operations):
        # Only drawn signs count: an operation that is not signed ignores them.
        signed = magnitudes[a, :, None] * ((1, -1) if operation.signed else (1, 1))
        parameters[a, :, :, 0] = signed
        if kinds[a] == Kind.AFFINE:
            parameters[a] = matrices(operation, signed.ravel(), height, width).reshape(bins, 2, 6)
            fixed[a] = fixed_point(parameters[a])
            neutral[a] = (parameters[a] == _UNMOVED).all(-1)
            far[a] = reaches_far(parameters[a], height, width)
        elif operation.kernel is None:
            neutral[a] = signed == TABLE[operation.name].neutral
        if kinds[a] == Kind.TABLE:
            rows = [look_up_table(operation.name, m) for m in magnitudes[a].tolist()]
            tables[a] = np.frombuffer(b"".join(rows), np.uint8).reshape(bins, 256)
    stretched = bool(scales(parameters[kinds == Kind.AFFINE]).any())
    return Program(
        *(operations, height, width, kinds, ranged, parameters, fixed, tables, neutral),
        *(stretched, far),
    )


@lru_cache(maxsize=4096)
def look_up_table(name: str, magnitude: float) -> bytes:
    """256 new values of a built-in operation of kind ``TABLE``."""
    return cast(LookUp, TABLE[name].exact).values(magnitude).astype(np.uint8).tobytes()


def matrices(
    operation: Operation, magnitudes: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float64]:
    """(n, 6) matrices of a geometric operation for signed magnitudes.

    Raises:
        TypeError, ValueError: what a user's own function returned is not as said.
    """
    if operation.matrix is None:
        matrix = cast(Affine, TABLE[operation.name].exact).matrix
        return np.array([matrix(m, height, width) for m in magnitudes.tolist()])
    own, n = f"matrix of operation {operation.name!r}", len(magnitudes)
    result = operation.matrix(torch.tensor(magnitudes, device="cpu"), height, width)
    if not isinstance(result, Tensor):
        raise TypeError(f"{own} must return a tensor, got {type(result).__name__}")
    if result.shape != (n, 2, 3):
        raise ValueError(f"{own} must return the shape {(n, 2, 3)}, got {tuple(result.shape)}")
    rows = result.detach().cpu().double().numpy().reshape(n, 6)
    a, b, _, d, e, _ = rows.T
    reached = np.abs(rows.reshape(n, 2, 3)) @ (width, height, 1)
    bad = ~((np.abs(a * e - b * d) > 1e-9) & (reached < 2**40).all(1))
    if bad.any():
        raise ValueError(
            f"{own} must be finite, invertible and lead to coordinates below 2^40, got "
            f"{rows[bad][0].tolist()} for magnitude {magnitudes[bad][0]:g} and images of "
            f"{height} x {width}"
        )
    return rows
