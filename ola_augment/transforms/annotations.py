"""Masks, boxes and key points that follow the geometric operations of their image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment.actions import Actions
from ola_augment.operations.geometry import check_mask_fill, forward_matrices, move_masks
from ola_augment.space import SearchSpace
from ola_augment.transforms.rotated_boxes import move_rotated

ANNOTATIONS = (tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)

_XYXY = tv_tensors.BoundingBoxFormat.XYXY


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
            that cannot hold its fill, or boxes or key points of a batch (torchvision's hold one
            image).
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


def follow(
    annotation: Any, space: SearchSpace, actions: Actions, leading: int, fill: float = 0
) -> Any:
    """Move an annotation with its image; what does not move comes back as it is.

    Masks move with nearest interpolation. Rotated boxes follow as such; any other box becomes the
    smallest upright box around its moved corners. Both are clamped to the image as their
    ``clamping_mode`` says. Key points are coordinates, pixel centres at + 0.5; those of integers
    are pixels. Coordinates are computed in double precision and rounded once.

    Args:
        annotation: that :func:`check_annotation` has found to fit its images.
        space: that the actions index.
        actions: of the images, with a batch dimension.
        leading: how many of a mask's dimensions are the batch's.
        fill: what moved masks uncover.

    Raises:
        ValueError: moved coordinates that their dtype does not hold.
    """
    values = annotation.as_subclass(Tensor)
    if isinstance(annotation, tv_tensors.Mask):
        masks = values.reshape(actions.batch_size, *values.shape[leading:])
        moved = move_masks(masks, space, actions, fill).reshape(values.shape)
    else:
        size = annotation.canvas_size
        matrix = torch.from_numpy(forward_matrices(space, actions, *size)[0]).to(values.device)
        if torch.equal(matrix, torch.eye(2, 3, device="cpu").to(matrix)):
            moved = values.clone()
        elif isinstance(annotation, tv_tensors.KeyPoints):
            moved = _move_points(values, matrix)
        else:
            moved = _move_boxes(annotation, matrix)
    return tv_tensors.wrap(moved, like=annotation)


def _move_points(points: Tensor, matrix: Tensor) -> Tensor:
    if points.is_floating_point():
        return _moved(points.double(), matrix).to(points.dtype)
    return _whole(_moved(points.double() + 0.5, matrix).floor(), points.dtype, "KeyPoints")


def _move_boxes(boxes: tv_tensors.BoundingBoxes, matrix: Tensor) -> Tensor:
    values, size = boxes.as_subclass(Tensor), boxes.canvas_size
    clamps = boxes.clamping_mode is not None
    if tv_tensors.is_rotated_bounding_format(boxes.format):
        turned = move_rotated(values.double(), matrix, boxes.format)
        if clamps and not _is_onto_itself(matrix, size):
            turned = tvf.clamp_bounding_boxes(turned, boxes.format, size, boxes.clamping_mode)
        return turned.to(values.dtype)
    xyxy = tvf.convert_bounding_box_format(values.double(), boxes.format, _XYXY)
    corners = _moved(xyxy[..., [[0, 1], [2, 1], [2, 3], [0, 3]]], matrix)
    if clamps and not _is_onto_itself(matrix, size):
        limit = torch.tensor([size[1], size[0]], device="cpu").to(corners)
        corners = corners.clamp(torch.zeros_like(limit), limit)
    upright = torch.cat((corners.amin(-2), corners.amax(-2)), -1)
    moved: Tensor = tvf.convert_bounding_box_format(upright, _XYXY, boxes.format)
    if values.is_floating_point():
        return moved.to(values.dtype)
    return _whole(moved.round(), values.dtype, "BoundingBoxes")


def _is_onto_itself(matrix: Tensor, size: tuple[int, int]) -> bool:
    """Whether the image stays in its place: flips leave what lay outside, as in torchvision."""
    limit = torch.tensor([size[1], size[0]], device="cpu").to(matrix)
    ends = _moved(torch.stack((torch.zeros_like(limit), limit)), matrix)
    return torch.equal(torch.stack((ends.amin(0), ends.amax(0))), torch.stack((limit * 0, limit)))


def _moved(points: Tensor, matrix: Tensor) -> Tensor:
    """(..., 2) points by a matrix (2, 3)."""
    return points @ matrix[:, :2].mT + matrix[:, 2]


def _whole(values: Tensor, dtype: torch.dtype, kind: str) -> Tensor:
    """Whole numbers in an integer dtype.

    Raises:
        ValueError: it does not hold them.
    """
    limits = torch.iinfo(dtype)
    if values.numel():
        low, high = (float(end) for end in values.aminmax())
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"moved {kind} reach {low:g} .. {high:g}, which {dtype} does not hold; pass them "
                "as torch.int64"
            )
    return values.to(dtype)
