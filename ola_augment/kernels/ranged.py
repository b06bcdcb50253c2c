"""Compiled kernels for uint16 and float32 on the CPU, whatever the range of their levels.

One loop over a batch as in ``exact.py``, whose kernels move the pixels. Whole levels are counted
from the low end of the range, computed in double precision and truncated where Pillow truncates;
floating ones are computed in single precision and rounded nowhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ola_augment.kernels.exact import _affine_nearest, _copy, _copy_border, _cutout
from ola_augment.kernels.kind import Kind

_SIGNATURE = (
    "void({0}[:,:,:,::1], {0}[:,:,:,::1], int64[:,::1], boolean[:,::1], int64[:,::1], "
    "int8[:,::1], float32[:,:,::1], int64[::1], float64[:,:,:,::1], int64[:,:,:,::1], "
    "boolean[:,:,::1], {1}[::1], {0}[::1], boolean, int64, float64[::1], boolean)"
)
#: The signatures of ``run_batch``: images, and the precision that they are computed in.
SIGNATURES = [_SIGNATURE.format(*types) for types in (("uint16", "float64"), ("float32",) * 2)]

#: Floats are equalized in so many levels: as many as leave a bin four pixels.
_FEW_BINS, _BINS, _PIXELS = 256, 1024, 4096


@njit(cache=True, nogil=True, inline="always")
def _limited(value, low, high):  # type: ignore[no-untyped-def]
    return min(max(value, low), high)


@njit(cache=True, nogil=True, inline="always")
def _as(levels, number):  # type: ignore[no-untyped-def]
    """A number in the precision of the levels, which one of Python's would widen."""
    return levels.dtype.type(number)


@njit(cache=True, nogil=True, inline="always")
def _blend(degenerate, level, factor, black, white, whole):  # type: ignore[no-untyped-def]
    """Degenerate + factor (level - degenerate), all counted from black, within the range."""
    level = _limited(degenerate + factor * (level - degenerate), black, white)
    return np.floor(level) if whole else level


@njit(cache=True, nogil=True)
def _solarize(source, result, threshold, levels, whole):  # type: ignore[no-untyped-def]
    low, high, least, most = levels[0], levels[1], levels[2], levels[3]
    one = levels[4]
    count = high - low + (one if whole else levels[5])
    bound = low + threshold * count / _as(levels, 256)
    for i in range(source.size):
        v = source[i] * one
        result[i] = _limited(low + high - v, least, most) if v >= bound else v


@njit(cache=True, nogil=True)
def _posterize(source, result, bits, levels, whole):  # type: ignore[no-untyped-def]
    low, high, least, most = levels[0], levels[1], levels[2], levels[3]
    kept = 2 ** int(bits)
    if whole:
        step = (high - low + levels[4]) / _as(levels, kept)
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


@njit(cache=True, nogil=True)
def _invert(source, result, levels):  # type: ignore[no-untyped-def]
    ends, least, most = levels[0] + levels[1], levels[2], levels[3]
    for i in range(source.size):
        result[i] = _limited(ends - source[i], least, most)


@njit(cache=True, nogil=True)
def _toward(source, result, degenerate, factor, levels, whole):  # type: ignore[no-untyped-def]
    """Blend with one level."""
    low, black, white = levels[0], levels[5], levels[1] - levels[0]
    for i in range(source.size):
        result[i] = low + _blend(degenerate, source[i] - low, factor, black, white, whole)


@njit(cache=True, nogil=True)
def _auto_contrast(source, result, levels, whole):  # type: ignore[no-untyped-def]
    lowest, highest = source[0], source[0]
    for i in range(source.size):
        lowest, highest = min(lowest, source[i]), max(highest, source[i])
    if highest == lowest:
        _copy(source, result)
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


@njit(cache=True, nogil=True)
def _equalize(source, result, levels, whole):  # type: ignore[no-untyped-def]
    """``ImageOps.equalize`` with as many levels as there are, or bins of floats."""
    low, white, size = levels[0], levels[1] - levels[0], source.size
    bins = int(white) + 1 if whole else _BINS if size >= _PIXELS else _FEW_BINS
    if size < bins:  # no step
        _copy(source, result)
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
    step = (size - counts[last]) // (bins - 1)
    if step == 0:
        _copy(source, result)
        return
    # Truncated, the double quotient of whole numbers below 2^53 is the whole quotient.
    table, below, share = np.empty(bins, source.dtype), np.int64(step // 2), 1.0 / scale
    for v in range(bins):
        table[v] = low + min(np.floor(below / np.float64(step)), bins - 1.0) * share
        below += counts[v]
    for i in range(size):
        result[i] = table[index[i]]


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True, inline="always")
def _luma_weight(channel):  # type: ignore[no-untyped-def]
    return (19595 if channel == 0 else 38470 if channel == 1 else 7471) / 65536


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def _color(source, result, factor, levels, weights, whole):  # type: ignore[no-untyped-def]
    low, black, white = levels[0], levels[5], levels[1] - levels[0]
    if len(source) == 1:
        _copy(source[0], result[0])
        return
    grey = np.empty(source.shape[1], levels.dtype)
    _grey(source, grey, levels, weights, whole)
    for c in range(len(source)):
        values, out = source[c], result[c]
        for i in range(source.shape[1]):
            out[i] = low + _blend(grey[i], values[i] - low, factor, black, white, whole)


@njit(cache=True, nogil=True)
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
    _copy_border(source, result, width, 1)


