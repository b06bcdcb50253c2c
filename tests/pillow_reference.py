"""The built-in operations in Pillow, an image at a time: what they all mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.space import SearchSpace

NEAREST = Image.Resampling.NEAREST


def affine(image, matrix, resample, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def posterize(image, bits):
    # Pillow 13 refuses 0 bits, where nothing is kept.
    return ImageOps.posterize(image, int(bits)) if bits >= 1 else image.point(lambda _: 0)


def cutout(image, side, center):
    """Blacken a square of ``side`` pixels; ``center`` is (y, x) as fractions of the image."""
    width, height = image.size
    side = int(side)
    top = math.floor(center[0] * height) - side // 2
    left = math.floor(center[1] * width) - side // 2
    image = image.copy()
    image.paste(0 if image.mode == "L" else (0, 0, 0), (left, top, left + side, top + side))
    return image


#: name -> function(image, magnitude, center, resample, fill)
PILLOW: dict[str, Callable[..., Image.Image]] = {
    "identity": lambda im, m, center, resample, fill: im,
    "auto_contrast": lambda im, m, center, resample, fill: ImageOps.autocontrast(im),
    "equalize": lambda im, m, center, resample, fill: ImageOps.equalize(im),
    "rotate": lambda im, m, center, resample, fill: im.rotate(m, resample, fillcolor=fill),
    "solarize": lambda im, m, center, resample, fill: ImageOps.solarize(im, m),
    "color": lambda im, m, center, resample, fill: ImageEnhance.Color(im).enhance(m),
    "posterize": lambda im, m, center, resample, fill: posterize(im, m),
    "contrast": lambda im, m, center, resample, fill: ImageEnhance.Contrast(im).enhance(m),
    "brightness": lambda im, m, center, resample, fill: ImageEnhance.Brightness(im).enhance(m),
    "sharpness": lambda im, m, center, resample, fill: ImageEnhance.Sharpness(im).enhance(m),
    "shear_x": lambda im, m, center, *how: affine(im, (1, m, 0, 0, 1, 0), *how),
    "shear_y": lambda im, m, center, *how: affine(im, (1, 0, 0, m, 1, 0), *how),
    "translate_x": lambda im, m, center, *how: affine(im, (1, 0, m, 0, 1, 0), *how),
    "translate_y": lambda im, m, center, *how: affine(im, (1, 0, 0, 0, 1, m), *how),
    "blur": lambda im, m, center, resample, fill: im.filter(ImageFilter.BLUR),
    "invert": lambda im, m, center, resample, fill: ImageOps.invert(im),
    "flip_lr": lambda im, m, center, *how: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "flip_ud": lambda im, m, center, *how: im.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "cutout": lambda im, m, center, resample, fill: cutout(im, m, center),
}


def to_pil(image: np.ndarray) -> Image.Image:
    """(C, H, W) uint8 to mode "L" or "RGB"."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0).copy())


def to_array(image: Image.Image) -> np.ndarray:
    """Mode "L" or "RGB" to (C, H, W) uint8."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def pillow_chains(
    images: list[Image.Image],
    space: SearchSpace,
    actions: Actions,
    resample: Image.Resampling = NEAREST,
    fill: int | tuple[int, ...] | None = None,
) -> list[Image.Image]:
    """Apply actions to PIL images of one size, an operation of an image at a time."""
    width, height = images[0].size
    magnitudes = space.magnitudes(height, width).tolist()
    names = [operation.name for operation in space.operations]
    ops, keep, bins = actions.ops.tolist(), actions.keep.tolist(), actions.magnitude_bins.tolist()
    signs, centers = actions.signs.tolist(), actions.centers.tolist()
    results = []
    for i, image in enumerate(images):
        for s, op in enumerate(ops[i]):
            if keep[i][s]:
                sign = signs[i][s] if space.operations[op].signed else 1
                magnitude = magnitudes[op][bins[i][s]] * sign
                image = PILLOW[names[op]](image, magnitude, centers[i][s], resample, fill)
        results.append(image)
    return results


def pillow_apply(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    bilinear: bool = False,
    fill: Sequence[int] | None = None,
) -> Tensor:
    """What ``apply_actions`` must return for (B, C, H, W) uint8 images."""
    if not len(images):
        return images.clone()
    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.NEAREST
    color = None if fill is None else tuple(fill) if len(fill) > 1 else fill[0]
    chains = pillow_chains(
        [to_pil(image) for image in images.numpy()], space, actions, resample, color
    )
    return torch.from_numpy(np.stack([to_array(image) for image in chains]))


def one_operation(
    batch_size: int, op: int, magnitude_bin: int, sign: int = 1, seed: int = 0
) -> Actions:
    """The same operation for every example, cutouts at random centres."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 1)
    return Actions(
        num_ops=torch.ones(batch_size, dtype=torch.int64),
        ops=torch.full(shape, op),
        keep=torch.ones(shape, dtype=torch.bool),
        magnitude_bins=torch.full(shape, magnitude_bin),
        signs=torch.full(shape, sign, dtype=torch.int8),
        centers=torch.rand(*shape, 2, generator=generator),
        log_prob=torch.zeros(batch_size),
    )


def draw(
    space: SearchSpace, batch_size: int, slots: int, seed: int = 0, keep_prob: float = 1.0
) -> Actions:
    """Distinct operations for every example, everything else uniform."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, slots)
    scores = torch.rand(batch_size, len(space), generator=generator)
    return Actions(
        num_ops=torch.full((batch_size,), slots),
        ops=scores.argsort(1)[:, :slots].contiguous(),
        keep=torch.rand(shape, generator=generator) < keep_prob,
        magnitude_bins=torch.randint(space.num_magnitude_bins, shape, generator=generator),
        signs=torch.randint(2, shape, generator=generator).to(torch.int8) * 2 - 1,
        centers=torch.rand(*shape, 2, generator=generator),
        log_prob=torch.zeros(batch_size),
    )


def slot_of(actions: Actions, slot: int) -> Actions:
    """The draws of one slot, as if nothing else had been drawn."""
    fields = (field[:, slot : slot + 1] if field.ndim > 1 else field for field in actions)
    alone = Actions(*fields)
    return alone._replace(num_ops=torch.ones_like(actions.num_ops))
