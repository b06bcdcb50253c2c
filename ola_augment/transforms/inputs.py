"""What a transform accepts: images, videos and fill values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors

from ola_augment.operations.checks import check_size

Fill = float | Sequence[float]


def batch_size(picture: Any) -> int | None:
    """Examples of a PIL image, tensor or video; None if it has no batch dimension."""
    unbatched = 4 if isinstance(picture, tv_tensors.Video) else 3
    if isinstance(picture, PIL.Image.Image) or picture.ndim == unbatched:
        return None
    return int(picture.shape[0])


def check_picture(picture: Any, *, values: bool = True) -> None:
    """Refuse a PIL image, tensor or video that cannot be augmented.

    Args:
        picture: anything.
        values: look at the values of floating images too.

    Raises:
        TypeError: neither a PIL image nor a tensor, or another dtype than uint8 or floating.
        ValueError: another PIL mode than L or RGB, another shape than (C, H, W) or (B, C, H, W)
            with 1 or 3 channels ((T, C, H, W) or (B, T, C, H, W) for a video), no pixels or more
            than 2^31, or floats outside [0, 1], NaN included.
    """
    if isinstance(picture, PIL.Image.Image):
        if picture.mode not in ("L", "RGB"):
            raise ValueError(f"PIL images must have mode L or RGB, got {picture.mode}")
        check_size(picture.height, picture.width)
        return
    if isinstance(picture, tv_tensors.Video):
        if picture.ndim not in (4, 5):
            raise ValueError(
                "a Video must have shape (T, C, H, W) or (B, T, C, H, W), "
                f"got {tuple(picture.shape)}"
            )
        picture = picture.as_subclass(Tensor).flatten(0, -4)
    _check_images(picture, values)


def _check_images(images: Any, values: bool) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating in [0, 1], got {images.dtype}")
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
        raise ValueError(
            "images must have shape (B, C, H, W) or (C, H, W) with 1 or 3 channels, "
            f"got {tuple(images.shape)}"
        )
    check_size(*images.shape[-2:])
    if images.dtype == torch.uint8 or not images.numel() or not values:
        return
    low, high = (float(end) for end in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"floating images must lie in [0, 1], got {low:g} .. {high:g}; "
            "scale them (divide by 255) or pass uint8"
        )


def check_fill(fill: Fill) -> Fill:
    """Refuse a fill that fits no image; return it, a sequence as a tuple.

    Raises:
        TypeError: neither a number nor a sequence of numbers.
        ValueError: neither 1 nor 3 numbers, or one outside 0 .. 255.
    """
    values = tuple(fill) if isinstance(fill, Sequence) else (fill,)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise TypeError(f"fill must be a number or a sequence of numbers, got {fill!r}")
    if len(values) not in (1, 3) or not all(0 <= v <= 255 for v in values):
        raise ValueError(f"fill must be 1 or 3 numbers in 0 .. 255, got {fill!r}")
    return values if isinstance(fill, Sequence) else fill


def check_fill_for(fill: Fill, picture: Any) -> None:
    """Refuse a fill that has not the scale and channels of a picture that passed its check.

    Raises:
        ValueError: not one number or one per channel; fractions or more than 255 for uint8
            images; more than 1 for floating ones.
    """
    values = fill if isinstance(fill, Sequence) else (fill,)
    pil = isinstance(picture, PIL.Image.Image)
    channels = len(picture.getbands()) if pil else picture.shape[-3]
    whole = pil or picture.dtype == torch.uint8
    if len(values) not in (1, channels):
        raise ValueError(f"fill must be one number or one per channel ({channels}), got {fill}")
    if any(value > (255 if whole else 1) or (whole and value % 1) for value in values):
        kind = "whole and in 0 .. 255 for uint8" if whole else "in [0, 1] for floating"
        raise ValueError(f"fill must be {kind} images, got {fill}")
