"""One uint8 image on the CPU: an operation at a time through Pillow, only what was drawn.

Tables for every bin of a space, and the call of a compiled kernel, would cost more than the
operations of one small image do.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.kernels import pillow
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.pixel_format import pixel_format
from ola_augment.operation import inside
from ola_augment.operations.batched import run_with_magnitudes
from ola_augment.operations.program import (
    Program,
    kind_of,
    look_up_table,
    matrices,
    tabulated,
)
from ola_augment.space import SearchSpace

#: One applied operation: its index, bin, sign -1 or +1, and centre (y, x).
Step = tuple[int, int, int, tuple[float, float]]


def steps_of(actions: Actions) -> list[list[Step]]:
    """The kept slots of each example."""
    fields = (field.tolist() for field in actions[1:6])
    return [
        [(op, k, sign, (y, x)) for op, kept, k, sign, (y, x) in zip(*example, strict=True) if kept]
        for example in zip(*fields, strict=True)
    ]


def program_of_one(
    space: SearchSpace, actions: Actions, height: int, width: int
) -> tuple[Program, Actions]:
    """What was drawn for one example as operations of one bin each, and what applies them.

    Raises:
        ValueError, TypeError: as of :func:`~ola_augment.operations.program.program`.
    """
    _check_reach(space, height, width)
    last = space.num_magnitude_bins
    slots = torch.nonzero(actions.keep[0])[:, 0]
    chosen = (actions.ops[0, slots].tolist(), actions.magnitude_bins[0, slots].tolist())
    drawn = list(zip(*chosen, strict=True))
    operations = tuple(space.operations[op] for op, _ in drawn)
    magnitudes = [space.operations[op].magnitude(k, last, height, width) for op, k in drawn]
    program = tabulated(operations, np.array(magnitudes).reshape(-1, 1), height, width)
    indices = torch.arange(len(slots), device="cpu")[None]
    return program, Actions(
        num_ops=torch.tensor([len(slots)], device="cpu"),
        ops=indices,
        keep=torch.ones_like(indices, dtype=torch.bool),
        magnitude_bins=torch.zeros_like(indices),
        signs=actions.signs[:, slots],
        centers=actions.centers[:, slots],
        log_prob=actions.log_prob,
    )


def run_on_tensor(
    image: Tensor, space: SearchSpace, steps: list[Step], fill: tuple[float, ...], bilinear: bool
) -> Tensor:
    """Apply operations to an image (C, H, W) uint8 in any layout; a new contiguous tensor."""
    picture = pillow.from_array(image.numpy())
    result = run_on_image(picture, space, steps, fill, bilinear)
    return torch.from_numpy(pillow.to_array(result))


def run_on_image(
    image: Image.Image,
    space: SearchSpace,
    steps: list[Step],
    fill: tuple[float, ...],
    bilinear: bool,
) -> Image.Image:
    """Apply operations to an image of mode L or RGB.

    Args:
        image: not written to; returned itself where nothing changes it.
        space: that the operations were drawn from.
        steps: what to apply, in this order.
        fill: a value for each channel in 0 .. 255, truncated.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.

    Raises:
        ValueError, TypeError: as of :func:`~ola_augment.operations.apply_actions`.
    """
    _check_reach(space, image.height, image.width)
    result = image
    for step in steps:
        result = _run(result, space, step, fill, bilinear)
    if result is not image:  # what Pillow keeps beside the pixels: the orientation, the profile
        result.info = image.info.copy()
    return result


def _run(
    image: Image.Image, space: SearchSpace, step: Step, fill: tuple[float, ...], bilinear: bool
) -> Image.Image:
    op, magnitude_bin, sign, center = step
    operation, (width, height) = space.operations[op], image.size
    kind = kind_of(operation)
    m = operation.magnitude(magnitude_bin, space.num_magnitude_bins, height, width)
    if operation.signed:
        m *= sign
    if kind == Kind.TABLE:
        return pillow.look_up(image, look_up_table(operation.name, m))
    if kind == Kind.AFFINE:
        matrix = matrices(operation, np.array([m]), height, width)[0].tolist()
        whole = tuple(int(value) for value in fill)
        return pillow.affine(image, tuple(matrix), bilinear, whole)
    if kind == Kind.CUTOUT:
        side = int(m)
        top = math.floor(center[0] * height) - side // 2
        left = math.floor(center[1] * width) - side // 2
        return pillow.cutout(image, (left, top, left + side, top + side))
    if kind == Kind.BATCHED:
        images = torch.from_numpy(pillow.to_array(image))[None]
        magnitudes, centers = (
            torch.tensor([m], dtype=torch.float64, device="cpu"),
            torch.tensor([center], device="cpu"),
        )
        with torch.autocast("cpu", enabled=False):
            pixels = pixel_format(torch.uint8, images.shape[1])
            images = run_with_magnitudes(operation, images, magnitudes, centers, pixels)
        return pillow.from_array(images[0].numpy())
    return pillow.FUNCTIONS[kind](image, m)


@lru_cache(maxsize=4096)
def _check_reach(space: SearchSpace, height: int, width: int) -> None:
    """Refuse a size at which some magnitude leaves what its operation accepts."""
    last = space.num_magnitude_bins - 1
    for operation in space.operations:
        domain = operation.domain
        if operation.side is None or domain is None:
            continue
        ends = tuple(operation.magnitude(k, last + 1, height, width) for k in (0, last))
        if not inside(domain, (ends[0], ends[1]), operation.signed):
            space.magnitudes(height, width)  # says which, and why
