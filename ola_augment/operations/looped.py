"""Batches on the CPU through the compiled loops, in the types that these are compiled for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ola_augment.actions import Actions
from ola_augment.kernels.compiled import RunBatch
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.pixel_format import PixelFormat
from ola_augment.operations.batched import computed_in, run_with_magnitudes
from ola_augment.operations.program import Program

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Array = NDArray[Any]

#: At least half a millisecond of work for each thread: starting one takes a tenth of that.
_VALUES_PER_THREAD = 2**18
#: Added to 16-bit levels below 0, which are stored as what has no sign.
_BIAS = 2**15


def apply_looped(
    run_batch: RunBatch,
    images: Tensor,
    program: Program,
    actions: Actions,
    fill: tuple[float, ...],
    bilinear: bool,
    pixels: PixelFormat,
) -> Tensor:
    """Apply actions to images on the CPU; bytes are equal to Pillow's bit for bit.

    With more than one torch thread a large batch is divided among as many Python threads, which the
    kernels let run at once. Operations without a compiled kernel follow slot by slot.

    Args:
        run_batch: compiled, of ``exact.py`` for bytes of the whole range, else of ``ranged.py``.
        images: (B, C, H, W) on the CPU, in any memory layout; not written to.
        program: of the images' size and the actions' operations.
        actions: of B examples.
        fill: C values for the pixels that a geometric operation uncovers, truncated for integers.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        pixels: what the images are.

    Returns:
        (B, C, H, W) of the dtype of ``images``, contiguous.
    """
    source, constants = _prepared(images, program, fill, bilinear, pixels)
    kinds = program.kinds if pixels.of_bytes else program.ranged
    if Kind.BATCHED not in kinds:
        return _restored(_run(run_batch, source, actions, constants), pixels)
    drawn = program.look_up(actions)
    magnitudes = torch.from_numpy(drawn.parameters[..., 0])
    result = images
    for s in range(actions.ops.shape[1]):
        slot = Actions(*(field[:, s : s + 1] if field.ndim > 1 else field for field in actions))
        result = _restored(_run(run_batch, source, slot, constants), pixels)
        ops = actions.ops[:, s].numpy()
        left = (drawn.kinds[:, s] != Kind.IDENTITY) & (kinds[ops] == Kind.BATCHED)
        others = np.where(left, ops, -1)
        for op in np.unique(others[others >= 0]):
            chosen = np.flatnonzero(others == op)
            part = torch.from_numpy(result.numpy()[chosen]).to(computed_in(result.dtype))
            part = run_with_magnitudes(
                program.operations[op],
                part,
                magnitudes[chosen, s],
                actions.centers[chosen, s],
                pixels,
            )
            result.numpy()[chosen] = part.to(result.dtype).numpy()
        source = _array(result, pixels)
    return result


def _run(
    run_batch: RunBatch, source: _Array, actions: Actions, constants: tuple[Any, ...]
) -> _Array:
    result = np.empty_like(source)
    fields = (*(actions.ops, actions.keep, actions.magnitude_bins, actions.signs, actions.centers),)
    arrays = (source, result, *(np.ascontiguousarray(field.numpy()) for field in fields))
    parts = max(1, min(torch.get_num_threads(), source.size // _VALUES_PER_THREAD))
    size = max(1, -(-len(source) // parts))

    def run(start: int) -> None:
        run_batch(*(array[start : start + size] for array in arrays), *constants)

    if parts == 1:
        run(0)
    else:
        with ThreadPoolExecutor(parts - 1) as pool:
            others = pool.map(run, range(size, len(source), size))
            run(0)
            list(others)  # raises what a thread raised
    return result


def _prepared(
    images: Tensor, program: Program, fill: tuple[float, ...], bilinear: bool, pixels: PixelFormat
) -> tuple[_Array, tuple[Any, ...]]:
    """The images as a loop takes them, and what it is given beside them and the actions."""
    source, weights = _array(images, pixels), np.array(pixels.grey or (), np.float64)
    if pixels.of_bytes:
        return source, (
            *(program.kinds, program.parameters, program.fixed, program.tables),
            *(np.array(fill).astype(np.uint8), bilinear, pixels.colors, weights),
        )
    bias = _BIAS if pixels.dtype == torch.int16 else 0
    least, most = -np.inf, np.inf
    if pixels.whole:
        held = torch.iinfo(pixels.dtype)
        least, most = held.min + bias, held.max + bias
    ends = (pixels.low + bias, pixels.high + bias, least, most, 1, 0, bias)
    work = np.float64 if pixels.whole else np.float32
    uncovered = (np.trunc(fill) + bias if pixels.whole else np.array(fill)).astype(source.dtype)
    return source, (
        *(program.ranged, program.parameters, program.fixed, program.neutral),
        *(np.array(ends, work), uncovered, bilinear, pixels.colors, weights, pixels.whole),
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


def has_memory(images: Tensor) -> bool:
    """Whether a tensor is one of plain numbers: not inside of ``torch.func``, not fake."""
    try:
        images.data_ptr()
    except RuntimeError:
        return False
    return unpack_dual(images).tangent is None  # type: ignore[no-untyped-call]
