"""Batches on the CPU through the compiled loop, in the types that it is compiled for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ola_augment.kernels.compiled import KERNELS, CompiledKernels
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.pixel_format import PixelFormat
from ola_augment.operations.executors.own import computed_in, run_with_magnitudes
from ola_augment.operations.steps import Rendering, Steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Array = NDArray[Any]

#: At least half a millisecond of work for each thread: starting one takes a tenth of that.
_VALUES_PER_THREAD = 2**18
#: Added to 16-bit levels below 0, which are stored as what has no sign.
_BIAS = 2**15


def run(images: Tensor, steps: Steps, rendering: Rendering) -> Tensor:
    """Apply steps to images on the CPU; bytes are equal to Pillow's bit for bit.

    With more than one torch thread a large batch is divided among as many Python threads, which the
    kernels let run at once. Operations without a compiled kernel follow slot by slot.

    Args:
        images: (B, C, H, W) on the CPU, in any memory layout; not written to.
        steps: of each image.
        rendering: how they are applied.

    Returns:
        (B, C, H, W) of the dtype of ``images``, contiguous, or channels_last if they are.
    """
    pixels, program = rendering.pixels, steps.program
    constants = _constants(rendering)
    if not program.has_batched and _is_interleaved(images):
        beside = images.movedim(1, -1)
        source = _array(beside, pixels).reshape(images.shape)
        done = _restored(_loop(source, steps, constants, images.shape[1]), pixels)
        return done.view(beside.shape).movedim(-1, 1)
    source = _array(images, pixels)
    if not program.has_batched:
        return _restored(_loop(source, steps, constants), pixels)
    result = images
    for s in range(steps.rows.shape[1]):
        slot = Steps(program, steps.rows[:, s : s + 1], steps.centers[:, s : s + 1])
        result = _restored(_loop(source, slot, constants), pixels)
        rows = steps.rows[:, s]
        own = (rows >= 0) & (program.kinds[rows] == Kind.BATCHED)
        of = np.where(own, program.of[rows], -1)
        for op in np.unique(of[own]):
            chosen = np.flatnonzero(of == op)
            part = torch.from_numpy(result.numpy()[chosen]).to(computed_in(result.dtype))
            magnitudes = torch.from_numpy(program.parameters[rows[chosen], 0])
            centers = torch.from_numpy(steps.centers[chosen, s])
            operation = program.operations[op]
            part = run_with_magnitudes(operation, part, magnitudes, centers, pixels)
            result.numpy()[chosen] = part.to(result.dtype).numpy()
        source = _array(result, pixels)
    return result


def run_on_array(image: _Array, steps: Steps, rendering: Rendering) -> _Array:
    """Apply steps to one image of bytes (H, W, C), contiguous; a new array.

    None of the steps is one without a compiled kernel. What C has more than the image has channels
    is padding, and 255 in the result.
    """
    height, width, stored = image.shape
    source = image.reshape(1, stored, height, width)
    beside = rendering.pixels.channels if stored > 1 else 0
    return _loop(source, steps, _constants(rendering), beside).reshape(image.shape)


def kernels_for(pixels: PixelFormat) -> CompiledKernels:
    """Those that are compiled for what the loop makes of such images."""
    return KERNELS["uint8" if pixels.of_bytes else "uint16" if pixels.whole else "float32"]


def _is_interleaved(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _loop(source: _Array, steps: Steps, constants: tuple[Any, ...], beside: int = 0) -> _Array:
    kernels = KERNELS[source.dtype.name]
    run_batch = kernels.ready() or kernels.wait()
    result, program = np.empty_like(source), steps.program
    rows, centers = np.ascontiguousarray(steps.rows), np.ascontiguousarray(steps.centers)
    table = (program.kinds, program.parameters, program.fixed)
    parts = max(1, min(torch.get_num_threads(), source.size // _VALUES_PER_THREAD))
    size = max(1, -(-len(source) // parts))

    def run(start: int) -> None:
        some = slice(start, start + size)
        mine = source[some], result[some], beside, rows[some], centers[some]
        run_batch(*mine, *table, *constants)

    if parts == 1:
        run(0)
    else:
        with ThreadPoolExecutor(parts - 1) as pool:
            others = pool.map(run, range(size, len(source), size))
            run(0)
            list(others)  # raises what a thread raised
    return result


@lru_cache(maxsize=256)
def _constants(rendering: Rendering) -> tuple[Any, ...]:
    """What the loop is given beside images and steps; shared between calls, not to be written."""
    pixels, fill = rendering.pixels, np.array(rendering.fill)
    bias = _BIAS if pixels.dtype == torch.int16 else 0
    dtype: np.dtype[Any]
    least, most, dtype = -np.inf, np.inf, np.dtype("f4")
    if pixels.whole:
        held = torch.iinfo(pixels.dtype)
        least, most = held.min + bias, held.max + bias
        fill, dtype = np.trunc(fill) + bias, np.dtype("u1" if pixels.of_bytes else "u2")
    ends = (pixels.low + bias, pixels.high + bias, least, most, 1, 0, bias)
    work = np.float64 if dtype == np.uint16 else np.float32
    weights = np.array(pixels.grey or (), np.float64)
    return (
        *(fill.astype(dtype), rendering.bilinear, pixels.colors, weights),
        *(np.array(ends, work), pixels.whole),
    )


def _array(images: Tensor, pixels: PixelFormat) -> _Array:
    """Bytes, uint16 or float32, contiguous; a view where these are there."""
    if pixels.dtype == torch.int16:
        array: _Array = images.contiguous().numpy().view(np.uint16) ^ np.uint16(_BIAS)
        return array
    if pixels.whole and not pixels.of_bytes:
        images = images.to(torch.uint16)
    elif not pixels.whole:
        images = images.detach().float()
    return images.contiguous().numpy()


def _restored(result: _Array, pixels: PixelFormat) -> Tensor:
    if pixels.dtype == torch.int16:
        result ^= np.uint16(_BIAS)
        result = result.view(np.int16)
    return torch.from_numpy(result).to(pixels.dtype)
