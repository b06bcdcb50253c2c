"""Masks and points move as their images do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ola_augment.actions import Actions, check_actions
from ola_augment.kernels.affine import affine_nearest, affine_stepped
from ola_augment.kernels.kind import GEOMETRIC, Kind
from ola_augment.operations.checks import check_size
from ola_augment.operations.program import program
from ola_augment.operations.steps import Steps
from ola_augment.space import SearchSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray


def apply_geometry_to_masks(
    masks: Tensor, space: SearchSpace, actions: Actions, *, fill: float = 0
) -> Tensor:
    """Move masks as their images are moved: nearest pixel, a fill where nothing comes from.

    Rotations, shears, translations, flips and a user's own operation with a ``matrix`` move a
    mask, and a kernel with a method ``erased`` takes pixels away; every other operation leaves it.

    Args:
        masks: (B, ..., H, W), of any dtype and device; not written to.
        space: that the actions were drawn from.
        actions: of B examples.
        fill: what is uncovered, such as the class to ignore.

    Returns:
        A new tensor of the shape and dtype of ``masks``.

    Raises:
        TypeError, ValueError: no tensor (B, ..., H, W), a fill that its dtype does not hold,
            actions that do not match, or that hold a user's own kernel without a ``matrix``.
    """
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a tensor, got {type(masks).__name__}")
    if masks.ndim < 3:
        raise ValueError(f"masks must have shape (B, ..., H, W), got {tuple(masks.shape)}")
    check_size(*masks.shape[-2:])
    check_mask_fill(fill, masks.dtype)
    check_actions(actions, space, len(masks))
    return move_masks(masks, space, actions, fill)


def check_mask_fill(fill: float, dtype: torch.dtype) -> None:
    """Refuse a fill that masks of a dtype cannot hold.

    Raises:
        TypeError: no number.
        ValueError: as said.
    """
    if not isinstance(fill, Real):
        raise TypeError(f"fill of a mask must be a number, got {fill!r}")
    if dtype.is_floating_point or dtype.is_complex:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not (low <= fill <= high and fill == int(fill)):
        raise ValueError(f"fill of a {dtype} mask must be whole, in {low} .. {high}, got {fill!r}")


def move_masks(masks: Tensor, space: SearchSpace, actions: Actions, fill: float = 0) -> Tensor:
    """:func:`apply_geometry_to_masks` without its checks of what was drawn here.

    Raises:
        ValueError: the actions hold a user's own kernel without a ``matrix``.
    """
    height, width = masks.shape[-2:]
    steps = _steps_of_matrices(space, actions, height, width)
    # An image of every pixel's own index, moved: it says where each pixel comes from.
    index = torch.arange(height * width, device=masks.device).view(1, 1, height, width)
    index = index.repeat(len(masks), 1, 1, 1)
    outside = torch.full((1, 1, 1), -1, device=masks.device)
    table, moves = steps.program, _moves(steps)
    stepped = steps.kinds == Kind.STEPPED
    ways = (
        (affine_nearest, moves & ~stepped, table.fixed),
        (affine_stepped, moves & stepped, table.parameters),
    )
    for s in range(moves.shape[1]):
        for move, which, rows in ways:
            moved = np.flatnonzero(which[:, s])
            if len(moved):
                matrices = torch.from_numpy(rows[steps.rows[moved, s]]).to(masks.device)
                here = torch.from_numpy(moved).to(masks.device)
                index[here] = move(index[here], matrices, outside)
        for examples, erased in _erased(space, actions, s, height, width):
            rest, gone = examples.to(masks.device), erased[:, None].to(masks.device)
            index[rest] = index[rest].masked_fill(gone, -1)
    index = index.flatten(2)
    flat = masks.reshape(len(masks), math.prod(masks.shape[1:-2]), height * width)
    taken = flat.gather(2, index.clamp(min=0).expand_as(flat))
    return torch.where(index >= 0, taken, torch.full_like(taken, fill)).view(masks.shape)


def _erased(
    space: SearchSpace, actions: Actions, s: int, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Examples of which slot s takes pixels away, and which, (n, height, width)."""
    for op, operation in enumerate(space.operations):
        if not getattr(operation.kernel, "erases", False):
            continue
        rows = torch.nonzero(actions.keep[:, s] & (actions.ops[:, s] == op))[:, 0]
        if len(rows):
            table = space.magnitudes(height, width)[op]
            magnitudes = table[actions.magnitude_bins[rows, s]].float()
            if operation.signed:
                magnitudes = magnitudes * actions.signs[rows, s]
            centers = actions.centers[rows, s]
            erased = cast(Any, operation.kernel).erased(magnitudes, centers, height, width)
            _check_erased(operation.name, erased, (len(rows), height, width))
            yield rows, erased


