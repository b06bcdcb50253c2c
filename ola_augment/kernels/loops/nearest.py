"""Affine maps that take the nearest pixel, as ``ImagingTransformAffine`` has them."""

from __future__ import annotations

import numpy as np

from ola_augment.kernels.loops.jit import kernel, part


@kernel
def span(first, last, start, step, size):  # type: ignore[no-untyped-def]
    """All x in first .. last - 1 with 0 <= start + step x < size, and up to three more a side."""
    if abs(step) > 1e-9:
        a, b = (0.0 - start) / step, (size - start) / step
        low = min(max(min(a, b), 0.0), float(last))
        high = min(max(max(a, b), -1.0), float(last))
        return max(first, int(low) - 2), min(last, int(high) + 3)
    return (first, last) if 0.0 <= start < size else (last, last)


@part
def _is_inside(column, row, height, width):  # type: ignore[no-untyped-def]
    return (column >= 0) & (column < width) & (row >= 0) & (row < height)


@kernel
def _fill(result, first, last, value):  # type: ignore[no-untyped-def]
    part = result[first:last]
    for i in range(part.size):
        part[i] = value


@part
def keeps_rows(f):  # type: ignore[no-untyped-def]
    """Whether rows stay rows, shifted or reversed: flips, translations and shear_x."""
    return (f[3] == 0) & (abs(f[0]) == 65536)


@kernel
def shift_rows(source, result, f, fill):  # type: ignore[no-untyped-def]
    """A map in fixed point that :func:`keeps_rows`."""
    channels, height, width = source.shape
    flat, out = source.reshape(-1), result.reshape(-1)
    # Long rows are read in their order in memory: what comes next is fetched ahead of time.
    long = width >= 128
    forward, upward = f[0] > 0, f[4] < 0 and long
    line = np.empty(width, source.dtype)
    more = 0 if upward else 127  # what follows in memory is written later, with the next rows
    for c in range(channels):
        for k in range(height):
            y = height - 1 - k if upward else k
            start, row = (f[1] * y + f[2]) >> 16, (f[4] * y + f[5]) >> 16
            # Columns first .. last - 1 come from start + x or start - x, the others from outside.
            first, last = (-start, width - start) if forward else (start - width + 1, start + 1)
            first, last = max(first, 0), min(last, width)
            begin, origin = (c * height + y) * width, (c * height + row) * width + start
            if row < 0 or row >= height or first >= last:
                first = last = width
            elif forward:
                _copy(flat[origin + first :], out[begin + first :], last - first, more)
            elif long:
                _copy(flat[origin - last + 1 :], line, last - first, 127)
                _reverse(line[: last - first], out[begin + first :], last - first, 0)
            else:
                _reverse(flat[: origin - first + 1], out[begin + first :], last - first, more)
            _fill(out, begin, begin + first, fill[c])
            _fill(out, begin + last, begin + width, fill[c])


@kernel
def _copy(source, result, count, more):  # type: ignore[no-untyped-def]
    """The first ``count`` and, in full vectors, up to ``more`` of what follows."""
    count = min((count + more) & ~more, source.size, result.size)
    for i in range(count):
        result[i] = source[i]


@kernel
def _reverse(source, result, count, more):  # type: ignore[no-untyped-def]
    """As ``_copy``, from the last on."""
    count = min((count + more) & ~more, source.size, result.size)
    last = np.uint64(source.size - 1)
    for i in range(np.uint64(count)):
        result[i] = source[last - i]


@kernel
def _places(f, y, height, width, index):  # type: ignore[no-untyped-def]
    """Where the pixels of row y come from: the first and last + 1 that come from inside.

    Written for each of these: its index in the image.
    """
    u, v = f[1] * y + f[2], f[4] * y + f[5]
    first, last = span(0, width, np.float64(u), np.float64(f[0]), np.float64(width << 16))
    first, last = span(first, last, np.float64(v), np.float64(f[3]), np.float64(height << 16))
    while first < last and not _is_inside(
        (u + f[0] * first) >> 16, (v + f[3] * first) >> 16, height, width
    ):
        first += 1
    while first < last and not _is_inside(
        (u + f[0] * (last - 1)) >> 16, (v + f[3] * (last - 1)) >> 16, height, width
    ):
        last -= 1
    if first >= last:
        return width, width
    # Coordinates that lie inside fit into 32 bits, whatever is lost on the way there.
    column, row = u + f[0] * first, v + f[3] * first
    for i in range(last - first):
        x = np.uint32(column + i * f[0]) >> np.uint32(16)
        index[i] = (np.uint32(row + i * f[3]) >> np.uint32(16)) * np.uint32(width) + x
    return first, last


@kernel
def _take(source, result, index):  # type: ignore[no-untyped-def]
    for i in range(result.size):
        result[i] = source[np.uint64(index[i])]


def take_levels(source, result, f, fill):  # type: ignore[no-untyped-def]
    """Of any type, by a map in fixed point."""
    channels, height, width = source.shape
    index = np.empty(width, np.uint32)
    for y in range(height):
        first, last = _places(f, y, height, width, index)
        for c in range(channels):
            out = result[c, y]
            _take(source[c].reshape(-1), out[first:last], index)
            _fill(out, 0, first, fill[c])
            _fill(out, last, width, fill[c])


def _packer(word, bits):  # type: ignore[no-untyped-def]
    @kernel
    def pack(source, lines, step):  # type: ignore[no-untyped-def]
        """Up to four channels in one integer for each pixel, rows ``step`` apart."""
        channels, height, width = source.shape
        for y in range(height):
            line = lines[y * step :]
            if channels == 3:
                a, b, c = source[0, y], source[1, y], source[2, y]
                for x in range(width):
                    line[x] = word(a[x]) | word(b[x]) << word(bits) | word(c[x]) << word(2 * bits)
            else:
                line[:width] = 0
                for c in range(channels):
                    d = source[c, y]
                    for x in range(width):
                        line[x] |= word(d[x]) << word(bits * c)

    return pack


def _taker(word, bits, pack):  # type: ignore[no-untyped-def]
    def take(source, result, f, fill):  # type: ignore[no-untyped-def]
        """By a map in fixed point: up to four channels at once, in half the time."""
        channels, height, width = source.shape
        packed, pixels = np.empty(height * width, word), np.empty(width, word)
        index = np.empty(width, np.uint32)
        for group in range(0, channels, 4):
            part, out = source[group : group + 4], result[group : group + 4]
            pack(part, packed, width)
            filling = word(0)
            for c in range(len(part)):
                filling |= word(fill[group + c]) << word(bits * c)
            for y in range(height):
                first, last = _places(f, y, height, width, index)
                _fill(pixels, 0, first, filling)
                _take(packed, pixels[first:last], index)
                _fill(pixels, last, width, filling)
                for c in range(len(part)):
                    shift, row = word(bits * c), out[c, y]
                    for x in range(width):
                        row[x] = pixels[x] >> shift

    return take


pack_bytes = _packer(np.uint32, 8)
take_bytes = _taker(np.uint32, 8, pack_bytes)
take_words = _taker(np.uint64, 16, _packer(np.uint64, 16))


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
