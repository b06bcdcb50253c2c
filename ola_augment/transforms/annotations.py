"""Masks, boxes and key points that follow the geometric operations of their image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment.actions import Actions
from ola_augment.operations.geometry import check_mask_fill, move_masks, move_points
from ola_augment.space import SearchSpace

ANNOTATIONS = (tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)

_FORMATS = (
    tv_tensors.BoundingBoxFormat.XYXY,
    tv_tensors.BoundingBoxFormat.XYWH,
    tv_tensors.BoundingBoxFormat.CXCYWH,
)


def check_annotation(
    annotation: Any, size: tuple[int, ...], leading: tuple[int, ...], fill: float = 0
) -> None:
    """Refuse an annotation that does not fit its images.

    Args:
        annotation: a mask, boxes or key points.
        size: (height, width) of the images.
        leading: batch dimensions of the images, none for a single one.
        fill: what moved masks uncover.

    Raises:
        ValueError: another height and width than the images', a mask of other batch dimensions or
            that cannot hold its fill, boxes or key points of a batch (torchvision's hold one
            image), or rotated boxes.
    """
    kind = type(annotation).__name__
    if (given := tuple(tvf.get_size(annotation))) != size:
        raise ValueError(f"{kind} must have the size {size} of its image, got {given}")
    if isinstance(annotation, tv_tensors.Mask):
        if annotation.ndim < len(leading) + 2 or annotation.shape[: len(leading)] != leading:
            batch = ", ".join(map(str, leading))
            raise ValueError(
                f"a Mask for images ({batch}, C, H, W) must have shape ({batch}, ..., H, W), "
                f"got {tuple(annotation.shape)}"
            )
        check_mask_fill(fill, annotation.dtype)
        return
    if leading:
        raise ValueError(f"{kind} belong to one image; augment each image of the batch by itself")
    if isinstance(annotation, tv_tensors.BoundingBoxes) and annotation.format not in _FORMATS:
        known = ", ".join(known.value for known in _FORMATS)
        raise ValueError(f"BoundingBoxes must be {known}, got {annotation.format.value}")


def follow(
    annotation: Any, space: SearchSpace, actions: Actions, leading: int, fill: float = 0
) -> Any:
    """Move an annotation with its image.

    Masks with nearest interpolation; a box becomes the smallest upright box around
    its moved corners, clamped to the image; key points move.

    Args:
        annotation: that :func:`check_annotation` has found to fit its images.
        space: that the actions index.
        actions: of the images, with a batch dimension.
        leading: how many of a mask's dimensions are the batch's.
        fill: what moved masks uncover.
    """
    values = annotation.as_subclass(Tensor)
    if isinstance(annotation, tv_tensors.Mask):
        masks = values.reshape(actions.batch_size, *values.shape[leading:])
        moved = move_masks(masks, space, actions, fill)
        return tv_tensors.wrap(moved.reshape(values.shape), like=annotation)
    if isinstance(annotation, tv_tensors.KeyPoints):
        moved = _move(values, space, actions, annotation.canvas_size)
        return tv_tensors.wrap(moved, like=annotation)
    xyxy = tvf.convert_bounding_box_format(values, annotation.format, _FORMATS[0])
    corners = xyxy[..., [[0, 1], [2, 1], [2, 3], [0, 3]]]
    corners = _move(corners, space, actions, annotation.canvas_size)
    height, width = annotation.canvas_size
    limit = torch.tensor([width, height], dtype=corners.dtype, device=corners.device)
    corners = corners.clamp(torch.zeros_like(limit), limit)
    boxes = torch.cat((corners.amin(-2), corners.amax(-2)), -1)
    boxes = tvf.convert_bounding_box_format(boxes, _FORMATS[0], annotation.format)
    return tv_tensors.wrap(boxes, like=annotation)


def _move(points: Tensor, space: SearchSpace, actions: Actions, size: tuple[int, int]) -> Tensor:
    """Move (..., 2) points of one image; integer points are rounded."""
    flat = points.reshape(1, -1, 2)
    exact = flat if flat.is_floating_point() else flat.double()
    moved = move_points(exact, space, actions, *size)
    if not points.is_floating_point():
        moved = moved.round()
    return moved.to(points.dtype).reshape(points.shape)
