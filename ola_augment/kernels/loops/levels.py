"""Kernels that change levels of uint16 and float32, whatever their range.

Whole levels are counted from the low end of the range, computed in double precision and truncated
where Pillow truncates; floating ones are computed in single precision and rounded nowhere.
``levels`` is as in ``batch.py``.
"""

from __future__ import annotations

import numpy as np

from ola_augment.kernels.kind import BINS, FEW_BINS, PIXELS, Kind
from ola_augment.kernels.loops.jit import kernel, part
from ola_augment.kernels.loops.moves import copy, copy_border


@part
def _limited(value, low, high):  # type: ignore[no-untyped-def]
    return min(max(value, low), high)


@part
def _as(levels, number):  # type: ignore[no-untyped-def]
    """A number in the precision of the levels, which one of Python's would widen."""
    return levels.dtype.type(number)


@part
def _blend(degenerate, level, factor, black, white, whole):  # type: ignore[no-untyped-def]
    """Degenerate + factor (level - degenerate), all counted from black, within the range."""
    level = _limited(degenerate + factor * (level - degenerate), black, white)
    return np.floor(level) if whole else level


@kernel
def _solarize(source, result, threshold, levels, whole):  # type: ignore[no-untyped-def]
    low, high, least, most = levels[0], levels[1], levels[2], levels[3]
    one = levels[4]
    count = high - low + (one if whole else levels[5])
    if not whole:  # as bytes: from the first whole threshold on, above 255 there is none
        threshold = np.ceil(threshold) if threshold <= 255 else _as(levels, np.inf)
    bound = low + threshold * count / _as(levels, 256)
    for i in range(source.size):
        v = source[i] * one
        result[i] = _limited(low + high - v, least, most) if v >= bound else v


@kernel
def _posterize(source, result, bits, levels, whole):  # type: ignore[no-untyped-def]
    low, high, least, most = levels[0], levels[1], levels[2], levels[3]
    kept = 1 << int(bits)
    if whole:
        step = (high - low + levels[4]) / _as(levels, kept)
        if step >= levels[4] and np.log2(step) == np.floor(np.log2(step)):
            per_step = levels[4] / step  # exact, and sooner multiplied by than divided by step
            for i in range(source.size):
                level = np.floor((source[i] - low) * per_step) * step
                result[i] = _limited(low + level, least, most)
            return
        for i in range(source.size):
            level = np.floor(np.floor((source[i] - low) / step) * step)
            result[i] = _limited(low + level, least, most)
    else:
        # In steps of the nearest 255ths, as images of bytes that were divided by 255.
        count, half = _as(levels, 255) / (high - low), _as(levels, 0.5)
        per_step, step = _as(levels, kept / 256), _as(levels, 256 / kept) / count
        for i in range(source.size):
            level = np.floor((source[i] - low) * count + half)
            result[i] = low + np.floor(level * per_step) * step


@kernel
def _invert(source, result, levels):  # type: ignore[no-untyped-def]
    ends, least, most = levels[0] + levels[1], levels[2], levels[3]
    for i in range(source.size):
        result[i] = _limited(ends - source[i], least, most)


@kernel
def _toward(source, result, degenerate, factor, levels, whole):  # type: ignore[no-untyped-def]
    """Blend with one level."""
    low, black, white = levels[0], levels[5], levels[1] - levels[0]
    for i in range(source.size):
        result[i] = low + _blend(degenerate, source[i] - low, factor, black, white, whole)


@kernel
def _auto_contrast(source, result, levels, whole):  # type: ignore[no-untyped-def]
    lowest, highest = source[0], source[0]
    for i in range(source.size):
        lowest, highest = min(lowest, source[i]), max(highest, source[i])
    if highest == lowest:
        copy(source, result)
        return
    low, high, first = levels[0], levels[1], lowest * levels[4]
    white = high - low
    scale = white / (highest * levels[4] - first)
    if whole:
        offset = -(first - low) * scale
        for i in range(source.size):
            level = _limited((source[i] - low) * scale + offset, levels[5], white)
            result[i] = low + np.floor(level)
    else:
        for i in range(source.size):
            result[i] = low + _limited((source[i] - first) * scale, levels[5], white)


