"""Floats and 16 bits, one thread.

    python examples/benchmarks/depths.py

For every operation that they have, the time of ours over that of torchvision's functions (image by
image, each its own magnitude, as nobody there draws for a batch) and of kornia's (a magnitude for
each image of a batch), on float32 of 32, 224 and 512 pixels; and uint16 over uint8. CPU time of
this thread, medians of repeats in which both sides take turns. Bold is past its goal; a row fails
past its limit, which is the goal or what was measured beyond it, and room for a busy machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import kornia
import torch
from timing import medians
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from ola_augment import SearchSpace
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions, compile_kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from pillow_reference import one_operation

SIZES = ((256, 32), (32, 224), (8, 512))
SPACE = SearchSpace.wide_long()
#: Columns, and how much of the other side's time ours may take.
GOALS = {"torchvision": 1.0, "kornia": 1.0, "uint8": 2.0}
ROOM = 1.3
#: What was measured beyond a goal. Before any operation all values are read once, to find those of
#: another scale: where the operation is one pass, that is a good part of it.
MISSED = {
    "torchvision": {
        "auto_contrast": 1.1, "posterize": 1.3, "brightness": 1.5, "invert": 2.0, "flip_lr": 3.7,
        "flip_ud": 2.0,
    },
    "kornia": {"brightness": 1.6, "invert": 6.7, "flip_lr": 6.1, "flip_ud": 5.5},
    "uint8": {
        "rotate, bilinear": 2.8, "shear_x": 3.0, "shear_x, bilinear": 2.3, "translate_y": 3.9,
        "color": 2.7, "posterize": 3.2, "solarize": 2.8, "equalize": 2.8, "brightness": 2.2,
        "blur": 2.6, "invert": 2.4, "flip_lr": 2.7, "flip_ud": 2.8,
    },
}  # fmt: skip
#: No quarter turn, which torchvision makes by transposing.
BIN = 13

BILINEAR = {"interpolation": InterpolationMode.BILINEAR}
#: name -> function(image, magnitude)
TORCHVISION: dict[str, Callable[[Tensor, float], Tensor]] = {
    "auto_contrast": lambda x, m: tvf.autocontrast(x),
    "equalize": lambda x, m: tvf.equalize(x),
    "rotate": lambda x, m: tvf.rotate(x, m),
    "rotate, bilinear": lambda x, m: tvf.rotate(x, m, **BILINEAR),
    "solarize": lambda x, m: tvf.solarize(x, m / 256),
    "color": lambda x, m: tvf.adjust_saturation(x, m),
    "posterize": lambda x, m: tvf.posterize(x, int(m)),
    "contrast": lambda x, m: tvf.adjust_contrast(x, m),
    "brightness": lambda x, m: tvf.adjust_brightness(x, m),
    "sharpness": lambda x, m: tvf.adjust_sharpness(x, m),
    "shear_x": lambda x, m: tvf.affine(x, 0, [0, 0], 1, [45 * m, 0]),
    "shear_x, bilinear": lambda x, m: tvf.affine(x, 0, [0, 0], 1, [45 * m, 0], **BILINEAR),
    "shear_y": lambda x, m: tvf.affine(x, 0, [0, 0], 1, [0, 45 * m]),
    "translate_x": lambda x, m: tvf.affine(x, 0, [int(m), 0], 1, [0, 0]),
    "translate_y": lambda x, m: tvf.affine(x, 0, [0, int(m)], 1, [0, 0]),
    "blur": lambda x, m: tvf.gaussian_blur(x, [5, 5]),
    "invert": lambda x, m: tvf.invert(x),
    "flip_lr": lambda x, m: tvf.horizontal_flip(x),
    "flip_ud": lambda x, m: tvf.vertical_flip(x),
}
#: name -> function(images, magnitudes)
KORNIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": lambda x, m: kornia.enhance.normalize_min_max(x),
    "equalize": lambda x, m: kornia.enhance.equalize(x),
    "solarize": lambda x, m: kornia.enhance.solarize(x, m / 256),
    "color": lambda x, m: kornia.enhance.adjust_saturation_with_gray_subtraction(x, m),
    "posterize": lambda x, m: kornia.enhance.posterize(x, m.int()),
    "contrast": lambda x, m: kornia.enhance.adjust_contrast_with_mean_subtraction(x, m),
    "brightness": lambda x, m: kornia.enhance.adjust_brightness_accumulative(x, m),
    "sharpness": lambda x, m: kornia.enhance.sharpness(x, m),
    "blur": lambda x, m: kornia.filters.box_blur(x, (5, 5)),
    "invert": lambda x, m: kornia.enhance.invert(x),
    "flip_lr": lambda x, m: kornia.geometry.hflip(x),
    "flip_ud": lambda x, m: kornia.geometry.vflip(x),
}


def measure_depths(repeats: int) -> list[str]:
    """Print the table; return the rows past their limit."""
    torch.set_num_threads(1)
    names = [
        n for name in TABLE for n in (name, f"{name}, bilinear") if n == name or n in TORCHVISION
    ]
    shares: dict[str, dict[str, list[float]]] = {
        name: {side: [] for side in GOALS} for name in names
    }
    for count, side in SIZES:
        generator = torch.Generator().manual_seed(0)
        floats = torch.rand(count, 3, side, side, generator=generator)
        small = (floats * 255).to(torch.uint8)
        deep = (floats * 65535).to(torch.int32).to(torch.uint16)
        for name in names:
            op = [operation.name for operation in SPACE.operations].index(name.split(",")[0])
            actions = one_operation(count, op, BIN)
            m = float(SPACE.operations[op].magnitude(BIN, 31, side, side))
            how = {"interpolation": "bilinear" if "," in name else "nearest"}

            def ours(images: Tensor, actions=actions, how=how) -> Callable[[], Tensor]:
                return lambda: apply_actions(images, SPACE, actions, **how)

            timed = {"float": ours(floats), "uint8": ours(small), "uint16": ours(deep)}
            if name in TORCHVISION:
                theirs = TORCHVISION[name]
                timed["torchvision"] = lambda f=theirs, x=floats, m=m: [f(image, m) for image in x]
            if name in KORNIA:
                batched, ms = KORNIA[name], torch.full((count,), m)
                timed["kornia"] = lambda f=batched, x=floats, ms=ms: f(x, ms)
            times = medians(timed, repeats, time.thread_time, again=True)
            for other, found in shares[name].items():
                if other in times:
                    found.append(times["uint16" if other == "uint8" else "float"] / times[other])
    return report(shares)


def report(shares: dict[str, dict[str, list[float]]]) -> list[str]:
    """Print a row for each operation; what is past its limit."""
    sizes = " / ".join(f"{count} x {side}x{side}" for count, side in SIZES)
    print(f"\nTime of floats over theirs, of uint16 over uint8's, one thread, {sizes}:\n")
    print("| | over torchvision | over kornia | uint16 over uint8 |\n|---|---:|---:|---:|")
    past = []
    for name, sides in shares.items():
        cells = []
        for other, found in sides.items():
            goal, limit = GOALS[other], ROOM * MISSED[other].get(name, GOALS[other])
            shown = [f"**{share:.2f}**" if share > goal else f"{share:.2f}" for share in found]
            cells.append(" / ".join(shown))
            past += [
                f"{name} at {side}: {share:.2f} of {other}'s time, at most {limit:.2f}"
                for (_, side), share in zip(SIZES, found, strict=bool(found))
                if share > limit
            ]
        print(f"| {name} | {' | '.join(cells)} |")
    return past


if __name__ == "__main__":
    compile_kernels()
    if past := measure_depths(5):
        sys.exit("past a limit:\n" + "\n".join(past))
