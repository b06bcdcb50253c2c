"""Kernels that change levels of bytes: Pillow's arithmetic, bit for bit.

It is single precision where Pillow's is; no fastmath, because a fused multiply-add rounds
differently.
"""

from __future__ import annotations

import numpy as np

from ola_augment.kernels.kind import Kind
from ola_augment.kernels.loops.jit import kernel, part
from ola_augment.kernels.loops.moves import copy, copy_border

_RED, _GREEN, _BLUE = np.float32(19595), np.float32(38470), np.float32(7471)
_HALF, _ZERO, _WHITE = np.float32(0.5), np.float32(0), np.float32(255)
_UNIT, _THIRTEENTH = np.float32(1 / 65536), np.float32(1 / 13)


@part
def _blend(degenerate, value, factor):  # type: ignore[no-untyped-def]
    """``ImagingBlend``: degenerate + factor (value - degenerate), clipped and truncated."""
    return np.uint8(min(max(degenerate + factor * (value - degenerate), _ZERO), _WHITE))


@part
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    """(19595 R + 38470 G + 7471 B + 32768) >> 16; the sums stay below 2^24, exact in float32."""
    weighted = _RED * np.float32(red) + _GREEN * np.float32(green) + _BLUE * np.float32(blue)
    return np.floor(weighted * _UNIT + _HALF)


@kernel
def _look_up(source, result, table):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        result[i] = table[source[i]]


@kernel
def _stretch_table(source, table):  # type: ignore[no-untyped-def]
    """``ImageOps.autocontrast`` of one channel."""
    low, high = source[0], source[0]
    for i in range(source.size):
        low, high = min(low, source[i]), max(high, source[i])
    scale = 255.0 / (np.float64(high) - np.float64(low)) if high > low else 1.0
    offset = -np.float64(low) * scale if high > low else 0.0
    for v in range(256):
        table[v] = np.uint8(min(max(v * scale + offset, 0.0), 255.0))


@kernel
def _equalize_table(source, table, counts):  # type: ignore[no-untyped-def]
    """``ImageOps.equalize`` of one channel; ``counts`` is working memory."""
    size, quarter = source.size, source.size // 4
    for v in range(1024):
        counts[v] = 0
    # Four histograms: neighbours are often equal, and adding to one counter twice waits.
    one, two, three = source[quarter:], source[2 * quarter :], source[3 * quarter :]
    first, second, third = counts[256:], counts[512:], counts[768:]
    for i in range(quarter):
        counts[source[i]] += 1
        first[one[i]] += 1
        second[two[i]] += 1
        third[three[i]] += 1
    for i in range(4 * quarter, size):
        counts[source[i]] += 1
    for v in range(256):
        counts[v] += first[v] + second[v] + third[v]
    last = 255
    while counts[last] == 0:
        last -= 1
    step = (size - counts[last]) // 255
    below = step // 2
    for v in range(256):
        # Truncated, the double quotient of whole numbers below 2^53 is the whole quotient.
        table[v] = np.uint8(min(below / step, 255.0)) if step > 0 else v
        below += counts[v]


@kernel
def _mean_grey(source, weights):  # type: ignore[no-untyped-def]
    """Mean of the grey image, rounded; Pillow rounds its grey pixels too, others have no need."""
    channels, size = source.shape
    total, weighted = np.int64(0), 0.0
    if channels == 3 and len(weights) == 0:
        total = _sum_of_grey(source[0], source[1], source[2])
        return np.float64((2 * total + size) // (2 * size))
    for c in range(channels):
        channel, sum_ = source[c], np.int64(0)
        for i in range(size):
            sum_ += channel[i]
        total += sum_
        weighted += weights[c] * sum_ if len(weights) > 0 else 0.0
    if len(weights) > 0:
        return np.floor(weighted / size + 0.5)
    size *= channels
    return np.float64((2 * total + size) // (2 * size))


@kernel
def _sum_of_grey(red, green, blue):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for start in range(0, red.size, 65536):
        sum_ = np.int32(0)  # of so many pixels below 2^24
        a, b, c = red[start:], green[start:], blue[start:]
        for i in range(min(65536, a.size)):
            grey = 19595 * np.int32(a[i]) + 38470 * np.int32(b[i]) + 7471 * np.int32(c[i])
            sum_ = np.int32(sum_ + np.int32((grey + 32768) >> 16))
        total += sum_
    return total


@kernel
def _toward(source, result, degenerate, factor):  # type: ignore[no-untyped-def]
    """Blend with one level: ``ImageEnhance.Brightness`` with black, ``Contrast`` with the mean."""
    for i in range(source.size):
        result[i] = _blend(degenerate, np.float32(source[i]), factor)


@kernel
def _change_bits(source, result, first, flipped, kept):  # type: ignore[no-untyped-def]
    """Flip bits of all levels from the first on, and keep some of them."""
    for i in range(source.size):
        v = source[i]
        result[i] = (v ^ (flipped if v >= first else np.uint8(0))) & kept


@kernel
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


@kernel
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


@kernel
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


@kernel
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


def run_bytes(  # type: ignore[no-untyped-def]
    kind, source, result, width, magnitude, weights, levels, whole, table, counts
):
    """An operation that moves no pixels on the colours (C, H W) of an image.

    ``table`` (256,) uint8 and ``counts`` (1024,) int32 are working memory.
    """
    factor, mean = np.float32(magnitude), _ZERO
    first, flipped, kept = np.uint8(0), np.uint8(255), np.uint8(255)
    if kind == Kind.COLOR:
        _color(source, result, factor, weights)
    elif kind == Kind.BRIGHTNESS or kind == Kind.CONTRAST:
        if kind == Kind.CONTRAST:
            mean = np.float32(_mean_grey(source, weights))
        _toward(source.reshape(-1), result.reshape(-1), mean, factor)
    elif kind == Kind.SOLARIZE or kind == Kind.POSTERIZE or kind == Kind.INVERT:
        if kind == Kind.POSTERIZE:
            flipped, kept = np.uint8(0), np.uint8(256 - (1 << (8 - int(magnitude))))
        elif kind == Kind.SOLARIZE and magnitude > 255:
            flipped = np.uint8(0)
        elif kind == Kind.SOLARIZE:
            first = np.uint8(np.ceil(magnitude))
        _change_bits(source.reshape(-1), result.reshape(-1), first, flipped, kept)
    else:
        for c in range(len(source)):
            if kind == Kind.SHARPNESS:
                _sharpness(source[c], result[c], width, factor)
            elif kind == Kind.BLUR:
                _blur(source[c], result[c], width)
            else:
                if kind == Kind.AUTO_CONTRAST:
                    _stretch_table(source[c], table)
                else:
                    _equalize_table(source[c], table, counts)
                _look_up(source[c], result[c], table)
