"""The loop over a batch: every image goes through its steps, back and forth between two buffers.

Every kernel reads one image (C, H, W) and writes another, so that a chain of operations goes back
and forth between the result and one scratch image and copies nothing. Where channels lie side by
side, an image goes to planes first and back at the end, between two scratch images.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from ola_augment.kernels.kind import Kind
from ola_augment.kernels.loops.bilinear import affine_bytes, affine_levels
from ola_augment.kernels.loops.byte_levels import run_bytes
from ola_augment.kernels.loops.levels import run_levels
from ola_augment.kernels.loops.moves import copy, cutout, to_pixels, to_planes
from ola_augment.kernels.loops.nearest import (
    keeps_rows,
    shift_rows,
    take_bytes,
    take_levels,
    take_stepped,
    take_words,
)

_SIGNATURE = (
    "void(Array({0}, 4, 'C', readonly=True), {0}[:,:,:,::1], int64, int64[:,::1], "
    "float32[:,:,::1], int64[::1], float64[:,::1], int64[:,::1], {0}[::1], boolean, int64, "
    "float64[::1], {1}[::1], boolean)"
)
#: The signatures of ``run_batch``, by the dtype of the images; they have a precision of their own.
SIGNATURES = {
    "uint8": _SIGNATURE.format("uint8", "float32"),
    "uint16": _SIGNATURE.format("uint16", "float64"),
    "float32": _SIGNATURE.format("float32", "float32"),
}


def _run(  # type: ignore[no-untyped-def]
    kind, source, result, width, magnitude, weights, levels, whole, table, counts
):
    """What changes levels, of bytes or of all else."""
    run = run_bytes if source.dtype == np.uint8 else run_levels
    run(kind, source, result, width, magnitude, weights, levels, whole, table, counts)


@overload(_run, jit_options={"error_model": "numpy"})
def _run_compiled(  # type: ignore[no-untyped-def]
    kind, source, result, width, magnitude, weights, levels, whole, table, counts
):
    return run_bytes if source.dtype == types.uint8 else run_levels


def _interpolate(source, result, m, fill, levels):  # type: ignore[no-untyped-def]
    run = affine_bytes if source.dtype == np.uint8 else affine_levels
    run(source, result, m, fill, levels)


@overload(_interpolate, jit_options={"error_model": "numpy"})
def _interpolate_compiled(source, result, m, fill, levels):  # type: ignore[no-untyped-def]
    return affine_bytes if source.dtype == types.uint8 else affine_levels


_TAKES = {"uint8": take_bytes, "uint16": take_words}  # the others are not packed


def _take(source, result, f, fill):  # type: ignore[no-untyped-def]
    _TAKES.get(source.dtype.name, take_levels)(source, result, f, fill)


@overload(_take, jit_options={"error_model": "numpy"})
def _take_compiled(source, result, f, fill):  # type: ignore[no-untyped-def]
    return _TAKES.get(source.dtype.name, take_levels)


@njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
def run_batch(  # type: ignore[no-untyped-def]
    images, result, beside, rows, centers, kinds, parameters, fixed,
    fill, bilinear, colors, weights, levels, whole,
):  # fmt: skip
    """Apply the steps of every image from left to right.

    ``Kind.IDENTITY`` and ``Kind.BATCHED`` leave the image as it is.

    Args:
        images: (B, C, H, W) uint8, uint16 or float32, contiguous, as all of these; only read.
        result: (B, C, H, W) of the same type; written to.
        beside: 0, or how many channels there are if both hold pixels in the order (B, H, W, C),
            whatever their shape says; what else their shape has for a pixel is padding.
        rows: (B, S) int64, of the next four; -1 where there is no step.
        centers: (B, S, 2) float32, of cutouts.
        kinds: (R,) int64, of a ``Program``.
        parameters: (R, 6) float64.
        fixed: (R, 6) int64.
        fill: (C,) of the type of the images.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        colors: how many channels colours change; an alpha channel comes after them.
        weights: (colors,) float64 of the grey image; empty: Pillow's for three, else the mean.
        levels: (7,) float64 for uint16, otherwise float32: the range, the least and the most that
            may be stored, 1, 0, and what was added to levels to store those below 0; not of bytes.
        whole: whether levels are integers.
    """
    channels, height, width = images.shape[1:]
    channels = beside if beside else channels
    scratch = np.empty((channels, height, width), result.dtype)
    planes = np.empty((beside, height, width), result.dtype)
    table, counts = np.empty(256, np.uint8), np.empty(1024, np.int32)
    steps = np.empty(rows.shape[1], np.int64)
    black = np.empty(1, result.dtype)
    black[0] = levels[0]
    for i in range(len(images)):
        active = 0
        for s in range(rows.shape[1]):
            if rows[i, s] >= 0 and kinds[rows[i, s]] not in (Kind.IDENTITY, Kind.BATCHED):
                steps[active] = s
                active += 1
        source, last = images[i], result[i]
        if active == 0:
            copy(source.ravel(), last.ravel())
        elif beside:
            last = planes
            first = planes if active % 2 == 0 else scratch
            to_planes(source.ravel(), first.reshape(channels, -1))
            source = first
        for j in range(active):
            s = steps[j]
            row = rows[i, s]
            kind, parameter = kinds[row], parameters[row]
            # The last step writes the result, the one before it the scratch image, ...
            target = scratch if (active - j) % 2 == 0 else last
            if bilinear and (kind == Kind.AFFINE or kind == Kind.STEPPED):
                _interpolate(source, target, parameter, fill, levels)  # type: ignore[no-untyped-call]
            elif kind == Kind.STEPPED:
                take_stepped(source, target, parameter, fill)
            elif kind == Kind.AFFINE or kind == Kind.SHIFT:
                if keeps_rows(fixed[row]):
                    shift_rows(source, target, fixed[row], fill)
                else:
                    _take(source, target, fixed[row], fill)  # type: ignore[no-untyped-call]
            elif kind == Kind.CUTOUT:
                cutout(source, target, parameter[0], centers[i, s], black[0])
            else:
                flat, flat_target = source.reshape(channels, -1), target.reshape(channels, -1)
                for c in range(colors, channels):
                    copy(flat[c], flat_target[c])
                _run(  # type: ignore[no-untyped-call]
                    kind, flat[:colors], flat_target[:colors], width, parameter[0],
                    weights, levels, whole, table, counts,
                )  # fmt: skip
            source = target
        if beside and active > 0:
            to_pixels(planes.reshape(channels, -1), result[i].ravel())
