"""Kinds of exact kernels."""

from enum import IntEnum

#: Floats are equalized in as many bins as leave each four pixels, by the step of 256 levels: in
#: 1,024 of them from 4,096 pixels on.
FEW_BINS, BINS, PIXELS = 256, 1024, 4096


class Kind(IntEnum):
    """The exact kernels; several operations share one and differ in their parameters only."""

    IDENTITY = 0
    STEPPED = 1  # an AFFINE one whose coordinates Pillow adds up in floating point
    AUTO_CONTRAST = 2
    EQUALIZE = 3
    CONTRAST = 4
    COLOR = 5
    SHARPNESS = 6
    BLUR = 7
    AFFINE = 8
    CUTOUT = 9
    BATCHED = 10  # no compiled kernel: the batched one, or a user's own
    SOLARIZE = 11
    POSTERIZE = 12
    BRIGHTNESS = 13
    INVERT = 14
    SHIFT = 15  # an AFFINE one that leads from pixel to pixel: nothing to interpolate


#: The kinds of what moves pixels by a matrix.
GEOMETRIC = (Kind.AFFINE, Kind.SHIFT, Kind.STEPPED)
