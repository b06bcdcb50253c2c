"""Exact uint8 kernels for the CPU: Pillow's arithmetic in one compiled loop over a batch.

Every kernel reads one image (C, H, W) and writes another, so that a chain of operations goes back
and forth between the result and one scratch image and copies nothing. Arithmetic is single
precision where Pillow's is; no fastmath, because a fused multiply-add rounds differently. What is
not of bytes is left to ``ranged.py``, which shares the kernels that move pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ola_augment.kernels.kind import Kind

#: The one signature of ``run_batch``: one compilation serves all batches.
SIGNATURES = [
    "void(uint8[:,:,:,::1], uint8[:,:,:,::1], int64[:,::1], boolean[:,::1], int64[:,::1], "
    "int8[:,::1], float32[:,:,::1], int64[::1], float64[:,:,:,::1], int64[:,:,:,::1], "
    "uint8[:,:,::1], uint8[::1], boolean, int64, float64[::1])"
]

_RED, _GREEN, _BLUE = np.float32(19595), np.float32(38470), np.float32(7471)
_HALF, _ZERO, _WHITE = np.float32(0.5), np.float32(0), np.float32(255)
_UNIT, _THIRTEENTH = np.float32(1 / 65536), np.float32(1 / 13)


@njit(cache=True, nogil=True, inline="always")
def _blend(degenerate, value, factor):  # type: ignore[no-untyped-def]
    """``ImagingBlend``: degenerate + factor (value - degenerate), clipped and truncated."""
    return np.uint8(min(max(degenerate + factor * (value - degenerate), _ZERO), _WHITE))


@njit(cache=True, nogil=True, inline="always")
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    """(19595 R + 38470 G + 7471 B + 32768) >> 16; the sums stay below 2^24, exact in float32."""
    weighted = _RED * np.float32(red) + _GREEN * np.float32(green) + _BLUE * np.float32(blue)
    return np.floor(weighted * _UNIT + _HALF)


@njit(cache=True, nogil=True)
def _copy(source, result):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        result[i] = source[i]


@njit(cache=True, nogil=True)
def _look_up(source, result, table):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        result[i] = table[source[i]]


@njit(cache=True, nogil=True)
def _stretch_table(source, table):  # type: ignore[no-untyped-def]
    """``ImageOps.autocontrast`` of one channel."""
    low, high = source[0], source[0]
    for i in range(source.size):
        low, high = min(low, source[i]), max(high, source[i])
    scale = 255.0 / (np.float64(high) - np.float64(low)) if high > low else 1.0
    offset = -np.float64(low) * scale if high > low else 0.0
    for v in range(256):
        table[v] = np.uint8(min(max(v * scale + offset, 0.0), 255.0))


@njit(cache=True, nogil=True)
def _equalize_table(source, table, counts):  # type: ignore[no-untyped-def]
    """``ImageOps.equalize`` of one channel; ``counts`` is working memory."""
    size = source.size
    whole = size - size % 4
    counts[:] = 0
    # Four histograms: neighbours are often equal, and adding to one counter twice waits.
    for i in range(0, whole, 4):
        counts[source[i]] += 1
        counts[source[i + 1] + 256] += 1
        counts[source[i + 2] + 512] += 1
        counts[source[i + 3] + 768] += 1
    for i in range(whole, size):
        counts[source[i]] += 1
    for v in range(256):
        counts[v] += counts[v + 256] + counts[v + 512] + counts[v + 768]
    last = 255
    while counts[last] == 0:
        last -= 1
    step = (size - counts[last]) // 255
    below = step // 2
    for v in range(256):
        # Truncated, the double quotient of whole numbers below 2^53 is the whole quotient.
        table[v] = np.uint8(min(below / step, 255.0)) if step > 0 else v
        below += counts[v]


@njit(cache=True, nogil=True)
def _mean_grey(source, weights):  # type: ignore[no-untyped-def]
    """Mean of the grey image, rounded; Pillow rounds its grey pixels too, others have no need."""
    channels, size = source.shape
    total, weighted = np.int64(0), 0.0
    if len(weights) > 0:
        for c in range(channels):
            total = np.int64(0)
            for i in range(size):
                total += source[c, i]
            weighted += weights[c] * total
        return np.floor(weighted / size + 0.5)
    if channels == 3:
        for i in range(size):
            total += np.int64(_luma(source[0, i], source[1, i], source[2, i]))
    else:
        for c in range(channels):
            for i in range(size):
                total += source[c, i]
        size *= channels
    return np.float64((2 * total + size) // (2 * size))


@njit(cache=True, nogil=True)
def _contrast_table(source, factor, table, weights):  # type: ignore[no-untyped-def]
    """``ImageEnhance.Contrast``: blend with the mean grey level."""
    mean = np.float32(_mean_grey(source, weights))
    for v in range(256):
        table[v] = _blend(mean, np.float32(v), factor)


@njit(cache=True, nogil=True)
def _color(source, result, factor, weights):  # type: ignore[no-untyped-def]
    """``ImageEnhance.Color``: blend with the grey image."""
    channels, size = source.shape
    if channels == 1:
        _copy(source[0], result[0])
    elif channels == 3 and len(weights) == 0:
        for i in range(size):
            grey = _luma(source[0, i], source[1, i], source[2, i])
            for c in range(3):
                result[c, i] = _blend(grey, np.float32(source[c, i]), factor)
    else:
        grey = np.empty(size, np.float32)
        _mean_of_bands(source, grey, weights)
        for c in range(channels):
            for i in range(size):
                result[c, i] = _blend(grey[i], np.float32(source[c, i]), factor)


@njit(cache=True, nogil=True)
def _mean_of_bands(source, grey, weights):  # type: ignore[no-untyped-def]
    """The grey image, rounded, of any number of channels."""
    channels, size = source.shape
    total = np.zeros(size, np.float64)
    for c in range(channels):
        weight = weights[c] if len(weights) > 0 else 1.0
        for i in range(size):
            total[i] += weight * source[c, i]
    divisor = 1.0 if len(weights) > 0 else float(channels)
    for i in range(size):
        grey[i] = np.floor(total[i] / divisor + 0.5)


@njit(cache=True, nogil=True)
def _copy_border(source, result, width, border):  # type: ignore[no-untyped-def]
    height = source.size // width
    for y in range(height):
        edge = border if border <= y < height - border else width
        for x in range(y * width, y * width + min(edge, width)):
            result[x] = source[x]
        for x in range((y + 1) * width - min(edge, width), (y + 1) * width):
            result[x] = source[x]


@njit(cache=True, nogil=True)
def _sharpness(source, result, width, factor):  # type: ignore[no-untyped-def]
    """``ImageEnhance.Sharpness``: blend with ``ImageFilter.SMOOTH``, whose border is a copy."""
    # One sweep over all rows; what it makes of neighbours across a row's end is overwritten.
    a, b, c, out = source, source[width:], source[2 * width :], result[width + 1 :]
    for i in range(source.size - 2 * width - 2):
        total = a[i] + a[i + 1] + a[i + 2] + c[i] + c[i + 1] + c[i + 2]
        total += b[i] + 5 * b[i + 1] + b[i + 2]
        # total / 13 rounded, exactly: no multiple of 1/13 lies half way.
        smooth = np.floor(np.float32(np.int32(total)) * _THIRTEENTH + _HALF)
        out[i] = _blend(smooth, np.float32(b[i + 1]), factor)
    _copy_border(source, result, width, 1)


@njit(cache=True, nogil=True)
def _blur(source, result, width):  # type: ignore[no-untyped-def]
    """``ImageFilter.BLUR``: mean of the 16 pixels around the 3x3 neighbourhood, rounded."""
    a, b, c, d = source, source[width:], source[2 * width :], source[3 * width :]
    e, out = source[4 * width :], result[2 * width + 2 :]
    for i in range(source.size - 4 * width - 4):
        total = a[i] + a[i + 1] + a[i + 2] + a[i + 3] + a[i + 4]
        total += e[i] + e[i + 1] + e[i + 2] + e[i + 3] + e[i + 4]
        total += b[i] + c[i] + d[i] + b[i + 4] + c[i + 4] + d[i + 4]
        out[i] = (total + 8) >> 4
    _copy_border(source, result, width, 2)


@njit(cache=True, nogil=True)
def _cutout(source, result, side, center, black):  # type: ignore[no-untyped-def]
    channels, height, width = source.shape
    size = int(side)
    top = math.floor(center[0] * height) - size // 2
    left = math.floor(center[1] * width) - size // 2
    _copy(source.ravel(), result.ravel())
    for c in range(channels):
        for y in range(max(top, 0), min(top + size, height)):
            result[c, y, max(left, 0) : max(left + size, 0)] = black


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
def _flat_index(column, row, height, width):  # type: ignore[no-untyped-def]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return row * width + column if inside else -1


@njit(cache=True, nogil=True)
def _truncate(v):  # type: ignore[no-untyped-def]
    """``COORD``: between -1 and 0 is outside."""
    return np.int64(v) if v >= 0.0 else np.int64(-1)


@njit(cache=True, nogil=True)
def _shift_rows(source, result, shape, f, fill):  # type: ignore[no-untyped-def]
    """The case that rows stay rows, shifted or reversed: flips, translations and shear_x."""
    channels, height, width = shape
    step = 1 if f[0] > 0 else -1
    for y in range(height):
        start, row = (f[1] * y + f[2]) >> 16, (f[4] * y + f[5]) >> 16
        # Columns first .. last - 1 come from start + step * x, the others from outside.
        first, last = (-start, width - start) if step > 0 else (start - width + 1, start + 1)
        first, last = max(first, 0), min(last, width)
        if row < 0 or row >= height or first >= last:
            first, last = width, width
        for c in range(channels):
            out, line = (c * height + y) * width, (c * height + row) * width + start
            for x in range(first):
                result[np.uint64(out + x)] = fill[c]
            if step > 0:
                for x in range(first, last):
                    result[np.uint64(out + x)] = source[np.uint64(line + x)]
            else:
                for x in range(first, last):
                    result[np.uint64(out + x)] = source[np.uint64(line - x)]
            for x in range(last, width):
                result[np.uint64(out + x)] = fill[c]


@njit(cache=True, nogil=True)
def _gather(source, result, index, fill):  # type: ignore[no-untyped-def]
    size = len(index)
    for c in range(len(fill)):
        for i in range(size):
            j = index[i]
            if j >= 0:
                result[np.uint64(c * size + i)] = source[np.uint64(c * size + j)]
            else:
                result[np.uint64(c * size + i)] = fill[c]


@njit(cache=True, nogil=True)
def _affine_nearest(source, result, shape, m, f, fill):  # type: ignore[no-untyped-def]
    """``ImagingTransformAffine``."""
    channels, height, width = shape
    fixed = _is_fixed(m, height, width)
    if fixed and f[3] == 0 and abs(f[0]) == 65536:
        _shift_rows(source, result, shape, f, fill)
        return
    size = height * width
    index = np.empty(size, np.int32)
    u0, v0 = m[2] + m[1] * 0.5 + m[0] * 0.5, m[5] + m[4] * 0.5 + m[3] * 0.5
    for y in range(height):
        line = y * width
        if fixed:
            x0, y0 = f[1] * y + f[2], f[4] * y + f[5]
            for x in range(width):
                index[line + x] = _flat_index(
                    (f[0] * x + x0) >> 16, (f[3] * x + y0) >> 16, height, width
                )
        else:
            # Added up step by step as Pillow does, rounding included.
            u, v = u0, v0
            for x in range(width):
                index[line + x] = _flat_index(_truncate(u), _truncate(v), height, width)
                u, v = u + m[0], v + m[3]
            u0, v0 = u0 + m[1], v0 + m[4]
    if channels != 3 and channels != 1:
        _gather(source, result, index, fill)
        return
    # Pixel by pixel, unrolled; a single channel is written three times.
    second, third = (size, 2 * size) if channels == 3 else (0, 0)
    red, green, blue = fill[0], fill[second // size], fill[third // size]
    for i in range(size):
        j = index[i]
        if j >= 0:
            result[np.uint64(i)] = source[np.uint64(j)]
            result[np.uint64(i + second)] = source[np.uint64(j + second)]
            result[np.uint64(i + third)] = source[np.uint64(j + third)]
        else:
            result[np.uint64(i)] = red
            result[np.uint64(i + second)] = green
            result[np.uint64(i + third)] = blue


@njit(cache=True, nogil=True)
def _affine_bilinear(source, result, m, fill):  # type: ignore[no-untyped-def]
    """``ImagingGenericTransform`` with ``bilinear_filter``: neighbours are clamped at the edge."""
    channels, height, width = source.shape
    for y in range(height):
        for x in range(width):
            u = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2]
            v = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5]
            if u < 0.0 or u >= width or v < 0.0 or v >= height:
                for c in range(channels):
                    result[c, y, x] = fill[c]
                continue
            left, top = math.floor(u - 0.5), math.floor(v - 0.5)
            dx, dy = (u - 0.5) - left, (v - 0.5) - top
            x0, x1 = max(int(left), 0), min(int(left) + 1, width - 1)
            y0, y1 = max(int(top), 0), min(int(top) + 1, height - 1)
            for c in range(channels):
                upper, lower = source[c, y0], source[c, y1]
                a = upper[x0] + (np.int64(upper[x1]) - np.int64(upper[x0])) * dx
                b = lower[x0] + (np.int64(lower[x1]) - np.int64(lower[x0])) * dx
                result[c, y, x] = np.uint8(a + (b - a) * dy)


@njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]
    kind, source, result, parameters, fixed, center, fill, bilinear, colors, weights, table, counts
):
    """One operation on one image; ``table`` is overwritten by the kinds that make their own."""
    channels, width = len(source), source.shape[2]
    flat, flat_result = source.reshape(channels, -1), result.reshape(channels, -1)
    if kind != Kind.AFFINE and kind != Kind.CUTOUT:
        for c in range(colors, channels):
            _copy(flat[c], flat_result[c])
        flat, flat_result = flat[:colors], flat_result[:colors]
    factor = np.float32(parameters[0])
    if kind == Kind.AFFINE and bilinear:
        _affine_bilinear(source, result, parameters, fill)
    elif kind == Kind.AFFINE:
        _affine_nearest(source.ravel(), result.ravel(), source.shape, parameters, fixed, fill)
    elif kind == Kind.COLOR:
        _color(flat, flat_result, factor, weights)
    elif kind == Kind.CUTOUT:
        _cutout(source, result, parameters[0], center, np.uint8(0))
    else:
        if kind == Kind.CONTRAST:
            _contrast_table(flat, factor, table, weights)
        for c in range(colors):
            if kind == Kind.SHARPNESS:
                _sharpness(flat[c], flat_result[c], width, factor)
            elif kind == Kind.BLUR:
                _blur(flat[c], flat_result[c], width)
            else:
                if kind == Kind.AUTO_CONTRAST:
                    _stretch_table(flat[c], table)
                elif kind == Kind.EQUALIZE:
                    _equalize_table(flat[c], table, counts)
                _look_up(flat[c], flat_result[c], table)


@njit(cache=True, nogil=True)
def run_batch(  # type: ignore[no-untyped-def]
    images, result, ops, keep, bins, signs, centers,
    kinds, parameters, fixed, tables, fill, bilinear, colors, weights,
):  # fmt: skip
    """Apply the kept slots of every image from left to right.

    ``Kind.IDENTITY`` and ``Kind.BATCHED`` leave the image as it is.

    Args:
        images: (B, C, H, W) uint8, contiguous, as all of these.
        result: (B, C, H, W) uint8; written to.
        ops: (B, S) int64, as the next four a field of ``Actions``.
        keep: (B, S) bool.
        bins: (B, S) int64.
        signs: (B, S) int8.
        centers: (B, S, 2) float32.
        kinds: (A,) int64, as the next three a field of ``Program``.
        parameters: (A, bins, 2, 6) float64.
        fixed: (A, bins, 2, 6) int64.
        tables: (A, bins, 256) uint8.
        fill: (C,) uint8.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        colors: how many channels colours change; an alpha channel comes after them.
        weights: (colors,) float64 of the grey image; empty: Pillow's for three, else the mean.
    """
    scratch = np.empty(result.shape[1:], np.uint8)
    table, counts = np.empty(256, np.uint8), np.empty(1024, np.int32)
    slots = np.empty(ops.shape[1], np.int64)
    for i in range(len(images)):
        active = 0
        for s in range(ops.shape[1]):
            if keep[i, s] and kinds[ops[i, s]] not in (Kind.IDENTITY, Kind.BATCHED):
                slots[active] = s
                active += 1
        if active == 0:
            _copy(images[i].ravel(), result[i].ravel())
            continue
        source = images[i]
        for j in range(active):
            s = slots[j]
            op, k, sign = ops[i, s], bins[i, s], int(signs[i, s] < 0)
            # The last operation writes the result, the one before it the scratch image, ...
            target = scratch if (active - j) % 2 == 0 else result[i]
            if kinds[op] == Kind.TABLE:
                table[:] = tables[op, k]
            _run(
                kinds[op], source, target, parameters[op, k, sign], fixed[op, k, sign],
                centers[i, s], fill, bilinear, colors, weights, table, counts,
            )  # fmt: skip
            source = target
