"""Batched kernels for any device: examples sorted by kernel, each kernel run once on its slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.kernels.affine import affine_bilinear, affine_nearest, cutout
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.levels import as_they_came, run_on_levels, wide_dtype
from ola_augment.kernels.pixel_format import PixelFormat, pixel_format
from ola_augment.kernels.table import TABLE, Affine
from ola_augment.operation import Operation
from ola_augment.operations.program import Program

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Slices:
    """What was drawn, sorted by operation in every slot, on the device of the images.

    Attributes:
        order: (S + 1, B) int64, the examples of slot s in terms of the order in slot s - 1; the
            last row restores the order of the batch.
        parameters: (S, B, 6) floating point, sorted.
        fixed: (S, B, 6) int64, sorted.
        centers: (S, B, 2) float32, sorted; of a user's own random kernels.
        groups: per slot the operations and how many examples each has, -1 for none.
        far: (S, B) bool, sorted, which matrices reach where Pillow leaves fixed point, if any does.
    """

    order: Tensor
    parameters: Tensor
    fixed: Tensor
    centers: Tensor
    groups: list[list[tuple[int, int]]]
    far: Tensor | None


def apply_batched(
    images: Tensor,
    program: Program,
    actions: Actions,
    fill: tuple[float, ...],
    bilinear: bool,
    pixels: PixelFormat | None = None,
) -> Tensor:
    """Apply actions to images on any device; without a host synchronisation.

    Integers are truncated after every operation, as in Pillow; floating images are computed in
    float32 (float64 stays float64) and rounded nowhere. Values that an operation leaves as they are
    come back bit for bit.

    Args:
        images: (B, C, H, W) of any dtype that there is a :class:`PixelFormat` for; not written to.
        program: of the images' size and the actions' space.
        actions: of B examples, on the CPU.
        fill: C values, in the scale of the images, for the pixels that a geometric operation
            uncovers; truncated for integers.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        pixels: what the images are; None: of the whole range of their dtype.

    Returns:
        A new tensor of the shape, dtype and device of ``images``.

    Raises:
        ValueError: a user's own kernel returned another shape.
    """
    pixels = pixels or pixel_format(images.dtype, images.shape[1])
    if len(images) == 0:
        return images.clone()
    dtype = images.dtype
    images = images.to(computed_in(dtype))
    slices = _sort(program, actions, images.device)
    uncovered = _upload(torch.tensor(fill, device="cpu").to(images.dtype), images.device).view(
        -1, 1, 1
    )
    for s, groups in enumerate(slices.groups):
        images = images.index_select(0, slices.order[s])
        parts, start = [], 0
        for op, count in groups:
            span = slice(start, start + count)
            part, start = images[span], start + count
            if op >= 0:
                parameters, fixed = slices.parameters[s, span], slices.fixed[s, span]
                operation, kind = program.operations[op], program.kinds[op]
                if (dimension := _mirrored(operation)) is not None:
                    part = part.flip(dimension)
                elif kind == Kind.AFFINE and bilinear:
                    part = affine_bilinear(part, parameters, uncovered)
                elif kind == Kind.AFFINE:
                    far = slices.far[s, span] if slices.far is not None else None
                    matrices = parameters if program.scales or far is not None else None
                    part = affine_nearest(part, fixed, uncovered, matrices, far)
                elif kind == Kind.CUTOUT:
                    part = cutout(part, fixed[:, :4], pixels.low)
                else:
                    centers = slices.centers[s, span]
                    part = run_with_magnitudes(operation, part, parameters[:, 0], centers, pixels)
            parts.append(part)
        images = torch.cat(parts)
    return images.index_select(0, slices.order[-1]).to(dtype)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Which dtype the batched kernels are given: torch can do little with other integers."""
    if dtype.is_floating_point:
        return torch.promote_types(dtype, torch.float32)
    return dtype if dtype == torch.uint8 else torch.int32