@njit(cache=True, nogil=True)
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
    _copy_border(source, result, width, 2)


@njit(cache=True, nogil=True)
def _affine_bilinear(source, result, m, fill, levels):  # type: ignore[no-untyped-def]
    """``ImagingGenericTransform`` on modes "I" and "F": neighbours are clamped at the edge."""
    channels, height, width = source.shape
    one, bias, size = levels[4], levels[6], height * width
    flat, out = source.ravel(), result.ravel()
    near, far = np.empty((2, width), np.int32), np.empty((2, width), np.int32)
    shift = np.empty((2, width), levels.dtype)
    inside = np.empty(width, np.bool_)
    for y in range(height):
        for x in range(width):
            u = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2]
            v = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5]
            inside[x] = (u >= 0.0) & (u < width) & (v >= 0.0) & (v < height)
            u, v = _limited(u, 0.0, float(width)), _limited(v, 0.0, float(height))
            left, top = np.floor(u - 0.5), np.floor(v - 0.5)
            shift[0, x], shift[1, x] = (u - 0.5) - left, (v - 0.5) - top
            x0, x1 = max(int(left), 0), min(int(left) + 1, width - 1)
            y0, y1 = max(int(top), 0), min(int(top) + 1, height - 1)
            near[0, x], near[1, x] = y0 * width + x0, y0 * width + x1
            far[0, x], far[1, x] = y1 * width + x0, y1 * width + x1
        for c in range(channels):
            plane, line = flat[c * size : (c + 1) * size], out[c * size + y * width :]
            for x in range(width):
                a = plane[np.uint64(near[0, x])] * one
                b = plane[np.uint64(far[0, x])] * one
                d, e = shift[0, x], shift[1, x]
                upper = (a - bias) + (plane[np.uint64(near[1, x])] - a) * d
                lower = (b - bias) + (plane[np.uint64(far[1, x])] - b) * d
                value = upper + (lower - upper) * e
                # Levels below 0, which are stored with a bias, are truncated toward 0 as well.
                value = bias + (np.trunc(value) if bias > 0 else value)
                line[x] = value if inside[x] else one * fill[c]


@njit(cache=True, nogil=True)
def _run_color(  # type: ignore[no-untyped-def]
    kind, source, result, width, magnitude, levels, weights, whole
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


@njit(cache=True, nogil=True)
def run_batch(  # type: ignore[no-untyped-def]
    images, result, ops, keep, bins, signs, centers,
    kinds, parameters, fixed, neutral, levels, fill, bilinear, colors, weights, whole,
):  # fmt: skip
    """Apply the kept slots of every image from left to right.

    ``Kind.IDENTITY`` and ``Kind.BATCHED`` leave the image as it is.

    Args:
        images: (B, C, H, W) uint16 or float32, contiguous, as all of these.
        result: (B, C, H, W) of the same type; written to.
        ops: (B, S) int64, as the next four a field of ``Actions``.
        keep: (B, S) bool.
        bins: (B, S) int64.
        signs: (B, S) int8.
        centers: (B, S, 2) float32.
        kinds: (A,) int64, none of them ``Kind.TABLE``, as the next three a field of ``Program``.
        parameters: (A, bins, 2, 6) float64.
        fixed: (A, bins, 2, 6) int64.
        neutral: (A, bins, 2) bool.
        levels: (7,) float64 for uint16, otherwise float32: the range, the least and the most that
            may be stored, 1, 0, and what was added to levels to store those below 0.
        fill: (C,) of the type of the images.
        bilinear: interpolate bilinearly instead of taking the nearest pixel.
        colors: how many channels colours change; an alpha channel comes after them.
        weights: (colors,) of the grey image; empty: Pillow's for three, otherwise the mean.
        whole: whether levels are integers.
    """
    scratch = np.empty(result.shape[1:], result.dtype)
    slots = np.empty(ops.shape[1], np.int64)
    channels, _, width = images.shape[1:]
    black = np.empty(1, result.dtype)
    black[0] = levels[0]
    for i in range(len(images)):
        active = 0
        for s in range(ops.shape[1]):
            kind = kinds[ops[i, s]]
            if not keep[i, s] or kind in (Kind.IDENTITY, Kind.BATCHED):
                continue
            if not neutral[ops[i, s], bins[i, s], int(signs[i, s] < 0)]:
                slots[active] = s
                active += 1
        if active == 0:
            _copy(images[i].ravel(), result[i].ravel())
            continue
        source = images[i]
        for j in range(active):
            s = slots[j]
            op, k, sign = ops[i, s], bins[i, s], int(signs[i, s] < 0)
            target = scratch if (active - j) % 2 == 0 else result[i]
            kind, row = kinds[op], parameters[op, k, sign]
            if kind == Kind.AFFINE and bilinear:
                _affine_bilinear(source, target, row, fill, levels)
            elif kind == Kind.AFFINE:
                _affine_nearest(
                    source.ravel(), target.ravel(), source.shape, row, fixed[op, k, sign], fill
                )
            elif kind == Kind.CUTOUT:
                _cutout(source, target, row[0], centers[i, s], black[0])
            else:
                flat, flat_target = source.reshape(channels, -1), target.reshape(channels, -1)
                for c in range(colors, channels):
                    _copy(flat[c], flat_target[c])
                _run_color(
                    kind, flat[:colors], flat_target[:colors], width, row[0], levels, weights, whole
                )
            source = target
