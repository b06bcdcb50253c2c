"""Kernels that move pixels by an affine matrix or blacken a rectangle, on any device.

A matrix (a, b, c, d, e, f) leads from the result back to the source, as in
``PIL.Image.transform`` with AFFINE: the pixel at (x, y) of the result, centres at + 0.5, comes from
(a x + b y + c, d x + e y + f).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.kernels.precision import apart

Matrix = tuple[float, float, float, float, float, float]


def rotation(degrees: float, height: int, width: int) -> Matrix:
    """Matrix of ``PIL.Image.rotate``: counter-clockwise about the centre.

    Entries are rounded to 15 digits as there, and so are the quarter turns that Pillow makes by
    transposing: written as matrices they move every pixel to the same place.
    """
    degrees %= 360.0
    if degrees == 180 or (degrees in (90, 270) and height == width):
        cos, sin = (-1.0, 0.0) if degrees == 180 else (0.0, 1.0 if degrees == 90 else -1.0)
    else:
        cos = round(math.cos(math.radians(degrees)), 15)
        sin = round(math.sin(math.radians(degrees)), 15)
    x, y = width / 2, height / 2
    return (
        cos,
        -sin,
        cos * -x + -sin * -y + 0.0 + x,
        sin,
        cos,
        sin * -x + cos * -y + 0.0 + y,
    )


def fixed_point(matrix: Matrix) -> tuple[int, ...]:
    """An affine matrix in Pillow's 16.16 fixed point, taken at the pixel centres.

    Pillow rounds entries to the nearest 1/65536, except where rows stay rows and columns stay
    columns: there it truncates coordinates in floating point, which rounding down agrees with.
    """
    a, b, c, d, e, f = matrix
    rounding = 0.0 if b == 0 and d == 0 else 0.5
    entries = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return tuple(math.floor(v * 65536.0 + rounding) for v in entries)


def shifts(matrix: Matrix) -> bool:
    """Whether a matrix leads from pixel to pixel: translations, flips, quarter turns."""
    a, b, c, d, e, f = matrix
    straight = b == 0 == d and abs(a) == 1 == abs(e)
    turned = a == 0 == e and abs(b) == 1 == abs(d)
    return (straight or turned) and c % 1 == 0 == f % 1


def is_stepped(matrix: Matrix, height: int, width: int) -> bool:
    """Whether Pillow adds coordinates up, and fixed point would not do.

    It does so where rows stay rows and columns stay columns, which matters unless the steps are
    whole and stay clear of the next pixel, and where a corner leads to 32768 or beyond.
    """
    a, b, c, d, e, f = matrix
    if b == 0 == d:
        fractions = (c + a * 0.5) % 1, (f + e * 0.5) % 1
        clear = all(v == 0 or abs(v - 0.5) < 0.5 - 2**-15 for v in fractions)
        return not (abs(a) == 1 == abs(e) and clear)
    corners = ((0, 0), (width, height), (0, height), (width, 0))
    return any(
        abs(p * x + q * y + r) >= 2**15 for p, q, r in ((a, b, c), (d, e, f)) for x, y in corners
    )


def affine_nearest(images: Tensor, fixed: Tensor, fill: Tensor) -> Tensor:
    """Take each pixel from where a matrix points, as Pillow does in fixed point.

    Args:
        images: (n, C, H, W) of any dtype.
        fixed: (n, 6) int64, the matrices in 16.16 fixed point, of :func:`fixed_point`.
        fill: (C, 1, 1), for the pixels that come from outside of the image.
    """
    n, _, height, width = images.shape
    p = fixed.view(n, 6, 1, 1)
    x, y = _grid(height, width, images.device)
    column = _whole(p[:, 0] * x + p[:, 1] * y, p[:, 2])
    row = _whole(p[:, 3] * x + p[:, 4] * y, p[:, 5])
    return _taken_inside(images, row, column, fill)


def affine_stepped(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Take each pixel from where a matrix points, as Pillow does by adding up coordinates.

    Args:
        images: (n, C, H, W) of any dtype.
        matrices: (n, 6) floating point.
        fill: (C, 1, 1), for the pixels that come from outside of the image.
    """
    _, _, height, width = images.shape
    a, b, c, d, e, f = matrices.unbind(1)
    column = _grid_steps(c, a, b, height, width)
    row = _grid_steps(f, d, e, height, width)
    return _taken_inside(images, row, column, fill)


