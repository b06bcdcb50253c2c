"""Samples whose image is not clear are refused, with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from ola_augment.transforms.advice import (
    as_mask,
    channels_first,
    check_array,
    native,
    to_bytes,
    torch_has,
)
from ola_augment.transforms.annotations import ANNOTATIONS
from ola_augment.transforms.inputs import layout

#: What moves with its image, by the name that it has in albumentations' dictionaries.
_UNWRAPPED = {
    "bboxes": "tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(height, width))",
    "keypoints": "tv_tensors.KeyPoints(points, canvas_size=(height, width))",
    "mask": "tv_tensors.Mask(mask)",
    "masks": "[tv_tensors.Mask(mask) for mask in masks]",
}


def refuse_second_picture(flat_sample: list[Any]) -> None:
    """Refuse a PIL image beside another one: it may be a label map, whose values would change.

    Raises:
        ValueError: with both ways out.
    """
    modes = [entry.mode for entry in flat_sample if isinstance(entry, PIL.Image.Image)]
    if len(modes) > 1:
        raise ValueError(
            "the input holds two PIL images, and only one can be the image: wrap a label map in "
            f"{as_mask(modes)}, which moves along with its values as they are, and another "
            "image, which is to be augmented as the first, in tv_tensors.Image(image)"
        )


def refuse_label_maps(pictures: Sequence[Any]) -> None:
    """Refuse a grey PIL image among colour images of its size: it looks like a label map.

    Args:
        pictures: of a list, that passed their checks.

    Raises:
        ValueError: with both ways out.
    """
    found = [(layout(picture), isinstance(picture, PIL.Image.Image)) for picture in pictures]
    coloured = {shown.size for shown, _ in found if shown.channels > 1}
    if any(pil and shown.channels == 1 and shown.size in coloured for shown, pil in found):
        deep = any(getattr(picture, "mode", None) == "I;16" for picture in pictures)
        scaled = f", those of 16 bits after {to_bytes('RGB')}" if deep else ""
        raise ValueError(
            "the images of a list get a draw each, and this list holds a grey PIL image beside a "
            "colour image of its size: pass a label map as (image, tv_tensors.Mask(label_map)), "
            f"and images of several modes after image.convert('RGB'){scaled}"
        )


def refuse_unwrapped_annotations(sample: Any) -> None:
    """Refuse what albumentations' dictionaries call boxes, key points and masks, unless wrapped.

    Lists and arrays are what nothing is known of: they would stay where they are.

    Args:
        sample: in which dictionaries may lie at any depth.

    Raises:
        TypeError: with what to pass instead.
    """
    if isinstance(sample, Mapping):
        for key, wrapper in _UNWRAPPED.items():
            if _is_unwrapped(sample.get(key)):
                raise TypeError(
                    f"{key!r} of the dictionary would stay where it is while the image moves: pass "
                    f"{wrapper}, or rename it if it shall stay"
                )
    elif not isinstance(sample, (list, tuple)):
        return
    for entry in sample.values() if isinstance(sample, Mapping) else sample:
        refuse_unwrapped_annotations(entry)


def _is_unwrapped(entry: Any) -> bool:
    """Whether an entry that has the name of an annotation is a list or array that holds some."""
    if isinstance(entry, np.ndarray):
        return entry.size > 0
    if not isinstance(entry, (list, tuple)):
        return False
    return not all(isinstance(part, ANNOTATIONS) for part in entry)


def refuse_unseen_image(flat_sample: list[Any], chosen: list[bool]) -> None:
    """Refuse a sample whose image hides in an array or an object, where none was chosen.

    Args:
        flat_sample: all entries.
        chosen: which of them were taken for images and annotations.

    Raises:
        TypeError: with what to pass instead.
        ValueError: an array that is no image for another reason than its dtype.
    """
    pairs = zip(flat_sample, chosen, strict=True)
    pictures = [x for x, taken in pairs if taken and not isinstance(x, ANNOTATIONS)]
    # Of plain tensors torchvision chooses the first, be it a label.
    if any(not isinstance(picture, Tensor) or picture.ndim > 2 for picture in pictures):
        return
    for entry in flat_sample:
        kind = type(entry).__name__
        if isinstance(entry, np.ndarray) and entry.ndim > 1:
            if isinstance(entry, np.ma.MaskedArray) or not torch_has(entry.dtype):
                check_array(entry)
            code = "image" if entry.dtype.isnative else native("image")
            code = f"torch.from_numpy({code})"
            if entry.ndim == 2:
                code += "[None]"
            elif not channels_first(entry.shape):
                code += ".movedim(-1, -3)"
            raise TypeError(
                "an array in a sample is taken for its image if it is uint8 or uint16 (H, W, C), "
                f"got {entry.dtype} {entry.shape}; pass tv_tensors.Image({code})"
            )
        if not isinstance(entry, Tensor) and isinstance(getattr(entry, "data", None), Tensor):
            clip = entry.data.ndim > 3
            raise TypeError(
                f"a {kind} is no image, its data are: pass "
                f"tv_tensors.{'Video' if clip else 'Image'}({kind.lower()}.data)"
            )
