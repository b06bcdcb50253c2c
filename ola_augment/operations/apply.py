"""Actions and images in, images out: which kernels run where."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment.actions import Actions, check_actions
from ola_augment.kernels.compiled import KERNELS, RunBatch
from ola_augment.kernels.kind import Kind
from ola_augment.operations.batched import apply_batched, run_with_magnitudes
from ola_augment.operations.checks import (
    Fill,
    as_fill,
    check_images,
    check_scale,
    fill_per_channel,
    is_bilinear,
)
from ola_augment.operations.program import Program, program
from ola_augment.operations.single import Step, run_on_tensor, steps_of
from ola_augment.space import SearchSpace

#: At least half a millisecond of work for each thread: starting one takes a tenth of that.
_VALUES_PER_THREAD = 2**18
#: Without compiled kernels fewer images than these, or larger ones, go one by one through Pillow.
_FEW, _LARGE = 16, 64 * 64


def apply_actions(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    *,
    interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
    fill: Fill = 0,
) -> Tensor:
    """Apply to every example the operations that were drawn for it, slots from left to right.

    uint8 images on the CPU take the exact kernels, equal to Pillow bit for bit: Pillow's own for
    one image, compiled ones for batches (batched ones until these are compiled). All others take
    the batched kernels: uint8 equal to Pillow as well (computed in double precision where Pillow
    is), floating images without any rounding, so that k / 255 gives the uint8 result to within 1.5
    grey levels per operation, and differentiable where the operation is. Only what an operation
    changes is clamped to [0, 1], if it can lead out; all else comes back bit for bit. Autocast is
    ignored, and ``torch.compile`` leaves the call as it is.

    Args:
        images: (B, C, H, W) with C 1 or 3, uint8 or floating point in [0, 1], on any device and in
            any memory layout; B may be 0, H and W not. What resizing leaves outside of [0, 1] is
            accepted. Never written to.
        space: that the actions were drawn from.
        actions: of B examples, on the CPU. A slot whose ``keep`` is False is skipped.
        interpolation: NEAREST (or NEAREST_EXACT, the same here) or BILINEAR, for rotate, shear and
            translate; a mode, its name, or Pillow's number for it.
        fill: one value, or one per channel, for the pixels that these uncover: in 0 .. 255
            (truncated) for uint8 images, in [0, 1] for floating ones; None is 0.

    Returns:
        A new tensor of the shape, dtype and device of ``images``; channels_last if they are.

    Raises:
        TypeError, ValueError: an argument that is not as said, naming it (values of floating images
            are looked at on the CPU only); actions that break an invariant of :class:`Actions`; a
            magnitude that leaves what its operation accepts at this size; a user's own kernel or
            matrix that returned something else than a tensor of the right shape.

    Example:
        >>> from ola_augment import OLAPolicy
        >>> policy, images = OLAPolicy(), torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        >>> apply_actions(images, policy.space, policy.sample(8)).shape
        torch.Size([8, 3, 32, 32])
    """
    result: Tensor = _check_and_run(images, space, actions, interpolation, fill)
    return result


def compile_kernels() -> None:
    """Compile the kernels for uint8 batches now, or load them, and wait for it.

    Without this they are compiled by another process while batched kernels serve, and kept on
    disk: in ``NUMBA_CACHE_DIR``, the user's cache or among the temporary files. Call it where
    images of machines are built, and before measuring.
    """
    KERNELS.wait()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_and_run(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    interpolation: InterpolationMode | str | int,
    fill: Fill,
) -> Tensor:
    check_images(images)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    check_actions(actions, space, len(images))
    if images.device.type == "cpu" and bool(actions.keep.any()):
        check_scale([images])
    values = fill_per_channel(as_fill(fill), images.shape[1], images.dtype == torch.uint8)
    result: Tensor = run_actions(images, space, actions, values, is_bilinear(interpolation))
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_actions(
    images: Tensor, space: SearchSpace, actions: Actions, fill: tuple[float, ...], bilinear: bool
) -> Tensor:
    """:func:`apply_actions` without its checks, for what was checked or drawn here.

    Args:
        images: (B, C, H, W), uint8 or floating in [0, 1].
        space: that the actions were drawn from.
        actions: of B examples.
        fill: one value per channel.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.

    Returns:
        A new tensor of the shape, dtype and device of ``images``.
    """
    height, width = images.shape[2:]
    whole = images.dtype == torch.uint8 and images.device.type == "cpu"
    run_batch = KERNELS.ready() if whole and len(images) > 1 else None
    few = 0 < len(images) < _FEW or (len(images) > 0 and height * width > _LARGE)
    with torch.autocast(images.device.type, enabled=False):
        if run_batch:
            table = program(space, height, width)
            apply = _apply_mixed if Kind.BATCHED in table.kinds else _apply_exact
            result = apply(run_batch, images, table, actions, fill, bilinear)
        elif whole and few:
            pairs = zip(images, steps_of(actions), strict=True)
            parts = [run_on_tensor(image, space, steps, fill, bilinear) for image, steps in pairs]
            result = torch.stack(parts)
        else:
            table = program(space, height, width)
            result = apply_batched(images, table, actions, fill, bilinear)
    return _laid_out_as(images, result)


def run_one(
    image: Tensor, space: SearchSpace, steps: list[Step], fill: tuple[float, ...], bilinear: bool
) -> Tensor:
    """:func:`run_actions` for one image (C, H, W) uint8 on the CPU."""
    result = run_on_tensor(image, space, steps, fill, bilinear)
    return result if image.is_contiguous() else _laid_out_as(image[None], result[None])[0]


def _laid_out_as(images: Tensor, result: Tensor) -> Tensor:
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return result
    return result.contiguous(memory_format=torch.channels_last)


def _apply_exact(
    run_batch: RunBatch,
    images: Tensor,
    program: Program,
    actions: Actions,
    fill: tuple[float, ...],
    bilinear: bool,
) -> Tensor:
    """Apply actions to uint8 images on the CPU, equal to Pillow bit for bit.

    Operations without a compiled kernel are left out. With more than one torch thread a large
    batch is divided among as many Python threads, which the kernels let run at once.

    Args:
        run_batch: compiled.
        images: (B, C, H, W) uint8 on the CPU, in any memory layout; not written to.
        program: of the images' size and the actions' space.
        actions: of B examples.
        fill: C values in 0 .. 255 for the pixels that a geometric operation uncovers, truncated.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.

    Returns:
        (B, C, H, W) uint8, contiguous.
    """
    result = torch.empty(images.shape, dtype=torch.uint8, device="cpu")
    arrays = (
        images.contiguous().numpy(),
        result.numpy(),
        *(
            np.ascontiguousarray(field.numpy())
            for field in (
                actions.ops,
                actions.keep,
                actions.magnitude_bins,
                actions.signs,
                actions.centers,
            )
        ),
    )
    constants = (
        program.kinds,
        program.parameters,
        program.fixed,
        program.tables,
        np.array(fill).astype(np.uint8),
        bilinear,
    )
    parts = max(1, min(torch.get_num_threads(), images.numel() // _VALUES_PER_THREAD))
    size = max(1, -(-len(images) // parts))

    def run(start: int) -> None:
        run_batch(*(array[start : start + size] for array in arrays), *constants)

    if parts == 1:
        run(0)
    else:
        with ThreadPoolExecutor(parts - 1) as pool:
            others = pool.map(run, range(size, len(images), size))
            run(0)
            list(others)  # raises what a thread raised
    return result


def _apply_mixed(
    run_batch: RunBatch,
    images: Tensor,
    table: Program,
    actions: Actions,
    fill: tuple[float, ...],
    bilinear: bool,
) -> Tensor:
    """Slot by slot: the compiled kernels, then the operations that have none."""
    drawn = table.look_up(actions)
    magnitudes = torch.from_numpy(drawn.parameters[..., 0])
    for s in range(actions.ops.shape[1]):
        slot = Actions(*(field[:, s : s + 1] if field.ndim > 1 else field for field in actions))
        images = _apply_exact(run_batch, images, table, slot, fill, bilinear)
        others = np.where(drawn.kinds[:, s] == Kind.BATCHED, actions.ops[:, s].numpy(), -1)
        for op in np.unique(others[others >= 0]):
            chosen = torch.from_numpy(np.flatnonzero(others == op))
            images[chosen] = run_with_magnitudes(
                table.space.operations[op],
                images[chosen],
                magnitudes[chosen, s],
                actions.centers[chosen, s],
            )
    return images
