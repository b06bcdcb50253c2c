"""Kernels that change levels of bytes: Pillow's arithmetic, bit for bit.

It is single precision where Pillow's is; no fastmath, because a fused multiply-add rounds
differently.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ola_augment.kernels.kind import Kind
from ola_augment.kernels.loops.moves import copy, copy_border

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
def _toward(source, result, degenerate, factor):  # type: ignore[no-untyped-def]
    """Blend with one level: ``ImageEnhance.Brightness`` with black, ``Contrast`` with the mean."""
    for i in range(source.size):
        result[i] = _blend(degenerate, np.float32(source[i]), factor)


@njit(cache=True, nogil=True)
def _solarize(source, result, threshold):  # type: ignore[no-untyped-def]
    if threshold > 255:
        copy(source, result)
        return
    first = np.uint8(np.ceil(threshold))
    for i in range(source.size):
        v = source[i]
        result[i] = v if v < first else np.uint8(255) - v


@njit(cache=True, nogil=True)
def _posterize(source, result, bits):  # type: ignore[no-untyped-def]
    kept = np.uint8(256 - 2 ** (8 - int(bits)))
    for i in range(source.size):
        result[i] = source[i] & kept


@njit(cache=True, nogil=True)
def _invert(source, result):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        result[i] = np.uint8(255) - source[i]


@njit(cache=True, nogil=True)
def _color(source, result, factor, weights):  # type: ignore[no-untyped-def]
    """``ImageEnhance.Color``: blend with the grey image."""
    channels, size = source.shape
    if channels == 1:
        copy(source[0], result[0])
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
    copy_border(source, result, width, 1)


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
    copy_border(source, result, width, 2)


@njit(cache=True, nogil=True)
def run_bytes(  # type: ignore[no-untyped-def]
    kind, source, result, width, magnitude, weights, table, counts
):
    """An operation that moves no pixels on the colours (C, H W) of an image.

    ``table`` is that of a ``Kind.TABLE``; other kinds write their own into it.
    """
    factor = np.float32(magnitude)
    if kind == Kind.COLOR:
        _color(source, result, factor, weights)
        return
    mean = _ZERO
    if kind == Kind.CONTRAST:
        mean = np.float32(_mean_grey(source, weights))
    for c in range(len(source)):
        if kind == Kind.SHARPNESS:
            _sharpness(source[c], result[c], width, factor)
        elif kind == Kind.BLUR:
            _blur(source[c], result[c], width)
        elif kind == Kind.SOLARIZE:
            _solarize(source[c], result[c], magnitude)
        elif kind == Kind.POSTERIZE:
            _posterize(source[c], result[c], magnitude)
        elif kind == Kind.INVERT:
            _invert(source[c], result[c])
        elif kind == Kind.CONTRAST or kind == Kind.BRIGHTNESS:
            _toward(source[c], result[c], mean, factor)
        else:
            if kind == Kind.AUTO_CONTRAST:
                _stretch_table(source[c], table)
            elif kind == Kind.EQUALIZE:
                _equalize_table(source[c], table, counts)
            _look_up(source[c], result[c], table)
