"""Masks, boxes and key points that follow the geometric operations of their image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment.actions import Actions
from ola_augment.operations.geometry import move_masks, move_points
from ola_augment.space import SearchSpace

ANNOTATIONS = (tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)

_FORMATS = (
    tv_tensors.BoundingBoxFormat.XYXY,
    tv_tensors.BoundingBoxFormat.XYWH,
    tv_tensors.BoundingBoxFormat.CXCYWH,
)


def check_annotation(annotation: Any, size: tuple[int, ...], batch: int | None) -> None:
    """Refuse an annotation that does not fit its images.

    Args:
        annotation: a mask, boxes or key points.
        size: (height, width) of the images.
        batch: how many images, None for one without a batch dimension.

    Raises:
        ValueError: another height and width than the images', a mask of another batch size, boxes
            or key points of a batch (torchvision's hold one image), or rotated boxes.
    """
    kind = type(annotation).__name__
    if (given := tuple(tvf.get_size(annotation))) != size:
        raise ValueError(f"{kind} must have the size {size} of its image, got {given}")
    if isinstance(annotation, tv_tensors.Mask):
        if batch is not None and (annotation.ndim < 3 or len(annotation) != batch):
            raise ValueError(
                f"a Mask for {batch} images must have shape ({batch}, ..., H, W), "
                f"got {tuple(annotation.shape)}"
            )
        return
    if batch is not None:
        raise ValueError(f"{kind} belong to one image; augment each image of the batch by itself")
    if isinstance(annotation, tv_tensors.BoundingBoxes) and annotation.format not in _FORMATS:
        known = ", ".join(known.value for known in _FORMATS)
        raise ValueError(f"BoundingBoxes must be {known}, got {annotation.format.value}")


def follow(annotation: Any, space: SearchSpace, actions: Actions, *, batched: bool) -> Any:
    """Move an annotation with its image.

    Masks with nearest interpolation and 0 outside; a box becomes the smallest upright box around
    its moved corners, clamped to the image; key points move.

    Args:
        annotation: fits its images, see :func:`check_annotation`.
        space: that the actions index.
        actions: of the images, with a batch dimension.
        batched: whether a mask's first dimension is the batch.
    """
    values = annotation.as_subclass(Tensor)
    if isinstance(annotation, tv_tensors.Mask):
        masks = values if batched else values[None]
        moved = move_masks(masks, space, actions)
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
