"""Actions and images in, images out: which kernels run where."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment.actions import Actions, check_actions
from ola_augment.kernels.compiled import KERNELS, RANGED, RunBatch
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.pixel_format import (
    PixelFormat,
    ValueRange,
    as_grey_weights,
    as_value_range,
    pixel_format,
)
from ola_augment.operations.batched import apply_batched
from ola_augment.operations.checks import (
    Fill,
    as_fill,
    check_channels,
    check_images,
    check_scale,
    fill_per_channel,
    is_bilinear,
)
from ola_augment.operations.looped import apply_looped, has_memory
from ola_augment.operations.program import program
from ola_augment.operations.single import Step, program_of_one, run_on_tensor, steps_of
from ola_augment.space import SearchSpace

#: Without compiled kernels fewer images than these, or larger ones, go one by one through Pillow.
_FEW, _LARGE = 16, 64 * 64


def apply_actions(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    *,
    interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
    fill: Fill = None,
    value_range: ValueRange | None = None,
    grey_weights: Sequence[float] | None = None,
) -> Tensor:
    """Apply to every example the operations that were drawn for it, slots from left to right.

    uint8 images are equal to Pillow bit for bit, band by band: on the CPU by Pillow itself for one
    image of 1 or 3 channels, by compiled kernels for batches (batched ones until these are
    compiled), by the batched kernels on other devices. Other integers follow the same formulas over
    the levels of their range in double precision. Floating images are rounded nowhere, so that
    k / 255 gives the uint8 result to within 1.5 grey levels per operation, and differentiable where
    the operation is. Only what an operation changes is clamped to the range, if it can lead out;
    all else comes back bit for bit. Autocast is ignored, and ``torch.compile`` leaves the call as
    it is.

    Args:
        images: (B, C, H, W) with any C, uint8, uint16, int16 or floating point, on any device and
            in any memory layout; B may be 0, the others not. What resizing leaves outside of the
            range is accepted. Never written to.
        space: that the actions were drawn from.
        actions: of B examples, on the CPU. A slot whose ``keep`` is False is skipped.
        interpolation: NEAREST (or NEAREST_EXACT, the same here) or BILINEAR, for rotate, shear and
            translate; a mode, its name, or Pillow's number for it.
        fill: one value, or one per channel, for the pixels that these uncover, in the range of the
            images (truncated for integers); None is black, its low end.
        value_range: (low, high), what is black and white; None: 0 .. 255 for uint8, 0 .. 65535 for
            uint16, 0 .. 1 for floats. int16 needs it.
        grey_weights: one weight per channel of the grey image that color and contrast blend with,
            0 or more, brought to a sum of 1; None: Pillow's for 3 channels, else the mean.

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
    result: Tensor = _check_and_run(
        images, space, actions, interpolation, fill, value_range, grey_weights
    )
    return result


def compile_kernels() -> None:
    """Compile the kernels for batches on the CPU now, or load them, and wait for it.

    Without this they are compiled by another process while batched kernels serve, and kept on
    disk: in ``NUMBA_CACHE_DIR``, the user's cache or among the temporary files. Call it where
    images of machines are built, and before measuring.
    """
    KERNELS.wait()
    RANGED.wait()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_and_run(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    interpolation: InterpolationMode | str | int,
    fill: Fill,
    value_range: ValueRange | None,
    grey_weights: Sequence[float] | None,
) -> Tensor:
    check_images(images)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    ends, grey = as_value_range(value_range), as_grey_weights(grey_weights)
    pixels = pixel_format(images.dtype, images.shape[1], ends, grey)
    check_channels(space, pixels.colors)
    check_actions(actions, space, len(images))
    if images.device.type == "cpu" and bool(actions.keep.any()):
        check_scale([images], pixels)
    values = fill_per_channel(as_fill(fill, ends), pixels)
    result: Tensor = run_actions(images, space, actions, values, is_bilinear(interpolation), pixels)
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_actions(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    fill: tuple[float, ...],
    bilinear: bool,
    pixels: PixelFormat,
) -> Tensor:
    """:func:`apply_actions` without its checks, for what was checked or drawn here.

    Args:
        images: (B, C, H, W).
        space: that the actions were drawn from.
        actions: of B examples.
        fill: one value per channel.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        pixels: what the images are.

    Returns:
        A new tensor of the shape, dtype and device of ``images``.
    """
    height, width = images.shape[2:]
    whole = pixels.of_pillow and images.device.type == "cpu"
    alone = len(images) == 1
    few = 0 < len(images) < _FEW or (len(images) > 0 and height * width > _LARGE)
    run_batch = None if whole and alone else _loop(images, pixels)
    with _without_autocast(images.device.type):
        if whole and few and not run_batch:
            pairs = zip(images, steps_of(actions), strict=True)
            parts = [run_on_tensor(image, space, steps, fill, bilinear) for image, steps in pairs]
            return _laid_out_as(images, torch.stack(parts))
        if alone:
            # Tables for every bin of a space cost more than the operations of one image do.
            table, actions = program_of_one(space, actions, height, width)
        else:
            table = program(space, height, width)
        if run_batch and not (images.is_floating_point() and Kind.BATCHED in table.kinds):
            result = apply_looped(run_batch, images, table, actions, fill, bilinear, pixels)
        else:  # a kernel of the user may be differentiated
            result = apply_batched(images, table, actions, fill, bilinear, pixels)
    return _laid_out_as(images, result)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Entering and leaving costs more than a small image does: only where there is some."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def run_one(
    image: Tensor,
    space: SearchSpace,
    steps: list[Step],
    fill: tuple[float, ...],
    bilinear: bool,
) -> Tensor:
    """:func:`run_actions` for one image (C, H, W) uint8 of 1 or 3 channels on the CPU."""
    result = run_on_tensor(image, space, steps, fill, bilinear)
    return result if image.is_contiguous() else _laid_out_as(image[None], result[None])[0]


def _loop(images: Tensor, pixels: PixelFormat) -> RunBatch | None:
    """The compiled loop for these images; None if there is none, not yet, or no gradient of it."""
    if images.device.type != "cpu":
        return None
    if pixels.of_bytes:
        return KERNELS.ready()
    tracked = images.requires_grad and torch.is_grad_enabled()
    if pixels.dtype == torch.float64 or tracked or not has_memory(images):
        return None
    return RANGED.ready()


def _laid_out_as(images: Tensor, result: Tensor) -> Tensor:
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return result
    return result.contiguous(memory_format=torch.channels_last)
