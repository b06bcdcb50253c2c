"""uint8 images of one or three channels through Pillow, one at a time, one operation at a time."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ola_augment.kernels import pillow
from ola_augment.kernels.affine import Matrix
from ola_augment.kernels.kind import GEOMETRIC, Kind
from ola_augment.kernels.pixel_format import pixel_format
from ola_augment.kernels.table import TABLE, LookUp
from ola_augment.operations.executors.own import run_with_magnitudes
from ola_augment.operations.program import look_up_table
from ola_augment.operations.steps import Rendering, Step, Steps, boxes


def run(images: Tensor, steps: Steps, rendering: Rendering) -> Tensor:
    """Apply steps to images (B, C, H, W) on the CPU, in any layout; a new tensor."""
    pairs = zip(images.numpy(), steps.listed(), strict=True)
    done = [
        pillow.to_array(run_on_image(pillow.from_array(image), listed, rendering))
        for image, listed in pairs
    ]
    return torch.from_numpy(np.stack(done))


def run_on_image(image: Image.Image, steps: list[Step], rendering: Rendering) -> Image.Image:
    """Apply steps to an image of mode L or RGB, which is not written to.

    It comes back itself where nothing changes it; else with what Pillow keeps beside the pixels:
    the orientation, the profile.
    """
    result = image
    for step in steps:
        result = _run(result, step, rendering)
    if result is not image:
        result.info = image.info.copy()
    return result


def _run(image: Image.Image, step: Step, rendering: Rendering) -> Image.Image:
    operation, kind, parameters = step[:3]
    if kind in GEOMETRIC:
        bilinear = rendering.bilinear and kind != Kind.SHIFT
        whole = tuple(int(value) for value in rendering.fill)
        return pillow.affine(image, cast(Matrix, parameters), bilinear, whole)
    if kind == Kind.CUTOUT:
        size = image.height, image.width
        box = boxes(np.array(parameters[:1]), np.array([step.center]), *size)
        top, bottom, left, right = box[0].tolist()
        return pillow.cutout(image, (left, top, right, bottom))
    if kind == Kind.BATCHED:
        images = torch.from_numpy(pillow.to_array(image))[None]
        magnitudes = torch.tensor(parameters[:1], dtype=torch.float64, device="cpu")
        centers = torch.tensor([step.center], device="cpu")
        with torch.autocast("cpu", enabled=False):
            pixels = pixel_format(torch.uint8, images.shape[1])
            images = run_with_magnitudes(operation, images, magnitudes, centers, pixels)
        return pillow.from_array(images[0].numpy())
    if isinstance(TABLE[operation.name].exact, LookUp):
        return pillow.look_up(image, look_up_table(operation.name, parameters[0]))
    return pillow.FUNCTIONS[kind](image, parameters[0])
