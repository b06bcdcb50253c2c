"""Kernels that move pixels as they are, of any type: the nearest one, flips, cutouts, copies."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def copy(source, result):  # type: ignore[no-untyped-def]
    """Flat arrays."""
    for i in range(source.size):
        result[i] = source[i]


@njit(cache=True, nogil=True)
def copy_border(source, result, width, border):  # type: ignore[no-untyped-def]
    """What filters leave as it is, of a flat plane."""
    height = source.size // width
    for y in range(height):
        edge = border if border <= y < height - border else width
        for x in range(y * width, y * width + min(edge, width)):
            result[x] = source[x]
        for x in range((y + 1) * width - min(edge, width), (y + 1) * width):
            result[x] = source[x]


@njit(cache=True, nogil=True)
def cutout(source, result, side, center, black):  # type: ignore[no-untyped-def]
    """Blacken a square, clipped at the border."""
    channels, height, width = source.shape
    size = int(side)
    top = int(np.floor(center[0] * height)) - size // 2
    left = int(np.floor(center[1] * width)) - size // 2
    copy(source.ravel(), result.ravel())
    for c in range(channels):
        for y in range(max(top, 0), min(top + size, height)):
            result[c, y, max(left, 0) : max(left + size, 0)] = black


@njit(cache=True, nogil=True)
def span(first, last, start, step, size):  # type: ignore[no-untyped-def]
    """All x in first .. last - 1 with 0 <= start + step x < size, and up to three more a side."""
    if abs(step) > 1e-9:
        a, b = (0.0 - start) / step, (size - start) / step
        low = min(max(min(a, b), 0.0), float(last))
        high = min(max(max(a, b), -1.0), float(last))
        return max(first, int(low) - 2), min(last, int(high) + 3)
    return (first, last) if 0.0 <= start < size else (last, last)


@njit(cache=True, nogil=True)
def _is_fixed(m, height, width):  # type: ignore[no-untyped-def]
    """Whether Pillow computes in 16.16 fixed point, or with the same result as if it did."""
    # Rows that stay rows are added up in floating point: whole steps and starts give the same.
    whole = abs(m[0]) == 1 and abs(m[4]) == 1 and m[2] % 1 == 0 and m[5] % 1 == 0
    if m[1] == 0 and m[3] == 0 and not whole:
        return False
    for x, y in ((0, 0), (width, height), (0, height), (width, 0)):
        u, v = x * m[0] + y * m[1] + m[2], x * m[3] + y * m[4] + m[5]
        if abs(u) >= 32768.0 or abs(v) >= 32768.0:
            return False
    return True


@njit(cache=True, nogil=True)
def _fill_outside(result, first, last, y, fill):  # type: ignore[no-untyped-def]
    for c in range(len(fill)):
        result[c, y, :first] = fill[c]
        result[c, y, last:] = fill[c]


@njit(cache=True, nogil=True)
def _reverse(line, out):  # type: ignore[no-untyped-def]
    size = len(out)
    for x in range(size):
        out[x] = line[size - 1 - x]


@njit(cache=True, nogil=True)
def _shift_rows(source, result, f, fill):  # type: ignore[no-untyped-def]
    """The case that rows stay rows, shifted or reversed: flips, translations and shear_x."""
    channels, height, width = source.shape
    forward = f[0] > 0
    for y in range(height):
        start, row = (f[1] * y + f[2]) >> 16, (f[4] * y + f[5]) >> 16
        # Columns first .. last - 1 come from start + x or start - x, the others from outside.
        first, last = (-start, width - start) if forward else (start - width + 1, start + 1)
        first, last = max(first, 0), min(last, width)
        if row < 0 or row >= height or first >= last:
            _fill_outside(result, width, width, y, fill)
            continue
        _fill_outside(result, first, last, y, fill)
        for c in range(channels):
            out = result[c, y, first:last]
            if forward:
                copy(source[c, row, start + first : start + last], out)
            else:
                _reverse(source[c, row, start - last + 1 : start - first + 1], out)


@njit(cache=True, nogil=True, inline="always")
def _is_inside(column, row, height, width):  # type: ignore[no-untyped-def]
    return (column >= 0) & (column < width) & (row >= 0) & (row < height)


@njit(cache=True, nogil=True)
def _take(source, result, shape, index, start):  # type: ignore[no-untyped-def]
    """A row of pixels, from ``start`` on, from an index each; all at once where there are three."""
    channels, height, width = shape
    size, one = np.uint64(height * width), np.uint64(start)
    if channels == 3:
        second, third = one + size, one + size + size
        for i in range(len(index)):
            j = np.uint64(index[i])
            result[one + np.uint64(i)] = source[j]
            result[second + np.uint64(i)] = source[j + size]
            result[third + np.uint64(i)] = source[j + size + size]
        return
    for c in range(channels):
        offset = np.uint64(c) * size
        for i in range(len(index)):
            result[one + offset + np.uint64(i)] = source[np.uint64(index[i]) + offset]


@njit(cache=True, nogil=True)
def _take_fixed(source, result, f, fill):  # type: ignore[no-untyped-def]
    height, width = source.shape[1:]
    flat, flat_result = source.reshape(-1), result.reshape(-1)
    index = np.empty(width, np.int32)
    wide, high = np.float64(width << 16), np.float64(height << 16)
    for y in range(height):
        u, v = f[1] * y + f[2], f[4] * y + f[5]
        first, last = span(0, width, np.float64(u), np.float64(f[0]), wide)
        first, last = span(first, last, np.float64(v), np.float64(f[3]), high)
        while first < last and not _is_inside(
            (u + f[0] * first) >> 16, (v + f[3] * first) >> 16, height, width
        ):
            first += 1
        while first < last and not _is_inside(
            (u + f[0] * (last - 1)) >> 16, (v + f[3] * (last - 1)) >> 16, height, width
        ):
            last -= 1
        if first >= last:
            first = last = width
        _fill_outside(result, first, last, y, fill)
        column, row = u + f[0] * first, v + f[3] * first
        for i in range(last - first):
            index[i] = (row >> 16) * width + (column >> 16)
            column += f[0]
            row += f[3]
        _take(flat, flat_result, source.shape, index[: last - first], y * width + first)


@njit(cache=True, nogil=True)
def _take_added_up(source, result, m, fill):  # type: ignore[no-untyped-def]
    """Coordinates are added up step by step as Pillow does, rounding included."""
    channels, height, width = source.shape
    u0, v0 = m[2] + m[1] * 0.5 + m[0] * 0.5, m[5] + m[4] * 0.5 + m[3] * 0.5
    for y in range(height):
        u, v = u0, v0
        for x in range(width):
            # Truncated, what lies between -1 and 0 is outside.
            column = np.int64(u) if u >= 0.0 else np.int64(-1)
            row = np.int64(v) if v >= 0.0 else np.int64(-1)
            inside = _is_inside(column, row, height, width)
            for c in range(channels):
                result[c, y, x] = source[c, row, column] if inside else fill[c]
            u, v = u + m[0], v + m[3]
        u0, v0 = u0 + m[1], v0 + m[4]


@njit(cache=True, nogil=True)
def affine_nearest(source, result, m, f, fill):  # type: ignore[no-untyped-def]
    """``ImagingTransformAffine``."""
    if not _is_fixed(m, source.shape[1], source.shape[2]):
        _take_added_up(source, result, m, fill)
    elif f[3] == 0 and abs(f[0]) == 65536:
        _shift_rows(source, result, f, fill)
    else:
        _take_fixed(source, result, f, fill)
