"""Kernels that move pixels as they are, of any type: the nearest one, flips, cutouts, copies."""

from __future__ import annotations

import numpy as np

from ola_augment.kernels.loops.jit import kernel, part


@kernel
def copy(source, result):  # type: ignore[no-untyped-def]
    """Flat arrays."""
    for i in range(source.size):
        result[i] = source[i]


@kernel
def to_planes(source, result):  # type: ignore[no-untyped-def]
    """Flat pixels, channels side by side and padding after them, to planes (C, H W)."""
    channels, pixels = result.shape
    step = source.size // pixels
    if channels == 3 and step <= 4:  # loops that are compiled to shuffles, six times as fast
        red, green, blue = result[0], result[1], result[2]
        if step == 3:
            for i in range(pixels):
                red[i], green[i], blue[i] = source[3 * i], source[3 * i + 1], source[3 * i + 2]
        else:
            for i in range(pixels):
                red[i], green[i], blue[i] = source[4 * i], source[4 * i + 1], source[4 * i + 2]
        return
    for c in range(channels):
        for i in range(pixels):
            result[c, i] = source[i * step + c]


@kernel
def to_pixels(source, result):  # type: ignore[no-untyped-def]
    """Undo :func:`to_planes`; padding becomes 255."""
    channels, pixels = source.shape
    step = result.size // pixels
    if channels == 3 and step <= 4:
        red, green, blue = source[0], source[1], source[2]
        if step == 3:
            for i in range(pixels):
                result[3 * i], result[3 * i + 1], result[3 * i + 2] = red[i], green[i], blue[i]
        else:
            for i in range(pixels):
                result[4 * i], result[4 * i + 1], result[4 * i + 2] = red[i], green[i], blue[i]
                result[4 * i + 3] = 255
        return
    for c in range(step):
        for i in range(pixels):
            result[i * step + c] = source[c, i] if c < channels else 255


@kernel
def copy_border(source, result, width, border):  # type: ignore[no-untyped-def]
    """What filters leave as it is, of a flat plane."""
    height = source.size // width
    for y in range(height):
        edge = border if border <= y < height - border else width
        for x in range(y * width, y * width + min(edge, width)):
            result[x] = source[x]
        for x in range((y + 1) * width - min(edge, width), (y + 1) * width):
            result[x] = source[x]


@kernel
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


@kernel
def span(first, last, start, step, size):  # type: ignore[no-untyped-def]
    """All x in first .. last - 1 with 0 <= start + step x < size, and up to three more a side."""
    if abs(step) > 1e-9:
        a, b = (0.0 - start) / step, (size - start) / step
        low = min(max(min(a, b), 0.0), float(last))
        high = min(max(max(a, b), -1.0), float(last))
        return max(first, int(low) - 2), min(last, int(high) + 3)
    return (first, last) if 0.0 <= start < size else (last, last)


@kernel
def _fill(result, first, last, value):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        result[i] = value


@kernel
def _shift_rows(source, result, f, fill):  # type: ignore[no-untyped-def]
    """The case that rows stay rows, shifted or reversed: flips, translations and shear_x."""
    channels, height, width = source.shape
    flat, out = source.reshape(-1), result.reshape(-1)
    forward = f[0] > 0
    for c in range(channels):
        for y in range(height):
            start, row = (f[1] * y + f[2]) >> 16, (f[4] * y + f[5]) >> 16
            # Columns first .. last - 1 come from start + x or start - x, the others from outside.
            first, last = (-start, width - start) if forward else (start - width + 1, start + 1)
            first, last = max(first, 0), min(last, width)
            begin, origin = (c * height + y) * width, (c * height + row) * width + start
            if row < 0 or row >= height or first >= last:
                first = last = width
            elif forward:
                _copy_over(flat[origin + first :], out[begin + first :], last - first)
            else:
                _reverse_over(flat[: origin - first + 1], out[begin + first :], last - first)
            _fill(out, begin, begin + first, fill[c])
            _fill(out, begin + last, begin + width, fill[c])


@kernel
def _copy_over(source, result, count):  # type: ignore[no-untyped-def]
    """The first ``count``, and some of what follows, which is written later: in full vectors."""
    count = min((count + 127) // 128 * 128, source.size, result.size)
    for i in range(count):
        result[i] = source[i]


@kernel
def _reverse_over(source, result, count):  # type: ignore[no-untyped-def]
    """As ``_copy_over``, from the last on."""
    count = min((count + 127) // 128 * 128, source.size, result.size)
    last = np.uint64(source.size - 1)
    for i in range(np.uint64(count)):
        result[i] = source[last - i]


@part
def _is_inside(column, row, height, width):  # type: ignore[no-untyped-def]
    return (column >= 0) & (column < width) & (row >= 0) & (row < height)


@kernel
def _take(source, result, shape, index, count, start):  # type: ignore[no-untyped-def]
    """A row of pixels, from ``start`` on, from an index each; all at once where there are three."""
    channels, height, width = shape
    size = height * width
    if channels == 3:
        one, two, three = source, source[size:], source[2 * size :]
        a, b, c = result[start:], result[size + start :], result[2 * size + start :]
        for i in range(count):
            j = np.uint64(index[i])
            a[i], b[i], c[i] = one[j], two[j], three[j]
        return
    for c in range(channels):
        plane, out = source[c * size :], result[c * size + start :]
        for i in range(count):
            out[i] = plane[np.uint64(index[i])]


@kernel
def _take_fixed(source, result, f, fill):  # type: ignore[no-untyped-def]
    channels, height, width = source.shape
    flat, out = source.reshape(-1), result.reshape(-1)
    index = np.empty(width, np.uint32)
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
        # Coordinates that lie inside fit into 32 bits, whatever is lost on the way there.
        column, row, count = u + f[0] * first, v + f[3] * first, last - first
        for i in range(count):
            x = np.uint32(column + i * f[0]) >> np.uint32(16)
            index[i] = (np.uint32(row + i * f[3]) >> np.uint32(16)) * np.uint32(width) + x
        _take(flat, out, source.shape, index, count, y * width + first)
        for c in range(channels):
            begin = (c * height + y) * width
            _fill(out, begin, begin + first, fill[c])
            _fill(out, begin + last, begin + width, fill[c])


@kernel
def take_stepped(source, result, m, fill):  # type: ignore[no-untyped-def]
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


@kernel
def affine_nearest(source, result, f, fill):  # type: ignore[no-untyped-def]
    """``ImagingTransformAffine`` in fixed point."""
    if f[3] == 0 and abs(f[0]) == 65536:
        _shift_rows(source, result, f, fill)
    else:
        _take_fixed(source, result, f, fill)