def run_with_magnitudes(
    operation: Operation,
    images: Tensor,
    magnitudes: Tensor,
    centers: Tensor,
    pixels: PixelFormat,
) -> Tensor:
    """Run an operation that moves no pixels, or a user's own.

    Args:
        operation: neither geometric nor a cutout, unless it has a kernel.
        images: (n, C, H, W) of a dtype of :func:`computed_in`.
        magnitudes: (n,) floating point, with their signs.
        centers: (n, 2) float32, for a kernel with randomness of its own.
        pixels: what the images are.

    Raises:
        TypeError: a user's own kernel returned no tensor.
        ValueError: it returned another shape than it was given.
    """
    if operation.kernel is not None:
        drawn = (centers,) if operation.random else ()
        return _run_own(operation, images, pixels, magnitudes, *drawn)
    row = TABLE[operation.name]
    if row.batched is None:
        return images
    return run_on_levels(row.batched, images, magnitudes, row.leaves_range, pixels)


def _run_own(
    operation: Operation,
    images: Tensor,
    pixels: PixelFormat,
    magnitudes: Tensor,
    *drawn: Tensor,
) -> Tensor:
    """Run a user's own kernel on colours in float32, the range of the images brought to [0, 1]."""
    own = f"kernel of operation {operation.name!r}"
    colors, span = images[:, : pixels.colors], pixels.high - pixels.low
    given = colors.float() if pixels.of_bytes else (colors.float() - pixels.low).clamp(0, span)
    given = given / span
    assert operation.kernel is not None
    result = operation.kernel(given, magnitudes.float(), *drawn)
    if not isinstance(result, Tensor):
        raise TypeError(f"{own} must return a tensor, got {type(result).__name__}")
    if result.shape != colors.shape:
        raise ValueError(
            f"{own} must return the shape it was given, {tuple(colors.shape)}, got "
            f"{tuple(result.shape)}"
        )
    same = result == given
    result = result.clamp(0, 1)
    if pixels.of_bytes:
        result = (result * 255).round().to(images.dtype)
    elif pixels.whole:
        result = (result * span).round() + pixels.low
        result = torch.where(same, colors, result.to(images.dtype))
    else:
        result = (result * span + pixels.low).to(images.dtype)
        result = as_they_came(colors, result, same)
    return torch.cat((result, images[:, pixels.colors :]), dim=1) if pixels.alpha else result


def _mirrored(operation: Operation) -> int | None:
    """The dimension that a built-in flip reverses."""
    own = operation.kernel is not None or operation.matrix is not None
    exact = None if own else TABLE[operation.name].exact
    return exact.mirrored if isinstance(exact, Affine) else None


def _sort(program: Program, actions: Actions, device: torch.device) -> Slices:
    drawn = program.look_up(actions)
    # One kernel serves all affine operations but flips: the first of them stands for the rest.
    stand_in = np.arange(len(program.kinds))
    flips = np.array([_mirrored(operation) is not None for operation in program.operations], bool)
    affine = np.flatnonzero((program.kinds == Kind.AFFINE) & ~flips)
    stand_in[affine] = affine[:1]
    kernels = np.where(drawn.kinds == Kind.IDENTITY, -1, stand_in[actions.ops.numpy()])
    used = [s for s in range(kernels.shape[1]) if (kernels[:, s] >= 0).any()]
    sorted_by = [np.argsort(kernels[:, s], kind="stable") for s in used]
    groups = []
    for s, sort in zip(used, sorted_by, strict=True):
        ops, counts = np.unique(kernels[sort, s], return_counts=True)
        groups.append(list(zip(ops.tolist(), counts.tolist(), strict=True)))
    previous = identity = np.arange(len(kernels))
    order = []
    for sort in [*sorted_by, identity]:
        order.append(np.argsort(previous)[sort])
        previous = sort
    return Slices(
        _upload(torch.from_numpy(np.stack(order)), device),
        _upload(_gather(drawn.parameters, used, sorted_by), device, wide_dtype(device)),
        _upload(_gather(drawn.fixed, used, sorted_by), device),
        _upload(_gather(actions.centers.numpy(), used, sorted_by), device),
        groups,
        _upload(_gather(drawn.far[..., None], used, sorted_by), device)[..., 0]
        if drawn.far.any()
        else None,
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
