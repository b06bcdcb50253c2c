"""Domain shifts: what may differ between training images and those the model is used on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

if TYPE_CHECKING:
    from data import ImageData

#: Labelled images of the target domain that are known.
_KNOWN = 64


def _each(images: Tensor, generator: torch.Generator, change, low: float, high: float) -> Tensor:
    """Change every image by its own number in [low, high)."""
    amounts = low + (high - low) * torch.rand(len(images), generator=generator)
    pairs = zip(images, amounts.tolist(), strict=True)
    return torch.stack([change(image, amount) for image, amount in pairs])


def _moved(image: Tensor, angle: float = 0, scale: float = 1, shear: float = 0) -> Tensor:
    bilinear = InterpolationMode.BILINEAR
    return vision.affine(image, angle, [0, 0], scale, [shear, 0.0], interpolation=bilinear)


def _rotated(images: Tensor, generator: torch.Generator) -> Tensor:
    """By up to 60 degrees to either side."""

    def turn(image: Tensor, angle: float) -> Tensor:
        return vision.rotate(image, angle, InterpolationMode.BILINEAR)

    return _each(images, generator, turn, -60, 60)


def _dark(images: Tensor, generator: torch.Generator) -> Tensor:
    """A sixth to a half of the light, and noise."""
    shape = (len(images), 1, 1, 1)
    light = 0.15 + 0.35 * torch.rand(shape, generator=generator)
    noise = 20 * torch.randn(images.shape, generator=generator)
    return _levels(light * images + noise.abs())


def _sheared(images: Tensor, generator: torch.Generator) -> Tensor:
    """By up to 40 degrees to either side."""
    return _each(images, generator, lambda image, angle: _moved(image, shear=angle), -40, 40)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """By up to a third of the side, in both directions; black comes in."""
    side = images.shape[-1]
    by = torch.randint(-(side // 3), side // 3 + 1, (len(images), 2), generator=generator)
    pairs = zip(images, by.tolist(), strict=True)
    return torch.stack([vision.affine(image, 0, move, 1, [0.0, 0.0]) for image, move in pairs])


def _inverted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Negatives."""
    return 255 - images


def _washed_out(images: Tensor, generator: torch.Generator) -> Tensor:
    """A fifth to a half of the contrast, in a bright haze."""
    strength = 0.2 + 0.3 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return _levels(200 + strength * (images.float() - 200))


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """By a Gaussian of one to three pixels."""
    return _each(
        images, generator, lambda image, s: vision.gaussian_blur(image, [13, 13], [s, s]), 1, 3
    )


def _mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Left and right changed places."""
    return images.flip(-1)


def _occluded(images: Tensor, generator: torch.Generator) -> Tensor:
    """A black square of nearly half the side lies on each."""
    side = images.shape[-1]
    hole = int(0.45 * side)
    corners = torch.randint(side - hole + 1, (len(images), 2), generator=generator)
    out = images.clone()
    for image, (top, left) in zip(out, corners.tolist(), strict=True):
        image[:, top : top + hole, left : left + hole] = 0
    return out


def _small(images: Tensor, generator: torch.Generator) -> Tensor:
    """At 0.4 to 0.8 of their size, in black."""
    return _each(images, generator, lambda image, scale: _moved(image, scale=scale), 0.4, 0.8)


def _coarse(images: Tensor, generator: torch.Generator) -> Tensor:
    """Seven pixels a side are left."""
    size = images.shape[-2:]
    few = F.interpolate(images.float(), size=(7, 7), mode="area")
    return _levels(F.interpolate(few, size=size, mode="nearest"))


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of 20 to 60 grey levels."""
    spread = 20 + 40 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return _levels(images + spread * torch.randn(images.shape, generator=generator))


def _levels(values: Tensor) -> Tensor:
    return values.clamp(0, 255).round().to(torch.uint8)


SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "rotated": _rotated,
    "dark": _dark,
    "sheared": _sheared,
    "shifted": _shifted,
    "inverted": _inverted,
    "washed-out": _washed_out,
    "blurred": _blurred,
    "mirrored": _mirrored,
    "occluded": _occluded,
    "small": _small,
    "coarse": _coarse,
    "noisy": _noisy,
}


def shift(data: ImageData, name: str) -> ImageData:
    """Make its test images those of a target domain, 64 of which are known with their labels."""
    images = SHIFTS[name](data.test_images, torch.Generator().manual_seed(1))
    return replace(
        data,
        test_images=images[_KNOWN:],
        test_labels=data.test_labels[_KNOWN:],
        reference=(images[:_KNOWN], data.test_labels[:_KNOWN]),
    )
