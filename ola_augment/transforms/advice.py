"""PIL modes and arrays that are refused, each with a way out to the image that was meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ola_augment.kernels.pixel_format import DTYPES
from ola_augment.operations.checks import other_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Modes whose alpha another mode keeps.
_WITH_ALPHA = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}


def way_out(mode: str) -> str:
    """What to do with a PIL image of a mode that is refused."""
    label_map = f"a label map beside its image is wrapped in {as_mask([mode])}"
    if mode[0] in "IF":  # Pillow would cut levels beyond 255 off
        return (
            "scale its levels, whose range nobody knows: np.asarray(image, 'float32')[..., None] / "
            f"top, with the level that is white as top; {label_map}"
        )
    if mode == "LAB":
        return (
            "ImageCms.profileToProfile(image, ImageCms.createProfile('LAB'), "
            "ImageCms.createProfile('sRGB'), outputMode='RGB') makes one"
        )
    made = f"image.convert({_WITH_ALPHA.get(mode, 'RGB')!r}) makes one"
    return f"{made} of a picture; {label_map}" if mode in ("1", "P", "PA") else made


def as_mask(modes: Iterable[str]) -> str:
    """Code that makes a mask of a label map, which is one of some PIL images."""
    # torch has no numbers of the other byte order.
    native_order = "np.asarray(image, 'int32')"
    return f"tv_tensors.Mask({native_order if 'I;16B' in modes else 'image'})"


def to_bytes(mode: str) -> str:
    """Code that makes a picture of bytes of one of 16 bits; Pillow's convert cuts off at 255.

    Args:
        mode: that the pictures beside it have, or are brought to.
    """
    code = "image.point(lambda level: level * 255 / top + 0.5).convert('L')"
    more = "" if mode == "L" else f".convert({mode!r})"
    return f"{code}{more}, with the level that is white as top, 65535 where all 16 bits are used"


def check_clips(shape: tuple[int, ...]) -> None:
    """Refuse a plain tensor of five or more dimensions whose channels seem to come first.

    Raises:
        ValueError: 1 or 3 frames of more than 4 channels.
    """
    frames, channels = shape[-4:-2]
    if frames not in (1, 3) or channels <= 4:
        return
    raise ValueError(
        f"five and more dimensions are (..., T, C, H, W), got {shape}, which looks like "
        "(..., C, T, H, W), as models of torchvision and pytorchvideo take clips: "
        "clips.transpose(-4, -3) turns it, and turns the augmented clips back; if it holds "
        f"{frames} of {channels} channels each, tv_tensors.Video(clips) says that they are frames "
        "of a clip, which share a draw, and tv_tensors.Image(images) that they are images"
    )


def check_array(array: NDArray[np.generic]) -> None:
    """Refuse an array that is no image (..., H, W, C).

    Raises:
        TypeError: a masked array, or another dtype.
        ValueError: another byte order than the machine's, or another shape.
    """
    if isinstance(array, np.ma.MaskedArray):
        turned, seen = ".movedim(-1, -3)", ".any(-1)"
        if array.ndim < 3:
            turned, seen = "[None]", ""
        elif channels_first(array.shape):
            turned, seen = "", ".any(-3)"
        raise TypeError(
            "the mask of a numpy.ma.MaskedArray would be lost; pass both: "
            f"tv_tensors.Image(torch.from_numpy(image.filled(0)){turned}) and "
            f"tv_tensors.Mask(np.ma.getmaskarray(image){seen})"
        )
    if not torch_has(array.dtype):
        raise TypeError(
            f"NumPy images must be of numbers that torch has, got {array.dtype}; "
            "image.astype(np.float32) makes some of wider ones, np.stack(image) of objects"
        )
    if not array.dtype.isnative:
        raise ValueError(
            f"NumPy images must have the machine's byte order, got {array.dtype.str}; "
            f"{native('image')} converts them"
        )
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    if dtype not in DTYPES:
        raise TypeError(other_dtype(dtype, array=True))
    if array.ndim < 3:
        raise ValueError(
            f"NumPy images must have shape (H, W, C), got {array.shape}; image[..., None] adds a "
            "channel"
        )
    if channels_first(array.shape):
        raise ValueError(
            f"NumPy images must have shape (H, W, C), got {array.shape}, which looks like "
            "(C, H, W), as tifffile, rasterio and zarr have it; np.moveaxis(image, -3, -1) turns "
            "it, or pass torch.from_numpy(image)"
        )


def torch_has(dtype: np.dtype[np.generic]) -> bool:
    """Whether torch has such numbers, of any byte order."""
    widest = {"b": 1, "i": 8, "u": 8, "f": 8, "c": 16}
    return dtype.itemsize <= widest.get(dtype.kind, 0)


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether (a, b, c) is rather (C, H, W): its last is too large for channels beside its first.

    Bands of small patches, (9, 9, 200), are channels.
    """
    first, height, width = shape[-3:]
    if width <= 4 or first >= width:
        return False
    return first <= 4 or 2 * first <= min(height, width) or height == width


def native(name: str) -> str:
    """The code that gives an array the machine's byte order."""
    return f"{name}.astype({name}.dtype.newbyteorder('='))"
