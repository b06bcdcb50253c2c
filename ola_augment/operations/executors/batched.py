"""Batched kernels for any device: examples sorted by kernel, each kernel run once on its slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ola_augment.kernels.affine import affine_bilinear, affine_nearest, affine_stepped, cutout
from ola_augment.kernels.kind import GEOMETRIC, Kind
from ola_augment.kernels.precision import wide_dtype
from ola_augment.kernels.table import TABLE, Affine
from ola_augment.operation import Operation
from ola_augment.operations.executors.own import computed_in, run_with_magnitudes
from ola_augment.operations.steps import Rendering, Steps

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: The key of what nothing is applied to; others are operations, or kinds with a minus.
_NOTHING = -(2**15)


@dataclass(frozen=True)
class Slices:
    """What was drawn, sorted by operation in every slot, on the device of the images.

    Attributes:
        order: (S + 1, B) int64, the examples of slot s in terms of the order in slot s - 1; the
            last row restores the order of the batch.
        parameters: (S, B, 6) floating point, sorted.
        fixed: (S, B, 6) int64, sorted.
        centers: (S, B, 2) float32, sorted; of a user's own random kernels.
        groups: per slot the keys of kernels, and how many examples each has.
    """

    order: Tensor
    parameters: Tensor
    fixed: Tensor
    centers: Tensor
    groups: list[list[tuple[int, int]]]


def run(images: Tensor, steps: Steps, rendering: Rendering) -> Tensor:
    """Apply steps to images on any device; without a host synchronisation.

    Integers are truncated after every operation, as in Pillow; floating images are computed in
    float32 (float64 stays float64) and rounded nowhere. Values that an operation leaves as they are
    come back bit for bit.

    Args:
        images: (B, C, H, W) of any dtype that there is a :class:`PixelFormat` for; not written to.
        steps: of each image.
        rendering: how they are applied.

    Returns:
        A new tensor of the shape, dtype and device of ``images``.

    Raises:
        ValueError: a user's own kernel returned another shape.
    """
    program, (fill, bilinear, pixels) = steps.program, rendering
    if len(images) == 0:
        return images.clone()
    dtype = images.dtype
    images = images.to(computed_in(dtype))
    slices = _sort(steps, images.device)
    uncovered = _upload(torch.tensor(fill, device="cpu").to(images.dtype), images.device).view(
        -1, 1, 1
    )
    for s, groups in enumerate(slices.groups):
        images = images.index_select(0, slices.order[s])
        parts, start = [], 0
        for key, count in groups:
            span = slice(start, start + count)
            part, start = images[span], start + count
            parameters, fixed = slices.parameters[s, span], slices.fixed[s, span]
            if key >= 0:
                operation, centers = program.operations[key], slices.centers[s, span]
                if (dimension := _mirrored(operation)) is not None:
                    part = part.flip(dimension)
                else:
                    part = run_with_magnitudes(operation, part, parameters[:, 0], centers, pixels)
            elif key == -Kind.CUTOUT:
                part = cutout(part, fixed[:, :4], pixels.low)
            elif key in (-Kind.AFFINE, -Kind.STEPPED) and bilinear:
                part = affine_bilinear(part, parameters, uncovered)
            elif key == -Kind.STEPPED:
                part = affine_stepped(part, parameters, uncovered)
            elif key != _NOTHING:
                part = affine_nearest(part, fixed, uncovered)
            parts.append(part)
        images = torch.cat(parts)
    return images.index_select(0, slices.order[-1]).to(dtype)


def _mirrored(operation: Operation) -> int | None:
    """The dimension that a built-in flip reverses."""
    own = operation.kernel is not None or operation.matrix is not None
    exact = None if own else TABLE[operation.name].exact
    return exact.mirrored if isinstance(exact, Affine) else None


def _sort(steps: Steps, device: torch.device) -> Slices:
    program, rows, kinds = steps.program, steps.rows, steps.kinds
    # One kernel serves all geometric operations but flips.
    shared = np.isin(kinds, (*GEOMETRIC, Kind.CUTOUT))
    flips = np.array([_mirrored(operation) is not None for operation in program.operations], bool)
    of = program.of[rows] if len(program.of) else rows
    shared &= ~flips[of] if len(flips) else shared
    keys = np.where(shared, -kinds, of)
    keys = np.where(kinds == Kind.IDENTITY, _NOTHING, keys)
    used = [s for s in range(keys.shape[1]) if (keys[:, s] != _NOTHING).any()]
    sorted_by = [np.argsort(keys[:, s], kind="stable") for s in used]
    groups = []
    for s, sort in zip(used, sorted_by, strict=True):
        distinct, counts = np.unique(keys[sort, s], return_counts=True)
        groups.append(list(zip(distinct.tolist(), counts.tolist(), strict=True)))
    previous = identity = np.arange(len(keys))
    order = []
    for sort in [*sorted_by, identity]:
        order.append(np.argsort(previous)[sort])
        previous = sort
    return Slices(
        _upload(torch.from_numpy(np.stack(order)), device),
        _upload(_gather(program.parameters[rows], used, sorted_by), device, wide_dtype(device)),
        _upload(_gather(steps.fixed, used, sorted_by), device),
        _upload(_gather(steps.centers, used, sorted_by), device),
        groups,
    )


def _gather(rows: NDArray[Any], used: list[int], order: list[NDArray[np.int64]]) -> Tensor:
    """(B, S, n) -> (used slots, B, n), sorted."""
    picked = [rows[sort, s] for s, sort in zip(used, order, strict=True)]
    empty = rows[:0].reshape(0, len(rows), rows.shape[2])
    return torch.from_numpy(np.stack(picked) if picked else empty)


def _upload(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy to a device without waiting for it; from pinned memory where that matters."""
    values = values.to(dtype or values.dtype)
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)
