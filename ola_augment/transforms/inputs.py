"""What a transform accepts, how it becomes a tensor and what it was again; fill values."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from ola_augment.kernels import pillow
from ola_augment.kernels.pixel_format import DTYPES, ValueRange
from ola_augment.operations.checks import Fill, as_fill, check_images, check_shape, check_size
from ola_augment.transforms.advice import check_array, check_clips, way_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

Fills = Fill | dict[type | str, Fill]

#: PIL's modes that can be augmented: their dtype, and whether the last band is alpha.
MODES = {
    "L": (torch.uint8, False),
    "RGB": (torch.uint8, False),
    "LA": (torch.uint8, True),
    "RGBA": (torch.uint8, True),
    "I;16": (torch.uint16, False),
}

_EXPLICIT = (PIL.Image.Image, tv_tensors.Image, tv_tensors.Video)


class Clips(tv_tensors.Video):  # type: ignore[misc]
    """A plain tensor (..., T, C, H, W) on its way through a transform: frames share a draw."""


class WithAlpha(tv_tensors.Image):  # type: ignore[misc]
    """PIL images with an alpha channel, stacked for a batch."""


class Layout(NamedTuple):
    """Batch dimensions (the frames of a video are none), channels, size; dtype and alpha."""

    batch: tuple[int, ...]
    channels: int
    size: tuple[int, ...]
    dtype: torch.dtype
    alpha: bool = False

    @property
    def whole(self) -> bool:
        """Whether the values are integers."""
        return not self.dtype.is_floating_point


def image_array(flat_sample: list[Any]) -> int | None:
    """Which entry of a sample is its image, if that is an array: the first (H, W, C) of levels.

    Of uint8 or uint16, unless it is all that there is. None if there is a PIL image or an Image or
    Video of ``tv_tensors``.

    Raises:
        ValueError: another array has the size of the image; as it would stay where it is.
    """
    if any(isinstance(entry, _EXPLICIT) for entry in flat_sample):
        return None
    arrays = [i for i, entry in enumerate(flat_sample) if isinstance(entry, np.ndarray)]
    if arrays and len(flat_sample) == 1:
        return 0
    images = [i for i in arrays if _is_image_array(flat_sample[i])]
    if not images:
        return None
    size = flat_sample[images[0]].shape[:2]
    if any(flat_sample[i].shape[:2] == size for i in arrays if i != images[0]):
        raise ValueError(
            f"the input holds two arrays of size {size}, and only one can be the image; "
            "wrap a mask, which is to follow it, in tv_tensors.Mask"
        )
    return images[0]


def _is_image_array(entry: Any) -> bool:
    return (
        isinstance(entry, np.ndarray)
        and entry.dtype in (np.uint8, np.uint16)
        and entry.ndim == 3
        and (entry.shape[2] in (1, 3) or 0 < entry.shape[2] < min(entry.shape[:2]))
    )


def is_list_of_images(sample: Any) -> bool:
    """Whether every entry of a list is an image, or a clip, of its own.

    PIL images, ``tv_tensors`` or arrays, or tensors (C, H, W) of one dtype and number of channels
    (batches in a list, as loaders make, are a sample: images and targets).
    """
    if not isinstance(sample, list) or not sample:
        return False
    if all(isinstance(entry, _EXPLICIT) or _is_image_array(entry) for entry in sample):
        return True
    return all(
        isinstance(entry, Tensor)
        and not isinstance(entry, tv_tensors.TVTensor)
        and entry.ndim == 3
        and entry.dtype in DTYPES
        and (entry.dtype, entry.shape[0]) == (sample[0].dtype, sample[0].shape[0])
        for entry in sample
    )


def check_picture(picture: Any) -> None:
    """Refuse a PIL image, array, tensor or video that cannot be augmented, whatever its values.

    Args:
        picture: anything; arrays have their channels last.

    Raises:
        TypeError: none of these, or of a dtype that there are no kernels for.
        ValueError: another PIL mode than :data:`MODES`, another shape than (..., C, H, W) (arrays
            (..., H, W, C), videos (..., T, C, H, W)), no pixels or more than 2^31, or clips
            whose channels seem to come first.
    """
    if isinstance(picture, PIL.Image.Image):
        if picture.mode not in MODES:
            raise ValueError(
                f"PIL images must have mode {', '.join(MODES)}, got {picture.mode}; "
                f"{way_out(picture.mode)}"
            )
        check_size(picture.height, picture.width)
        return
    if isinstance(picture, np.ndarray):
        check_array(picture)
        *batch, height, width, channels = picture.shape
        check_shape((*batch, channels, height, width))
        return
    if isinstance(picture, tv_tensors.Video) and picture.ndim < 4:
        raise ValueError(f"a Video must have shape (..., T, C, H, W), got {tuple(picture.shape)}")
    plain = type(picture) is Clips or not isinstance(picture, tv_tensors.TVTensor)
    if plain and isinstance(picture, Tensor) and picture.ndim > 4:
        check_clips(tuple(picture.shape))
    check_images(to_tensor(picture) if isinstance(picture, Tensor) else picture)


def to_tensor(picture: Any) -> Tensor:
    """A picture that passed its check as a plain tensor (..., C, H, W)."""
    if isinstance(picture, PIL.Image.Image):
        return torch.from_numpy(pillow.to_array(picture))
    if isinstance(picture, np.ndarray):
        # A copy: torch takes no read-only arrays and no negative strides.
        return torch.from_numpy(np.array(np.moveaxis(picture, -1, -3), order="C"))
    if type(picture) is Tensor:
        return picture
    with torch._C.DisableTorchFunctionSubclass():  # which would make the subclass of it again
        plain: Tensor = picture.as_subclass(Tensor)
    return plain


def restore(images: Tensor, like: Any) -> Any:
    """Undo :func:`to_tensor`: the kind of picture that ``like`` is."""
    if isinstance(like, PIL.Image.Image):
        planes = images.numpy()
        if len(planes) == 3:
            made = pillow.from_array(planes)
        else:
            made = PIL.Image.fromarray(planes[0] if len(planes) == 1 else _channels_last(planes))
        made.info = like.info.copy()
        return made
    if isinstance(like, np.ndarray):
        return _channels_last(images.numpy())
    if isinstance(like, tv_tensors.TVTensor):
        return tv_tensors.wrap(images, like=like)
    if type(like) in (Tensor, nn.Parameter):
        return images
    # What a subclass keeps beside its values goes from tensor to tensor in torch's functions.
    kept = torch.empty_like(like, requires_grad=False)
    with torch._C.DisableTorchFunctionSubclass():
        return kept.copy_(images)


def _channels_last(planes: NDArray[Any]) -> NDArray[Any]:
    """(..., C, H, W) to (..., H, W, C); plane by plane, which is five times as fast."""
    *_, channels, height, width = planes.shape
    result = np.empty((*planes.shape[:-3], height, width, channels), planes.dtype)
    for c in range(channels):
        result[..., c] = planes[..., c, :, :]
    return result


def layout(picture: Any) -> Layout:
    """Describe a picture that passed its check."""
    if isinstance(picture, PIL.Image.Image):
        size = (picture.height, picture.width)
        return Layout((), len(picture.getbands()), size, *MODES[picture.mode])
    if isinstance(picture, np.ndarray):
        *batch, height, width, channels = picture.shape
        dtype = torch.from_numpy(np.empty(0, picture.dtype)).dtype
        return Layout(tuple(batch), channels, (height, width), dtype)
    *batch, channels, height, width = picture.shape
    if isinstance(picture, tv_tensors.Video):
        del batch[-1]
    alpha = isinstance(picture, WithAlpha)
    return Layout(tuple(batch), channels, (height, width), picture.dtype, alpha)


def as_fills(
    fill: Fills, value_range: ValueRange | None = None
) -> dict[type | str, tuple[float, ...]]:
    """Fill values by type of input; ``"others"`` is always there.

    Raises:
        TypeError, ValueError: a fill that fits no image, a defaultdict, or a key that is neither a
            type nor ``"others"``.
    """
    if not isinstance(fill, dict):
        return {"others": as_fill(fill, value_range)}
    if getattr(fill, "default_factory", None) is not None:
        raise ValueError(
            "fill must be a plain dictionary, got a defaultdict; what it gives for all other types "
            "is said by the key 'others'"
        )
    for kind in fill:
        if kind != "others" and not isinstance(kind, type):
            raise ValueError(f"fill must be keyed by types or 'others', got the key {kind!r}")
    # A mask is filled with a class, which may be any number.
    fills = {k: as_fill(v, value_range) for k, v in fill.items() if k is not tv_tensors.Mask}
    if tv_tensors.Mask in fill:
        fills[tv_tensors.Mask] = _mask_fill(fill[tv_tensors.Mask])
    return {"others": as_fill(None), **fills}


def plain_fill(fill: Fills) -> Fills:
    """The same fill, to look at and to write to a file: of Python's own numbers and tuples."""
    if isinstance(fill, dict):
        return {kind: _plain(value) for kind, value in fill.items()}
    return _plain(fill)


def _plain(fill: Fill) -> Fill:
    if isinstance(fill, Sequence):
        return tuple(value if isinstance(value, int) else float(value) for value in fill)
    return fill if fill is None or isinstance(fill, int) else float(fill)


def fill_of(fills: dict[type | str, tuple[float, ...]], picture: Any) -> tuple[float, ...]:
    """The entry of :func:`as_fills` for a picture: of its own type, or else of all others."""
    kind = PIL.Image.Image if isinstance(picture, PIL.Image.Image) else type(picture)
    return fills.get(Tensor if kind in (Clips, WithAlpha) else kind, fills["others"])


def _mask_fill(fill: Fill) -> tuple[float, ...]:
    values = fill if isinstance(fill, (tuple, list)) else (0 if fill is None else fill,)
    if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], Real):
        raise TypeError(f"fill of a Mask must be one number, got {fill!r}")
    value = values[0]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("fill of a Mask must fit into 64 bits, got a larger integer")
    return (value if isinstance(value, int) else float(value),)
