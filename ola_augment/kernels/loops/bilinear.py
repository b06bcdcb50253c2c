"""Bilinear interpolation in double precision, as ``ImagingGenericTransform`` has it.

Neighbours are clamped at the edge, which an image gets by a border of one pixel; where a row of
the result comes from, and with which weights, is computed once for all channels.
"""

from __future__ import annotations

import numpy as np

from ola_augment.kernels.loops.jit import kernel, part
from ola_augment.kernels.loops.moves import copy
from ola_augment.kernels.loops.nearest import pack_bytes, span


@kernel
def _is_inside(x, y, m, height, width):  # type: ignore[no-untyped-def]
    u = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2]
    v = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5]
    return (u >= 0.0) & (u < width) & (v >= 0.0) & (v < height)


@kernel
def _places(m, y, height, width, index, right, below):  # type: ignore[no-untyped-def]
    """Where the pixels of row y come from: the first and last + 1 that come from inside.

    Written for each of these: the index of its upper left neighbour in the image with its border,
    and the weights of those to its right and below.
    """
    across, down = m[1] * (y + 0.5), m[4] * (y + 0.5)
    first, last = span(0, width, m[0] * 0.5 + across + m[2], m[0], float(width))
    first, last = span(first, last, m[3] * 0.5 + down + m[5], m[3], float(height))
    while first < last and not _is_inside(first, y, m, height, width):
        first += 1
    while first < last and not _is_inside(last - 1, y, m, height, width):
        last -= 1
    if first >= last:
        return width, width
    step = np.int32(width + 2)
    for i in range(last - first):
        x = np.float64(first + i)
        u = m[0] * (x + 0.5) + across + m[2] - 0.5
        v = m[3] * (x + 0.5) + down + m[5] - 0.5
        left, top = np.floor(u), np.floor(v)
        right[i], below[i] = u - left, v - top
        index[i] = np.int32(top + 1.0) * step + np.int32(left + 1.0)
    return first, last


@kernel
def _add_border(padded, height, width):  # type: ignore[no-untyped-def]
    """Repeat the outermost pixels of an image that lies inside of a border of one pixel."""
    step = width + 2
    for y in range(1, height + 1):
        padded[y * step] = padded[y * step + 1]
        padded[(y + 1) * step - 1] = padded[(y + 1) * step - 2]
    last = height * step
    for x in range(step):
        padded[x] = padded[step + x]
        padded[last + step + x] = padded[last + x]


def affine_bytes(source, result, m, fill, levels):  # type: ignore[no-untyped-def]
    """Of bytes, whose values Pillow truncates."""
    channels, height, width = source.shape
    step = np.uint64(width + 2)
    padded = np.empty((height + 2) * (width + 2), np.uint32)
    index, weights = np.empty(width, np.int32), np.empty((2, width), np.float64)
    right, below = weights[0], weights[1]
    pixels = np.empty((4, width), np.uint32)
    near, next_, far, across = pixels[0], pixels[1], pixels[2], pixels[3]
    for group in range(0, channels, 4):
        part = source[group : group + 4]
        pack_bytes(part, padded[width + 3 :], width + 2)
        _add_border(padded, height, width)
        for y in range(height):
            first, last = _places(m, y, height, width, index, right, below)
            count = last - first
            for i in range(count):
                j = np.uint64(index[i])
                near[i], next_[i] = padded[j], padded[j + np.uint64(1)]
                far[i], across[i] = padded[j + step], padded[j + step + np.uint64(1)]
            for c in range(len(part)):
                shift, out = np.uint32(8 * c), result[group + c, y]
                out[:first] = fill[group + c]
                out[last:] = fill[group + c]
                inside = out[first:last]
                for i in range(count):
                    a, b = _level(near[i], shift), _level(next_[i], shift)
                    d, e = _level(far[i], shift), _level(across[i], shift)
                    upper = a + (b - a) * right[i]
                    lower = d + (e - d) * right[i]
                    inside[i] = np.uint8(np.int32(upper + (lower - upper) * below[i]))


@part
def _level(pixel, shift):  # type: ignore[no-untyped-def]
    return np.float64(np.int32((pixel >> shift) & np.uint32(255)))


def affine_levels(source, result, m, fill, levels):  # type: ignore[no-untyped-def]
    """Of modes "I" and "F"; ``levels`` as in ``batch.py``."""
    channels, height, width = source.shape
    one, bias, step = levels[4], levels[6], np.uint64(width + 2)
    padded = np.empty((channels, (height + 2) * (width + 2)), source.dtype)
    index, weights = np.empty(width, np.int32), np.empty((2, width), np.float64)
    right, below = weights[0], weights[1]
    for c in range(channels):
        for y in range(height):
            begin = (y + 1) * (width + 2) + 1
            copy(source[c, y], padded[c, begin : begin + width])
        _add_border(padded[c], height, width)
    for y in range(height):
        first, last = _places(m, y, height, width, index, right, below)
        for c in range(channels):
            plane, out = padded[c], result[c, y]
            out[:first] = fill[c]
            out[last:] = fill[c]
            inside = out[first:last]
            for i in range(last - first):
                j = np.uint64(index[i])
                a, b = plane[j] * one, plane[j + step] * one
                x = levels.dtype.type(right[i])
                upper = (a - bias) + (plane[j + np.uint64(1)] - a) * x
                lower = (b - bias) + (plane[j + step + np.uint64(1)] - b) * x
                value = upper + (lower - upper) * levels.dtype.type(below[i])
                # Levels below 0, which are stored with a bias, are truncated toward 0 as well.
                inside[i] = bias + (np.trunc(value) if bias > 0 else value)
