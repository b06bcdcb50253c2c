"""Batched float kernels, ours and kornia's side by side: time, and distance from Pillow.

    python examples/benchmarks/kornia_kernels.py                 # CPU, one thread
    python examples/benchmarks/kornia_kernels.py --device cuda

Both get the same float32 images, whole levels k / 255, and a magnitude for each image. Times are
medians of runs in which the two take turns, on the CPU of processor time; "off" is the largest
distance, in grey levels, from what Pillow makes of the uint8 images. kornia's kernel is the one
that means the same as ours, with the arguments that come closest.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import kornia
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment import SearchSpace
from ola_augment.actions import Actions
from ola_augment.kernels.affine import affine_bilinear, affine_nearest
from ola_augment.kernels.levels import run_on_levels
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions
from ola_augment.operations.program import program

sys.path.insert(0, str(Path(__file__).parent))
from photographs import crops
from timing import medians, synchronised

SIZES = [(256, 32), (32, 224)]
SPACE = SearchSpace.wide_long()
enhance, geometry = kornia.enhance, kornia.geometry

#: kornia's kernel for each of ours: images in [0, 1], magnitudes (n,).
KORNIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": lambda x, m: enhance.normalize_min_max(x),
    "equalize": lambda x, m: enhance.equalize(x + 1e-9),  # it truncates levels
    "solarize": lambda x, m: enhance.solarize(x, (m - 0.5) / 255),
    "color": lambda x, m: enhance.adjust_saturation_with_gray_subtraction(x, m),
    "posterize": lambda x, m: enhance.posterize(x + 1e-6, m.int()),
    "contrast": lambda x, m: enhance.adjust_contrast_with_mean_subtraction(x, m),
    "brightness": lambda x, m: enhance.adjust_brightness_accumulative(x, m),
    "sharpness": lambda x, m: enhance.sharpness(x, m),
    "invert": lambda x, m: enhance.invert(x),
    "flip_lr": lambda x, m: geometry.hflip(x),
    "flip_ud": lambda x, m: geometry.vflip(x),
}


def draw(op: int, count: int) -> Actions:
    """One operation for all images, at bins all over its range; bits and levels inside theirs."""
    shape = (count, 1)
    return Actions(
        num_ops=torch.ones(count, dtype=torch.int64),
        ops=torch.full(shape, op),
        keep=torch.ones(shape, dtype=torch.bool),
        magnitude_bins=5 + torch.arange(count)[:, None] % 20,
        signs=torch.ones(shape, dtype=torch.int8),
        centers=torch.full((*shape, 2), 0.5),
        log_prob=torch.zeros(count),
    )


def pairs(images: Tensor, device: str) -> dict[str, tuple[Callable[[], Tensor], ...]]:
    """(ours, kornia's, Pillow's result) for every operation that both have."""
    count, _, height, width = images.shape
    floats = (images / 255).to(device)
    table = program(SPACE, height, width)
    made = {}
    for op, operation in enumerate(SPACE.operations):
        actions = draw(op, count)
        drawn = table.look_up(actions)
        parameters = torch.from_numpy(drawn.parameters[:, 0]).to(device)
        fixed = torch.from_numpy(drawn.fixed[:, 0]).to(device)
        magnitudes = parameters[:, 0].float()
        row = TABLE[operation.name]
        for mode in InterpolationMode.NEAREST, InterpolationMode.BILINEAR:
            exact = apply_actions(images, SPACE, actions, interpolation=mode)
            name, bilinear = operation.name, mode is InterpolationMode.BILINEAR
            if row.geometric:
                fill = floats.new_zeros(3, 1, 1)
                ours = (
                    (lambda p=parameters, f=fill: affine_bilinear(floats, p, f))
                    if bilinear
                    else (lambda p=fixed, f=fill: affine_nearest(floats, p, f))
                )
                if (dimension := row.exact.mirrored) is not None:
                    ours = lambda d=dimension: floats.flip(d)  # noqa: E731
                theirs = KORNIA.get(name)
                if theirs is None:
                    matrices = _kornia_matrices(drawn.parameters[:, 0]).to(device)
                    size = (height, width)
                    theirs = lambda x, m, p=matrices, s=size, b=mode.value: (  # noqa: E731
                        geometry.warp_affine(x, p, s, mode=b, align_corners=True)
                    )
                name += f", {mode.value}"
            elif row.batched is not None and name in KORNIA and not bilinear:
                ours = lambda r=row, m=magnitudes: (  # noqa: E731
                    run_on_levels(r.batched, floats, m, r.leaves_range)
                )
                theirs = KORNIA[name]
            else:
                continue
            made[name] = (ours, lambda t=theirs, m=magnitudes: t(floats, m), lambda e=exact: e)
    return made


def _kornia_matrices(inverse: np.ndarray) -> Tensor:
    """Ours (n, 6) from the result to the image, kornia's (n, 2, 3) the other way."""
    last = np.broadcast_to([[[0.0, 0.0, 1.0]]], (len(inverse), 1, 3))
    forward = np.linalg.inv(np.concatenate([inverse.reshape(-1, 2, 3), last], 1))
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return torch.from_numpy((np.linalg.inv(half) @ forward @ half)[:, :2]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = f"{options.threads} thread" if options.device == "cpu" else torch.cuda.get_device_name()
    for count, side in SIZES:
        print(f"\n{count} x {side}x{side}, float32, {where}\n")
        print("| operation | ours, ms | kornia, ms | kornia / ours | ours off | kornia off |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, (ours, theirs, exact) in pairs(crops(count, side), options.device).items():
            timed = {"ours": ours, "theirs": theirs}
            clock = time.process_time
            if options.device == "cuda":
                timed = {side: synchronised(function) for side, function in timed.items()}
                clock = time.perf_counter
            times = medians(timed, options.repeats, clock)
            mine, other = (1e3 * seconds for seconds in times.values())
            off = [float((f().cpu() * 255 - exact()).abs().max()) for f in (ours, theirs)]
            ratio = other / mine
            print(
                f"| {name} | {mine:.2f} | {other:.2f} | {ratio:.2f} | {off[0]:.2f} | {off[1]:.2f} |"
            )


if __name__ == "__main__":
    main()
