"""Kernels that move pixels as they are, of any type: copies, other layouts, cutouts."""

from __future__ import annotations

import numpy as np

from ola_augment.kernels.loops.jit import kernel


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
