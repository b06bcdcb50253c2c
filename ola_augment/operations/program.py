"""What was drawn becomes steps: rows of a tabulated search space, or of one image alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ola_augment.kernels.affine import Matrix, fixed_point, is_stepped, shifts
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.table import TABLE, Affine, LookUp
from ola_augment.operation import Operation, inside
from ola_augment.operations.steps import Program, Step, Steps
from ola_augment.space import SearchSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray


def kind_of(operation: Operation) -> Kind:
    """Which kernel runs an operation; a user's own comes before a built-in one of its name."""
    if operation.kernel is not None:
        return Kind.BATCHED
    return Kind.AFFINE if operation.matrix is not None else TABLE[operation.name].kind


@lru_cache(maxsize=64)
def program(space: SearchSpace, height: int, width: int) -> Program:
    """Tabulate a search space for images of one size; shared between calls, not to be written.

    Raises:
        ValueError: a magnitude outside of what its operation accepts at this size, or a user's
            own matrices of a wrong shape, not finite or not invertible.
        TypeError: a user's own ``matrix`` that returned no tensor.
    """
    magnitudes = space.magnitudes(height, width).numpy()
    count, bins = magnitudes.shape
    kinds = np.zeros((count, bins, 2), np.int64)
    parameters, fixed = np.zeros((count, bins, 2, 6)), np.zeros((count, bins, 2, 6), np.int64)
    for a, operation in enumerate(space.operations):
        # Only drawn signs count: an operation that is not signed ignores them.
        signed = magnitudes[a, :, None] * ((1, -1) if operation.signed else (1, 1))
        kinds[a], parameters[a, :, :, 0] = kind_of(operation), signed
        if kind_of(operation) == Kind.AFFINE:
            rows = matrices(operation, signed.ravel().tolist(), height, width)
            parameters[a] = rows.reshape(bins, 2, 6)
            moves = [_geometry(cast(Matrix, tuple(row)), height, width) for row in rows.tolist()]
            kinds[a] = np.array([kind for kind, _ in moves]).reshape(bins, 2)
            fixed[a] = np.array([move for _, move in moves]).reshape(bins, 2, 6)
        elif operation.kernel is None:
            kinds[a][signed == TABLE[operation.name].neutral] = Kind.IDENTITY
    return Program(
        *(space.operations, height, width, np.repeat(np.arange(count), 2 * bins)),
        *(kinds.ravel(), parameters.reshape(-1, 6), fixed.reshape(-1, 6)),
    )


def steps_of_one(space: SearchSpace, slots: Slots, height: int, width: int) -> list[Step]:
    """What was drawn for one image, in plain numbers, without what changes nothing.

    Tables for every bin of a space would cost more than the operations of one image do.

    Args:
        space: that it was drawn from.
        slots: operation, whether it is kept, bin, sign and centre of each.
        height: of the image.
        width: of the image.

    Raises:
        ValueError, TypeError: as of :func:`program`.
    """
    made, steps = _made(space, height, width), []
    for op, kept, k, sign, center in slots:
        if not kept:
            continue
        step = made.get((op, k, sign))
        if step is None:
            step = made[op, k, sign] = _step(space, op, k, sign, height, width)
        if step.kind != Kind.IDENTITY:
            steps.append(Step(*step[:4], center))
    return steps


@lru_cache(maxsize=128)
def _made(space: SearchSpace, height: int, width: int) -> dict[tuple[int, int, int], Step]:
    """The steps for images of one size that were drawn so far, by operation, bin and sign."""
    _check_reach(space, height, width)
    return {}


def _step(space: SearchSpace, op: int, k: int, sign: int, height: int, width: int) -> Step:
    operation = space.operations[op]
    m = operation.magnitude(k, space.num_magnitude_bins, height, width)
    m = m * sign if operation.signed else m
    kind, fixed = kind_of(operation), _ZEROS
    parameters: tuple[float, ...] = (m, *_ZEROS[1:])
    if kind == Kind.AFFINE:
        matrix = cast(Matrix, tuple(matrices(operation, [m], height, width)[0].tolist()))
        parameters = matrix
        kind, fixed = _geometry(matrix, height, width)
    elif kind != Kind.BATCHED and m == TABLE[operation.name].neutral:
        kind = Kind.IDENTITY
    return Step(operation, kind, parameters, fixed, (0.0, 0.0))


