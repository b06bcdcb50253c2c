"""Batched kernels that move pixels, and the same motion for masks and points."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.operations.program import Drawn, Kind, program
from ola_augment.space import SearchSpace


def affine_nearest(images: Tensor, fixed: Tensor, fill: Tensor) -> Tensor:
    """Take each pixel from where a matrix in 16.16 fixed point points, as Pillow does.

    Args:
        images: (n, C, H, W) of any dtype.
        fixed: (n, 6) int64, see :class:`~ola_augment.operations.program.Program`.
        fill: (C, 1, 1), for the pixels that come from outside of the image.
    """
    n, _, height, width = images.shape
    f = fixed.view(n, 6, 1, 1)
    x, y = _grid(height, width, images.device)
    column = (f[:, 0] * x + f[:, 1] * y + f[:, 2]) >> 16
    row = (f[:, 3] * x + f[:, 4] * y + f[:, 5]) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside[:, None], _take(images, row, column), fill)


def affine_bilinear(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Interpolate where a matrix points; neighbours are clamped at the edge, as in Pillow.

    Args:
        images: (n, C, H, W), uint8 (interpolated in the dtype of the matrices, then truncated) or
            floating point.
        matrices: (n, 6) floating point, on pixel centres at + 0.5.
        fill: (C, 1, 1), for the pixels that come from outside of the image.
    """
    n, _, height, width = images.shape
    dtype = images.dtype if images.is_floating_point() else matrices.dtype
    m = matrices.view(n, 6, 1, 1)
    x, y = (axis + 0.5 for axis in _grid(height, width, images.device))
    u = m[:, 0] * x + m[:, 1] * y + m[:, 2]
    v = m[:, 3] * x + m[:, 4] * y + m[:, 5]
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    left, top = torch.floor(u - 0.5), torch.floor(v - 0.5)
    dx = ((u - 0.5) - left).to(dtype)[:, None]
    dy = ((v - 0.5) - top).to(dtype)[:, None]
    x0, y0 = left.long(), top.long()

    def interpolated(row: Tensor) -> Tensor:
        near = _take(images, row, x0).to(dtype)
        far = _take(images, row, x0 + 1).to(dtype)
        return near + (far - near) * dx

    upper = interpolated(y0)
    values = upper + (interpolated(y0 + 1) - upper) * dy
    return torch.where(inside[:, None], values.to(images.dtype), fill)


def cutout(images: Tensor, boxes: Tensor) -> Tensor:
    """Blacken a rectangle of each image.

    Args:
        images: (n, C, H, W) of any dtype.
        boxes: (n, 4) int64, first and last + 1 of the rows, then of the columns; may reach over
            the border.
    """
    x, y = _grid(images.shape[2], images.shape[3], images.device)
    top, bottom, left, right = boxes.view(-1, 4, 1, 1).unbind(1)
    hole = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return images.masked_fill(hole[:, None], 0)


def apply_geometry_to_masks(masks: Tensor, space: SearchSpace, actions: Actions) -> Tensor:
    """Move masks as their images are moved: nearest pixel, 0 where nothing comes from.

    Rotations, shears, translations and flips move a mask; every other operation leaves it.

    Args:
        masks: (B, ..., H, W), of any dtype and device; not written to.
        space: that the actions were drawn from.
        actions: of B examples.

    Returns:
        A new tensor of the shape and dtype of ``masks``.

    Raises:
        ValueError: the actions hold a user's own kernel, whose geometry is unknown.
    """
    height, width = masks.shape[-2:]
    drawn = _drawn_geometry(space, actions, height, width)
    # An image of every pixel's own index, moved: it says where each pixel comes from.
    index = torch.arange(height * width, device=masks.device).view(1, 1, height, width)
    index = index.repeat(len(masks), 1, 1, 1)
    outside = torch.full((1, 1, 1), -1, device=masks.device)
    for s in range(drawn.kinds.shape[1]):
        moved = torch.from_numpy(np.flatnonzero(drawn.kinds[:, s] == Kind.AFFINE))
        if len(moved):
            fixed = torch.from_numpy(drawn.fixed[moved.numpy(), s]).to(masks.device)
            moved = moved.to(masks.device)
            index[moved] = affine_nearest(index[moved], fixed, outside)
    index = index.flatten(2)
    flat = masks.reshape(len(masks), -1, height * width)
    taken = flat.gather(2, index.clamp(min=0).expand_as(flat))
    return torch.where(index >= 0, taken, torch.zeros_like(taken)).view(masks.shape)


def transform_points(
    points: Tensor, space: SearchSpace, actions: Actions, height: int, width: int
) -> Tensor:
    """Move points as the images they lie in are moved; they may leave the image.

    Args:
        points: (B, N, 2) floating point, (x, y) in pixels with pixel centres at + 0.5, so that the
            image reaches from 0 to its width and height.
        space: that the actions were drawn from.
        actions: of B examples.
        height: of the images.
        width: of the images.

    Returns:
        A new tensor like ``points``.

    Raises:
        ValueError: the actions hold a user's own kernel, whose geometry is unknown.
    """
    drawn = _drawn_geometry(space, actions, height, width)
    identity = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    matrices = np.where(drawn.kinds[..., None] == Kind.AFFINE, drawn.parameters, identity)
    bottom = np.broadcast_to([0.0, 0.0, 1.0], (*drawn.kinds.shape, 1, 3))
    homogeneous = np.concatenate([matrices.reshape(*drawn.kinds.shape, 2, 3), bottom], -2)
    # Matrices lead from the result back to the source; points go the other way.
    forward = np.linalg.inv(homogeneous)
    composed = np.broadcast_to(np.eye(3), (len(forward), 3, 3))
    for s in range(forward.shape[1]):
        composed = forward[:, s] @ composed
    m = torch.from_numpy(np.ascontiguousarray(composed[:, :2])).to(points.dtype).to(points.device)
    x, y = points.unbind(-1)
    rows = m.unbind(1)
    return torch.stack([a[:, :1] * x + a[:, 1:2] * y + a[:, 2:] for a in rows], -1)


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns (W,) and rows (H, 1)."""
    return torch.arange(width, device=device), torch.arange(height, device=device)[:, None]


def _take(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels (n, C, H, W) at rows and columns (n, H, W), those outside clamped to the edge."""
    n, channels, height, width = images.shape
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    index = index.view(n, 1, height * width).expand(n, channels, height * width)
    return images.reshape(n, channels, -1).gather(2, index).view_as(images)


def _drawn_geometry(space: SearchSpace, actions: Actions, height: int, width: int) -> Drawn:
    drawn = program(space, height, width).look_up(actions)
    own = np.unique(actions.ops.numpy()[drawn.kinds == Kind.CUSTOM])
    if len(own):
        raise ValueError(
            "actions hold operations with a kernel of your own, whose geometry is unknown: "
            f"{', '.join(space.operations[op].name for op in own)}; masks, boxes and points can "
            "only follow built-in operations"
        )
    return drawn
