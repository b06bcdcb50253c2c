"""What applies steps to images: executors side by side, and the table that chooses one.

Each has ``run(images, steps, rendering)``: images (B, C, H, W), which are not written to, to a new
tensor of their shape, dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ola_augment.kernels.compiled import KERNELS
from ola_augment.kernels.kind import GEOMETRIC, Kind
from ola_augment.operations.executors import batched, compiled, pillow
from ola_augment.operations.steps import Rendering, Step, Steps

#: Larger images than these, or fewer, go through Pillow until there is a compiled loop.
_LARGE, _FEW = 64 * 64, 16

Run = Callable[[Tensor, Steps, Rendering], Tensor]


class Executor(NamedTuple):
    """A way to apply steps.

    Attributes:
        name: for people.
        takes: whether it is the one for these images, given that none above it is.
        run: applies them.
    """

    name: str
    takes: Callable[[Tensor, Steps, Rendering], bool]
    run: Run


def _in_a_loop(images: Tensor, steps: Steps, rendering: Rendering) -> bool:
    if images.device.type != "cpu" or not has_memory(images):
        return False
    if rendering.pixels.of_bytes:
        return KERNELS["uint8"].ready() is not None
    tracked = images.requires_grad and torch.is_grad_enabled()
    if images.dtype == torch.float64 or tracked or _is_dual(images):
        return False
    # A kernel of the user's may be differentiated.
    own = images.is_floating_point() and steps.program.has_batched
    return not own and compiled.kernels_for(rendering.pixels).ready() is not None


def _few_or_large(images: Tensor, steps: Steps, rendering: Rendering) -> bool:
    few = 0 < len(images) < _FEW or (len(images) > 0 and _pixels(images) > _LARGE)
    return few and _for_pillow(images, rendering)


def _for_pillow(images: Tensor, rendering: Rendering) -> bool:
    return rendering.pixels.of_pillow and images.device.type == "cpu" and has_memory(images)


def _pixels(images: Tensor) -> int:
    return images.shape[2] * images.shape[3]


def has_memory(images: Tensor) -> bool:
    """Whether a tensor is one of plain numbers: not inside of ``torch.func``, not fake."""
    try:
        images.data_ptr()
    except RuntimeError:
        return False
    return True


def _is_dual(images: Tensor) -> bool:
    return unpack_dual(images).tangent is not None  # type: ignore[no-untyped-call]


#: From the top, the first that takes the images runs them.
EXECUTORS = (
    #        name, which images, how
    Executor("the compiled loop, on the CPU", _in_a_loop, compiled.run),
    Executor("Pillow while it is being compiled", _few_or_large, pillow.run),
    Executor("batched kernels, on any device", lambda *_: True, batched.run),
)


def is_fastest_in_pillow(steps: list[Step], height: int, width: int, of_pil: bool) -> bool:
    """Whether steps of one picture of bytes, of one or three channels, are, or must be.

    To take a PIL image out and put it back costs as much as one step in a small image, or one that
    moves pixels.
    """
    if of_pil and len(steps) < 2:
        moving = all(step.kind in GEOMETRIC or step.kind == Kind.CUTOUT for step in steps)
        if moving or height * width <= _LARGE:
            return True
    return KERNELS["uint8"].ready() is None


def choose(images: Tensor, steps: Steps, rendering: Rendering) -> Executor:
    """The executor for these images."""
    return next(e for e in EXECUTORS if e.takes(images, steps, rendering))
