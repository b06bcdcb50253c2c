"""Actions and images in, images out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment.actions import Actions, check_actions, unwrapped_actions
from ola_augment.kernels.compiled import KERNELS
from ola_augment.kernels.functional import beside
from ola_augment.kernels.pixel_format import (
    ValueRange,
    as_grey_weights,
    as_value_range,
    pixel_format,
)
from ola_augment.operations.checks import (
    Fill,
    as_fill,
    check_channels,
    check_images,
    check_scale,
    fill_per_channel,
    is_bilinear,
)
from ola_augment.operations.executors import choose
from ola_augment.operations.program import Slots, program, program_of_one, steps_of_one
from ola_augment.operations.steps import Rendering, Steps
from ola_augment.space import SearchSpace


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

    uint8 images are equal to Pillow bit for bit, band by band: on the CPU by compiled kernels
    (Pillow or the batched ones until these are compiled), by the batched kernels on other devices.
    Other integers follow the same formulas over the levels of their range in double precision.
    Floating images are rounded nowhere, so that k / 255 gives the uint8 result to within 1.5 grey
    levels per operation, and differentiable where the operation is. Only what an operation changes
    is clamped to the range, if it can lead out; all else comes back bit for bit.
    Autocast is ignored, and ``torch.compile`` leaves the call as it is.

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
    for kernels in KERNELS.values():
        kernels.wait()


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
    actions = unwrapped_actions(actions)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    ends, grey = as_value_range(value_range), as_grey_weights(grey_weights)
    pixels = pixel_format(images.dtype, images.shape[1], ends, grey)
    check_channels(space, pixels.colors)
    check_actions(actions, space, len(images))
    if images.device.type == "cpu" and bool(actions.keep.any()):
        check_scale([images], pixels)
    values = fill_per_channel(as_fill(fill, ends), pixels)
    rendering = Rendering(values, is_bilinear(interpolation), pixels)
    result: Tensor = run_actions(images, space, actions, rendering)
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_actions(
    images: Tensor, space: SearchSpace, actions: Actions, rendering: Rendering
) -> Tensor:
    """:func:`apply_actions` without its checks, for what was checked or drawn here.

    Args:
        images: (B, C, H, W).
        space: that the actions were drawn from.
        actions: of B examples.
        rendering: how they are applied.

    Returns:
        A new tensor of the shape, dtype and device of ``images``.
    """
    size = tuple(images.shape[2:])
    with beside():
        if len(images) == 1:
            steps = program_of_one(steps_of_one(space, slots_of(actions), *size), *size)
        else:
            steps = program(space, *size).steps(actions)
    return run_steps(images, steps, rendering)


def run_steps(images: Tensor, steps: Steps, rendering: Rendering) -> Tensor:
    """Apply steps to images (B, C, H, W) by the executor for them, in their memory layout."""
    images = images.resolve_neg()  # of a conjugate's imaginary part
    with _without_autocast(images.device.type):
        result = choose(images, steps, rendering).run(images, steps, rendering)
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return result
    return result.contiguous(memory_format=torch.channels_last)


def slots_of(actions: Actions) -> Slots:
    """The slots of the first example in plain numbers."""
    fields = (field[0].tolist() for field in actions[1:6])
    return [(op, kept, k, sign, (y, x)) for op, kept, k, sign, (y, x) in zip(*fields, strict=True)]


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Entering and leaving costs more than a small image does: only where there is some."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