@kernel
def _equalize(source, result, levels, whole):  # type: ignore[no-untyped-def]
    """``ImageOps.equalize`` with as many levels as there are, or bins of floats."""
    low, white, size = levels[0], levels[1] - levels[0], source.size
    bins = int(white) + 1 if whole else BINS if size >= PIXELS else FEW_BINS
    grades = bins if whole else FEW_BINS
    if size < bins:  # no step
        copy(source, result)
        return
    black, top, half = levels[5], _as(levels, bins - 1), _as(levels, 0 if whole else 0.5)
    scale = top / white
    counts = np.zeros(bins, np.int32)
    index = np.empty(size, np.uint16)
    for i in range(size):
        index[i] = _limited((source[i] - low) * scale + half, black, top)
    for i in range(size):
        counts[index[i]] += 1
    last = bins - 1
    while counts[last] == 0:
        last -= 1
    step = (size - counts[last]) // (grades - 1)
    if step == 0:
        copy(source, result)
        return
    # Truncated, the double quotient of whole numbers below 2^53 is the whole quotient.
    table, share = np.empty(bins, source.dtype), white / (grades - 1.0)
    below = np.int64(step // 2 if bins == grades else 0)
    for v in range(bins):
        grade = below / np.float64(step)
        if bins == grades:
            grade = np.floor(grade)  # what the grades of more bins round to
        table[v] = low + min(grade, grades - 1.0) * share
        below += counts[v]
    for i in range(size):
        result[i] = table[index[i]]


@kernel
def _sum(source):  # type: ignore[no-untyped-def]
    """In double precision, four sums at a time: adding to one waits for the addition before."""
    a = b = c = d = 0.0
    whole = source.size - source.size % 4
    for i in range(0, whole, 4):
        a += source[i]
        b += source[i + 1]
        c += source[i + 2]
        d += source[i + 3]
    for i in range(whole, source.size):
        a += source[i]
    return (a + b) + (c + d)


@kernel
def _mean_grey(source, levels, weights, whole):  # type: ignore[no-untyped-def]
    """Mean level of the grey image, rounded to a whole one; counted from the low end."""
    channels, size = source.shape
    low, total = np.float64(levels[0]), 0.0
    if whole and channels == 3 and len(weights) == 0:
        # The weights add up to 65536: whatever the low end is, it is taken off afterwards.
        levels_total = np.int64(0)
        for i in range(size):
            weighted = 19595 * np.int64(source[0, i]) + 38470 * np.int64(source[1, i])
            levels_total += (weighted + 7471 * np.int64(source[2, i]) + 32768) >> 16
        total = levels_total / size - low
    elif len(weights) > 0 or channels == 3:
        for c in range(channels):
            weight = weights[c] if len(weights) > 0 else _luma_weight(c)
            total += weight * (_sum(source[c]) - size * low)
        total /= size
    else:
        for c in range(channels):
            total += _sum(source[c]) - size * low
        total /= size * channels
    return np.floor(total + 0.5) if whole else total


@part
def _luma_weight(channel):  # type: ignore[no-untyped-def]
    return (19595 if channel == 0 else 38470 if channel == 1 else 7471) / 65536


@kernel
def _grey(source, grey, levels, weights, whole):  # type: ignore[no-untyped-def]
    """The grey image, counted from black; rounded to whole levels."""
    channels, size = source.shape
    low, half = levels[0], _as(levels, 0.5)
    if channels == 3 and len(weights) == 0:
        red, green = _as(levels, 19595 / 65536), _as(levels, 38470 / 65536)
        blue = _as(levels, 7471 / 65536)
        for i in range(size):
            level = red * (source[0, i] - low) + green * (source[1, i] - low)
            level += blue * (source[2, i] - low)
            grey[i] = np.floor(level + half) if whole else level
        return
    grey[:] = levels[5]
    for c in range(channels):
        weight = _as(levels, weights[c] if len(weights) > 0 else 1.0)
        for i in range(size):
            grey[i] += weight * (source[c, i] - low)
    divisor = _as(levels, 1 if len(weights) > 0 else channels)
    for i in range(size):
        level = grey[i] / divisor
        grey[i] = np.floor(level + half) if whole else level


@kernel
def _color(source, result, factor, levels, weights, whole):  # type: ignore[no-untyped-def]
    low, black, white = levels[0], levels[5], levels[1] - levels[0]
    if len(source) == 1:
        copy(source[0], result[0])
        return
    grey = np.empty(source.shape[1], levels.dtype)
    _grey(source, grey, levels, weights, whole)
    for c in range(len(source)):
        values, out = source[c], result[c]
        for i in range(source.shape[1]):
            out[i] = low + _blend(grey[i], values[i] - low, factor, black, white, whole)


@kernel
def _sharpness(source, result, width, factor, levels, whole):  # type: ignore[no-untyped-def]
    # Sums of whole levels stay below 2^24, exact in single precision.
    low, black, white = levels[0], levels[5], levels[1] - levels[0]
    a, b, c, out = source, source[width:], source[2 * width :], result[width + 1 :]
    five, thirteenth = np.float32(5), np.float32(1 / 13)
    for i in range(source.size - 2 * width - 2):
        total = np.float32(a[i]) + np.float32(a[i + 1]) + np.float32(a[i + 2])
        total += np.float32(c[i]) + np.float32(c[i + 1]) + np.float32(c[i + 2])
        total += np.float32(b[i]) + five * np.float32(b[i + 1]) + np.float32(b[i + 2])
        smooth = total * thirteenth
        smooth = np.floor(smooth + np.float32(0.5)) if whole else smooth
        level = _blend(smooth - low, b[i + 1] - low, factor, black, white, whole)
        out[i] = low + level
    copy_border(source, result, width, 1)


@kernel
def _blur(source, result, width, whole):  # type: ignore[no-untyped-def]
    a, b, c, d = source, source[width:], source[2 * width :], source[3 * width :]
    e, out = source[4 * width :], result[2 * width + 2 :]
    half, sixteenth = np.float32(0.5), np.float32(1 / 16)
    for i in range(source.size - 4 * width - 4):
        total = np.float32(a[i]) + np.float32(a[i + 1]) + np.float32(a[i + 2])
        total += np.float32(a[i + 3]) + np.float32(a[i + 4]) + np.float32(e[i])
        total += np.float32(e[i + 1]) + np.float32(e[i + 2]) + np.float32(e[i + 3])
        total += np.float32(e[i + 4]) + np.float32(b[i]) + np.float32(c[i])
        total += np.float32(d[i]) + np.float32(b[i + 4]) + np.float32(c[i + 4])
        mean = (total + np.float32(d[i + 4])) * sixteenth
        out[i] = np.floor(mean + half) if whole else mean
    copy_border(source, result, width, 2)


def run_levels(  # type: ignore[no-untyped-def]
    kind, source, result, width, magnitude, weights, levels, whole, table, counts
):
    """An operation that moves no pixels on the colours (C, H W) of an image."""
    factor = _as(levels, magnitude)
    mean = levels[5]
    if kind == Kind.CONTRAST:
        mean = _as(levels, _mean_grey(source, levels, weights, whole))
    if kind == Kind.COLOR:
        _color(source, result, factor, levels, weights, whole)
        return
    for c in range(len(source)):
        if kind == Kind.SHARPNESS:
            _sharpness(source[c], result[c], width, factor, levels, whole)
        elif kind == Kind.BLUR:
            _blur(source[c], result[c], width, whole)
        elif kind == Kind.AUTO_CONTRAST:
            _auto_contrast(source[c], result[c], levels, whole)
        elif kind == Kind.EQUALIZE:
            _equalize(source[c], result[c], levels, whole)
        elif kind == Kind.SOLARIZE:
            _solarize(source[c], result[c], factor, levels, whole)
        elif kind == Kind.POSTERIZE:
            _posterize(source[c], result[c], magnitude, levels, whole)
        elif kind == Kind.INVERT:
            _invert(source[c], result[c], levels)
        else:
            _toward(source[c], result[c], mean, factor, levels, whole)
