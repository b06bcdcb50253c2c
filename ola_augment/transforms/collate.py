"""Samples of a data set become one batch, and what was drawn for it travels with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_structure
from torch.utils.data import default_collate
from torchvision import tv_tensors

from ola_augment.actions import Actions
from ola_augment.transforms.advice import to_bytes
from ola_augment.transforms.inputs import Clips, WithAlpha, check_picture, layout, to_tensor
from ola_augment.transforms.samples import refuse_unwrapped_annotations


def stack_samples(
    samples: list[Any], needs_transform: Callable[[list[Any]], list[bool]]
) -> tuple[list[Any], list[bool], TreeSpec]:
    """Stack the entries of samples, one batch for each entry.

    Args:
        samples: of one structure; the keys of dictionaries may come in any order.
        needs_transform: which entries of a flattened sample are images and annotations.

    Returns:
        The batches, which of them are images and masks, and the structure of a sample.

    Raises:
        TypeError, ValueError: no samples, another structure or image size than the first one's,
            images that cannot be augmented, boxes or key points, masks that are not wrapped, an
            entry ``"actions"``.
    """
    if not samples:
        raise ValueError("samples must hold at least one, got none")
    spec = tree_structure(samples[0])
    flat = [_flat_as(samples[0], spec, sample) for sample in samples]
    if isinstance(samples[0], dict) and "actions" in samples[0]:
        raise ValueError("samples must have no entry 'actions', which is where the actions go")
    refuse_unwrapped_annotations(samples)
    chosen = needs_transform(flat[0])
    columns = [list(column) for column in zip(*flat, strict=True)]
    batches = [
        _stack(column) if picture else default_collate(column)
        for column, picture in zip(columns, chosen, strict=True)
    ]
    return batches, chosen, spec


def _flat_as(first: Any, spec: TreeSpec, sample: Any) -> list[Any]:
    """The entries of a sample in the order of the first one's, whose structure it must have.

    Raises:
        ValueError: it has another, with what differs.
    """
    flat, own = tree_flatten(sample)
    if own != spec:
        flat, own = tree_flatten(_ordered_as(first, sample, "sample"))
    if own != spec:
        raise ValueError("samples of a batch must have one structure, got several")
    return flat


def _ordered_as(first: Any, other: Any, name: str) -> Any:
    """The same with the keys of its dictionaries in the order of the first one's."""
    if not isinstance(first, (dict, list, tuple)) and not isinstance(other, (dict, list, tuple)):
        return other
    got = " and ".join(type(x).__name__ for x in (first, other))
    if type(first) is type(other) and isinstance(first, dict):
        if set(first) == set(other):
            ordered = copy.copy(other)
            ordered.clear()
            ordered.update({k: _ordered_as(first[k], other[k], f"{name}[{k!r}]") for k in first})
            return ordered
        got = f"the keys {[*first]} and {[*other]}"
    elif type(first) is type(other):
        if len(first) == len(other):
            pairs = enumerate(zip(first, other, strict=True))
            parts = [_ordered_as(one, two, f"{name}[{i}]") for i, (one, two) in pairs]
            return type(other)(*parts) if hasattr(other, "_fields") else type(other)(parts)
        got = f"{len(first)} and {len(other)} entries"
    raise ValueError(f"samples of a batch must have one structure, got for {name} {got}")


def with_actions(batch: Any, actions: Actions) -> Any:
    """A dictionary with an entry ``"actions"``, otherwise a tuple that ends with the actions."""
    if isinstance(batch, dict):
        return {**batch, "actions": actions}
    return (*batch, actions) if isinstance(batch, (tuple, list)) else (batch, actions)


def _stack(pictures: list[Any]) -> Tensor:
    """(B, ...), of the type of tv_tensors that the pictures are."""
    first = pictures[0]
    if isinstance(first, (tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)):
        raise ValueError(
            f"samples with {type(first).__name__} cannot be augmented as a batch; "
            "call the transform in the data set instead"
        )
    for picture in pictures:
        if isinstance(picture, (PIL.Image.Image, np.ndarray)):
            check_picture(picture)
    tensors = [to_tensor(picture) for picture in pictures]
    _check_alike(pictures, tensors)
    stacked = torch.stack(tensors)
    if isinstance(first, PIL.Image.Image) and layout(first).alpha:
        return stacked.as_subclass(WithAlpha)
    if isinstance(first, tv_tensors.TVTensor):
        batch: Tensor = tv_tensors.wrap(stacked, like=first)
        return batch
    if stacked.ndim > 5:
        raise ValueError(
            "samples of a batch must hold images (C, H, W) or clips (T, C, H, W), got "
            f"{tuple(stacked.shape[1:])}"
        )
    return stacked.as_subclass(Clips) if stacked.ndim == 5 else stacked


def _check_alike(pictures: list[Any], tensors: list[Tensor]) -> None:
    """Refuse pictures that cannot be stacked.

    Raises:
        ValueError: of several shapes or dtypes, with what to do.
    """
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    if len(shapes) == len(dtypes) == 1:
        return
    ways = []
    if len({shape[-2:] for shape in shapes}) > 1:
        ways.append("resize or crop them in the data set")
    if len({shape[-3:-2] for shape in shapes}) > 1 or len(dtypes) > 1:
        ways.append(_way_to_one_kind(pictures))
    if len({shape[:-3] for shape in shapes}) > 1:
        ways.append("take as many frames of each there")
    got = " and ".join(map(str, shapes if len(shapes) > 1 else dtypes))
    what = "shape" if len(shapes) > 1 else "dtype"
    raise ValueError(f"images of a batch must have one {what}, got {got}; {', and '.join(ways)}")


def _way_to_one_kind(pictures: list[Any]) -> str:
    """What makes pictures of several modes, numbers of channels or dtypes alike."""
    if not all(isinstance(picture, PIL.Image.Image) for picture in pictures):
        return (
            "bring them there to one number of channels, image.expand(3, -1, -1) for one of grey, "
            "and to one dtype, v2.functional.to_dtype(image, torch.float32, scale=True) for "
            "levels that use all of theirs"
        )
    modes = {picture.mode for picture in pictures}
    colour, alpha = bool(modes & {"RGB", "RGBA"}), bool(modes & {"LA", "RGBA"})
    mode = ("RGB" if colour else "L") + ("A" if alpha else "")
    way = f"make the files alike there, image.convert({mode!r})"
    return f"{way}, those of 16 bits by {to_bytes(mode)}" if "I;16" in modes else way