def _check_erased(name: str, erased: Any, shape: tuple[int, ...]) -> None:
    found = (erased.dtype, tuple(erased.shape)) if isinstance(erased, Tensor) else type(erased)
    if found != (torch.bool, shape):
        raise TypeError(
            f"method erased of the kernel of operation {name!r} must return which pixels are taken "
            f"away, torch.bool {shape}, got {found}"
        )


def transform_points(
    points: Tensor, space: SearchSpace, actions: Actions, height: int, width: int
) -> Tensor:
    """Move points as the images they lie in are moved; they may leave the image.

    Args:
        points: (B, N, 2) floating point, (x, y) in pixels with pixel centres at + 0.5, so that the
            image reaches from 0 to its width and height.
        space: that the actions were drawn from.
        actions: of B examples.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        A new tensor of the shape and dtype of ``points``.

    Raises:
        TypeError, ValueError: no floating tensor (B, N, 2), a size without pixels, actions that do
            not match, or that hold a user's own kernel without a ``matrix``.
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"points must be a floating-point tensor, got {kind}")
    if points.ndim != 3 or points.shape[2] != 2:
        raise ValueError(f"points must have shape (B, N, 2), got {tuple(points.shape)}")
    check_size(height, width)
    check_actions(actions, space, len(points))
    return move_points(points, space, actions, height, width)


def move_points(
    points: Tensor, space: SearchSpace, actions: Actions, height: int, width: int
) -> Tensor:
    """:func:`transform_points` without its checks of what was drawn here.

    Raises:
        ValueError: the actions hold a user's own kernel without a ``matrix``.
    """
    matrices = torch.from_numpy(forward_matrices(space, actions, height, width))
    m = matrices.to(points.dtype).to(points.device)
    x, y = points.unbind(-1)
    rows = m.unbind(1)
    return torch.stack([a[:, :1] * x + a[:, 1:2] * y + a[:, 2:] for a in rows], -1)


def forward_matrices(
    space: SearchSpace, actions: Actions, height: int, width: int
) -> NDArray[np.float64]:
    """Where the points of images go: (B, 2, 3), the identity where nothing moves.

    Raises:
        ValueError: the actions hold a user's own kernel without a ``matrix``.
    """
    steps = _steps_of_matrices(space, actions, height, width)
    moves = _moves(steps)
    identity = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    matrices = np.where(moves[..., None], steps.program.parameters[steps.rows], identity)
    bottom = np.broadcast_to([0.0, 0.0, 1.0], (*moves.shape, 1, 3))
    homogeneous = np.concatenate([matrices.reshape(*moves.shape, 2, 3), bottom], -2)
    # Matrices lead from the result back to the source; points go the other way.
    forward = np.linalg.inv(homogeneous)
    composed = np.broadcast_to(np.eye(3), (len(forward), 3, 3))
    for s in range(forward.shape[1]):
        composed = forward[:, s] @ composed
    return np.ascontiguousarray(composed[:, :2])


def _steps_of_matrices(space: SearchSpace, actions: Actions, height: int, width: int) -> Steps:
    steps = program(_matrices_alone(space), height, width).steps(actions)
    applied = np.unique(actions.ops.numpy()[actions.keep.numpy()])
    own = [space.operations[op] for op in applied]
    unknown = [operation.name for operation in own if operation.kernel and not operation.matrix]
    if unknown:
        raise ValueError(
            "actions hold operations with a kernel of your own, whose geometry is unknown: "
            f"{', '.join(unknown)}; masks, boxes and points follow it if you pass "
            "Operation(..., matrix=...)"
        )
    return steps


def _moves(steps: Steps) -> NDArray[np.bool_]:
    """(B, S), which steps move pixels."""
    return np.isin(steps.kinds, GEOMETRIC)


@lru_cache(maxsize=64)
def _matrices_alone(space: SearchSpace) -> SearchSpace:
    """The same space where matrices stand for the kernels that have one."""
    operations = tuple(
        replace(o, kernel=None, random=False) if o.matrix else o for o in space.operations
    )
    return replace(space, operations=operations)