def _taken_inside(images: Tensor, row: Tensor, column: Tensor, fill: Tensor) -> Tensor:
    height, width = images.shape[2:]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside[:, None], _take(images, row, column), fill)


def _whole(sums: Tensor, start: Tensor) -> Tensor:
    """(sums + start) // 65536, rounded down.

    By a shift of what is not negative: on XLA that of a negative number rounds toward zero.
    """
    return ((sums + (start + 2**60)) >> 16) - 2**44


def _grid_steps(
    start: Tensor, along_row: Tensor, along_column: Tensor, height: int, width: int
) -> Tensor:
    """(n, height, width) whole coordinates, added up down the first column, then along the rows."""
    first = _added_up(start + along_column * 0.5 + along_row * 0.5, along_column, height)
    step = along_row[:, None].expand(-1, height)
    return _truncated(_added_up(first.flatten(), step.flatten(), width)).view(-1, height, width)


def _added_up(start: Tensor, step: Tensor, count: int) -> Tensor:
    steps = step[:, None].expand(-1, count).clone()
    steps[:, 0] = start
    return steps.cumsum(1)


def _truncated(coordinates: Tensor) -> Tensor:
    return coordinates.floor().clamp(-1, 2**31).long()


def affine_bilinear(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Interpolate where a matrix points; neighbours are clamped at the edge, as in Pillow.

    Args:
        images: (n, C, H, W), integers (interpolated in the dtype of the matrices, then truncated)
            or floating point.
        matrices: (n, 6) floating point, on pixel centres at + 0.5.
        fill: (C, 1, 1), for the pixels that come from outside of the image.
    """
    n, _, height, width = images.shape
    dtype = images.dtype if images.is_floating_point() else matrices.dtype
    m = matrices.view(n, 6, 1, 1)
    x, y = (axis + 0.5 for axis in _grid(height, width, images.device))
    u = apart(m[:, 0] * x) + apart(m[:, 1] * y) + m[:, 2]
    v = apart(m[:, 3] * x) + apart(m[:, 4] * y) + m[:, 5]
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    if images.is_floating_point() and images.device.type == "cpu":
        # The same in half the time; in double precision, which has no price here, as exact.
        grid = torch.stack((u * (2 / width) - 1, v * (2 / height) - 1), -1)
        sampled = F.grid_sample(images.to(grid.dtype), grid, "bilinear", "border", False)
        return torch.where(inside[:, None], sampled.to(dtype), fill)
    left, top = torch.floor(u - 0.5), torch.floor(v - 0.5)
    dx = ((u - 0.5) - left).to(dtype)[:, None]
    dy = ((v - 0.5) - top).to(dtype)[:, None]
    x0, y0 = left.long(), top.long()

    def interpolated(row: Tensor) -> Tensor:
        near = _take(images, row, x0).to(dtype)
        far = _take(images, row, x0 + 1).to(dtype)
        return near + apart((far - near) * dx)

    upper = interpolated(y0)
    values = upper + apart((interpolated(y0 + 1) - upper) * dy)
    return torch.where(inside[:, None], values.to(images.dtype), fill)


def cutout(images: Tensor, boxes: Tensor, black: float = 0) -> Tensor:
    """Blacken a rectangle of each image.

    Args:
        images: (n, C, H, W) of any dtype.
        boxes: (n, 4) int64, first and last + 1 of the rows, then of the columns; may reach over
            the border.
        black: what the rectangle is filled with.
    """
    x, y = _grid(images.shape[2], images.shape[3], images.device)
    top, bottom, left, right = boxes.view(-1, 4, 1, 1).unbind(1)
    hole = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return images.masked_fill(hole[:, None], black)


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns (W,) and rows (H, 1)."""
    return torch.arange(width, device=device), torch.arange(height, device=device)[:, None]


def _take(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels (n, C, H, W) at rows and columns (n, H, W), those outside clamped to the edge."""
    n, channels, height, width = images.shape
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    index = index.view(n, 1, height * width).expand(n, channels, height * width)
    return images.reshape(n, channels, -1).gather(2, index).view_as(images)