def program_of_one(listed: list[Step], height: int, width: int) -> Steps:
    """The steps of one image for what runs batches: a program of these rows alone."""
    n = len(listed)
    parameters = np.array([step.parameters for step in listed], np.float64).reshape(n, 6)
    kinds = np.array([step.kind for step in listed], np.int64)
    program = Program(
        *(tuple(step.operation for step in listed), height, width, np.arange(n), kinds),
        *(parameters, np.array([step.fixed for step in listed], np.int64).reshape(n, 6)),
    )
    centers = np.array([step.center for step in listed], np.float32).reshape(1, n, 2)
    return Steps(program, np.arange(n)[None], centers)


#: Operation, whether it is kept, bin, sign -1 or +1, and centre (y, x), of each slot of an image.
Slots = Iterable[tuple[int, bool, int, int, tuple[float, float]]]

_UNMOVED: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_ZEROS: tuple[int, ...] = (0,) * 6


def _geometry(matrix: Matrix, height: int, width: int) -> tuple[Kind, tuple[int, ...]]:
    """The kind of a matrix, and the matrix in fixed point."""
    fixed = fixed_point(matrix)
    if matrix == _UNMOVED:
        return Kind.IDENTITY, fixed
    if is_stepped(matrix, height, width):
        return Kind.STEPPED, fixed
    return Kind.SHIFT if shifts(matrix) else Kind.AFFINE, fixed


def _check_reach(space: SearchSpace, height: int, width: int) -> None:
    """Refuse a size at which some magnitude leaves what its operation accepts."""
    last = space.num_magnitude_bins - 1
    for operation in space.operations:
        domain = operation.domain
        if operation.side is None or domain is None:
            continue
        ends = tuple(operation.magnitude(k, last + 1, height, width) for k in (0, last))
        if not inside(domain, (ends[0], ends[1]), operation.signed):
            space.magnitudes(height, width)  # says which, and why


@lru_cache(maxsize=4096)
def look_up_table(name: str, magnitude: float) -> bytes:
    """256 new values of a built-in operation that has a table."""
    return cast(LookUp, TABLE[name].exact).values(magnitude).astype(np.uint8).tobytes()


def matrices(
    operation: Operation, magnitudes: Sequence[float], height: int, width: int
) -> NDArray[np.float64]:
    """(n, 6) matrices of a geometric operation for signed magnitudes.

    Raises:
        TypeError, ValueError: what a user's own function returned is not as said.
    """
    if operation.matrix is None:
        matrix = cast(Affine, TABLE[operation.name].exact).matrix
        return np.array([matrix(m, height, width) for m in magnitudes])
    given = torch.tensor(magnitudes, dtype=torch.float64, device="cpu")
    own, n = f"matrix of operation {operation.name!r}", len(magnitudes)
    result = operation.matrix(given, height, width)
    if not isinstance(result, Tensor):
        raise TypeError(f"{own} must return a tensor, got {type(result).__name__}")
    if result.shape != (n, 2, 3):
        raise ValueError(f"{own} must return the shape {(n, 2, 3)}, got {tuple(result.shape)}")
    rows = result.detach().cpu().double().numpy().reshape(n, 6)
    a, b, _, d, e, _ = rows.T
    reached = np.abs(rows.reshape(n, 2, 3)) @ (width, height, 1)
    bad = ~((np.abs(a * e - b * d) > 1e-9) & (reached < 2**40).all(1))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"{own} must be finite, invertible and lead to coordinates below 2^40, got "
            f"{rows[i].tolist()} for magnitude {magnitudes[i]:g} and images of {height} x {width}"
        )
    return rows
