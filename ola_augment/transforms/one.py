"""One grey or colour picture of bytes, without a tensor where that is quicker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ola_augment.kernels import pillow
from ola_augment.operations.executors import has_memory
from ola_augment.transforms.inputs import restore, to_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def is_one_for_pillow(sample: Any) -> bool:
    """Whether a sample is one grey or RGB image of bytes on the CPU.

    PIL's, an array (H, W, C) or a tensor (C, H, W).
    """
    if isinstance(sample, PIL.Image.Image):
        return sample.mode in ("L", "RGB")
    if isinstance(sample, np.ndarray):
        return sample.ndim == 3 and sample.shape[2] in (1, 3) and sample.dtype == np.uint8
    return (
        isinstance(sample, Tensor)
        and sample.ndim == 3
        and sample.shape[0] in (1, 3)
        and sample.dtype == torch.uint8
        and sample.device.type == "cpu"
        and has_memory(sample)
    )


def kind_of_one(picture: Any) -> tuple[Any, ...]:
    """All that a check of one such picture depends on."""
    if isinstance(picture, PIL.Image.Image):
        return type(picture), picture.mode, picture.size
    stored = picture.layout if isinstance(picture, Tensor) else None
    return type(picture), picture.dtype, tuple(picture.shape), stored


def as_image(picture: Any) -> PIL.Image.Image:
    """One grey or RGB picture of bytes as PIL's."""
    if isinstance(picture, PIL.Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        return PIL.Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
    return pillow.from_array(to_tensor(picture).numpy())


def from_image(image: PIL.Image.Image, like: Any) -> Any:
    """Undo :func:`as_image`: the kind of picture that ``like`` is, which can be written to."""
    if isinstance(like, PIL.Image.Image):
        return image
    if isinstance(like, np.ndarray):
        array = np.array(image)
        return array[..., None] if array.ndim == 2 else array
    return restore(torch.from_numpy(pillow.to_array(image)), like)


def as_pixels(picture: Any) -> NDArray[np.uint8]:
    """One grey or RGB picture of bytes, PIL's or an array, as (H, W, C), contiguous; to be read.

    Of PIL's RGB as it is stored, with a fourth byte, which takes half the time.
    """
    if isinstance(picture, np.ndarray):
        return np.ascontiguousarray(picture)
    pixels = np.frombuffer(picture.tobytes("raw", _STORED[picture.mode]), np.uint8)
    return pixels.reshape(picture.height, picture.width, -1)


def from_pixels(pixels: NDArray[np.uint8], like: Any) -> Any:
    """Undo :func:`as_pixels`: the kind of picture that ``like`` is."""
    if isinstance(like, np.ndarray):
        return pixels
    made = PIL.Image.frombytes(like.mode, like.size, pixels, "raw", _STORED[like.mode])
    made.info = like.info.copy()
    return made


#: How Pillow keeps the pixels of its modes.
_STORED = {"L": "L", "RGB": "RGBX"}
