"""Rotated boxes that follow a matrix: exactly where it keeps angles, as torchvision's elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

_CORNERS = tv_tensors.BoundingBoxFormat.XYXYXYXY


def move_rotated(boxes: Tensor, matrix: Tensor, box_format: tv_tensors.BoundingBoxFormat) -> Tensor:
    """Move rotated boxes.

    Flips, translations, rotations and enlargements keep a box a box, which follows exactly; of
    what a shear makes of it, the rectangle on its longer diagonal, as torchvision's ``F.affine``.
    A mirrored box has its first two corners exchanged, and its last two, as torchvision's flips.

    Args:
        boxes: (..., 5) or (..., 8) float64, as ``box_format`` says; angles in degrees.
        matrix: (2, 3) float64, from the image to the result.
        box_format: XYWHR, CXCYWHR or XYXYXYXY.

    Returns:
        The moved boxes, of the shape of ``boxes``; angles in (-180, 180].
    """
    linear = matrix[:, :2]
    corners = tvf.convert_bounding_box_format(boxes.clone(), box_format, _CORNERS)
    corners = corners.unflatten(-1, (4, 2)) @ linear.mT + matrix[:, 2]
    if torch.linalg.det(linear) < 0:
        corners = corners[..., [1, 0, 3, 2], :]
    square = linear @ linear.mT
    keeps_angles = torch.allclose(square, square[0, 0] * torch.eye(2, device="cpu").to(square))
    if not keeps_angles:
        corners = _rectangles(corners)
    moved: Tensor = corners.flatten(-2)
    if box_format == _CORNERS:
        return moved
    moved = tvf.convert_bounding_box_format(moved, _CORNERS, box_format)
    if torch.equal(linear, torch.eye(2, device="cpu").to(linear)):
        moved[..., 2:] = boxes[..., 2:]  # the very angle, whatever turn it counts from
    return moved


def _rectangles(corners: Tensor) -> Tensor:
    """Rectangles (..., 4, 2) on the longer diagonals of parallelograms (..., 4, 2)."""
    first, second, third, last = corners.unbind(-2)
    center = (first + third) / 2
    across, down = second - first, last - first
    width, height = across.norm(dim=-1), down.norm(dim=-1)
    angle = torch.atan2(-across[..., 1], across[..., 0])
    other = torch.atan2(-down[..., 1], down[..., 0])
    between = angle - other
    sign = torch.where(between > torch.pi / 2, -1, 1)
    cos, sin = between.cos(), between.sin()
    long = torch.where(width < height, width * sin, width + height * cos * sign)
    tall = torch.where(width > height, height * sin, height + width * cos * sign)
    angle = torch.where(height > width, other + torch.pi / 2, angle)
    x = torch.stack((angle.cos(), -angle.sin()), -1) * (long / 2)[..., None]
    y = torch.stack((angle.sin(), angle.cos()), -1) * (tall / 2)[..., None]
    return torch.stack((center - x - y, center + x - y, center + x + y, center - x + y), -2)
