"""Beside albumentations and DALI, and beside ourselves.

    python examples/benchmarks/peers.py

Every row is the time of ours over that of the other side, in CPU time of one thread, medians of
repeats in which both take turns; it is left out where the other side is not installed.
albumentations gets arrays (H, W, C) and draws four of WideLong's operations for each, with its
ranges as far as it has them; what it does not have stands with its nearest relative. DALI
(``pip install nvidia-dali-cuda130``) runs its own RandAugment on the CPU, four operations for each
image, over arrays that it has in memory.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import torch
from timing import medians
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from ola_augment import PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.kernels.compiled import KERNELS
from ola_augment.operations import apply_actions

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from pillow_reference import draw, one_operation

SLOTS = 4
#: DALI's own, nearest interpolation: (images, side) -> what ours may cost of its time.
DALI = {(256, 32): 0.08, (32, 224): 0.5}  # goal: 0.04 at 32
#: (form, images, side, interpolation) -> what ours may cost of albumentations' time.
POLICIES = {
    ("batch", 256, 32, "nearest"): 0.04,
    ("batch", 32, 224, "nearest"): 0.3,
    ("batch", 32, 224, "bilinear"): 0.4,
    ("batch", 8, 512, "bilinear"): 0.6,
    ("arrays", 16, 224, "nearest"): 0.8,
    ("arrays", 4, 512, "nearest"): 0.9,
    ("PIL", 16, 224, "nearest"): 1.0,  # goal: 0.8
    ("PIL", 4, 512, "nearest"): 1.2,  # goal: 0.8
}
#: Operations on 8 x 512 over the quicker of torchvision's batch and a loop of albumentations'.
SINGLE = {
    ("posterize", "nearest"): 2.2,  # goal: 1
    ("contrast", "nearest"): 0.3,
    ("flip_lr", "nearest"): 2.2,  # goal: 1
    ("rotate", "bilinear"): 1.0,
    ("shear_x", "bilinear"): 1.0,
}
#: Bilinear flips and translations by whole pixels over nearest ones.
WHOLE_STEPS = 1.1


def has_albumentations() -> bool:
    return importlib.util.find_spec("albumentations") is not None


def albumentations_policy(slots: int, bilinear: bool) -> Callable[[np.ndarray], np.ndarray]:
    """``slots`` operations for each image, drawn with replacement, all of them applied."""
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    how = {"interpolation": cv2.INTER_LINEAR if bilinear else cv2.INTER_NEAREST, "p": 1.0}
    # ColorJitter moves in an order of its own; ranges of one point leave the others out.
    still = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    factors = (0.1, 1.9)
    operations = [
        A.NoOp(),
        A.AutoContrast(p=1.0),
        A.Equalize(by_channels=True, p=1.0),
        A.Rotate(limit=135, border_mode=cv2.BORDER_CONSTANT, **how),
        A.Solarize(threshold_range=(0, 1), p=1.0),
        A.ColorJitter(**{**still, "saturation": factors}, p=1.0),
        A.Posterize(num_bits=(2, 8), p=1.0),
        A.ColorJitter(**{**still, "contrast": factors}, p=1.0),
        A.ColorJitter(**{**still, "brightness": factors}, p=1.0),
        A.Sharpen(alpha=(0, 1), p=1.0),
        A.Affine(shear={"x": (-45, 45), "y": 0}, **how),
        A.Affine(shear={"x": 0, "y": (-45, 45)}, **how),
        A.Affine(translate_percent={"x": (-1, 1), "y": 0}, **how),
        A.Affine(translate_percent={"x": 0, "y": (-1, 1)}, **how),
        A.Blur(blur_limit=(5, 5), p=1.0),
        A.InvertImg(p=1.0),
        A.HorizontalFlip(p=1.0),
        A.VerticalFlip(p=1.0),
        A.CoarseDropout(num_holes_range=(1, 1), p=1.0),
    ]
    policy = A.SomeOf(operations, n=slots, replace=True, p=1.0)
    policy = A.Compose([policy])
    return lambda image: policy(image=image)["image"]


def dali_policy(images: Tensor, slots: int) -> Callable[[], object]:
    """A pipeline over the images, one thread, nothing on a GPU."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    arrays = arrays_of(images)

    @pipeline_def(
        batch_size=len(arrays),
        num_threads=1,
        device_id=None,
        enable_conditionals=True,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline() -> object:
        given = fn.external_source(lambda: arrays, layout="HWC")
        side = images.shape[-1]
        return rand_augment.rand_augment(
            given, n=slots, m=17, shape=[side, side], interp_type=types.INTERP_NN
        )

    built = pipeline()
    built.build()
    return built.run


def crops(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8: smooth, with noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noise = torch.rand(count, 3, side, side, generator=generator) / 16
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8)


def arrays_of(images: Tensor) -> list[np.ndarray]:
    return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images]


def policy_row(form: str, images: Tensor, how: str) -> dict[str, Callable[[], object]]:
    """Both sides of a row of POLICIES."""
    policy = UniformPolicy("wide_long", num_ops=SLOTS, keep_prob=1.0)
    ours = PolicyTransform(policy, interpolation=how)
    arrays = arrays_of(images)
    given = arrays if form == "arrays" else [tvf.to_pil_image(image) for image in images]
    sides = {
        "ours": (lambda: ours.augment(images))
        if form == "batch"
        else (lambda: [ours(picture) for picture in given]),
    }
    if has_albumentations():
        theirs = albumentations_policy(SLOTS, how == "bilinear")
        sides["theirs"] = lambda: [theirs(array) for array in arrays]
    return sides


def operation_row(name: str, images: Tensor, how: str) -> dict[str, Callable[[], object]]:
    """One operation at one magnitude: ours, torchvision's on the batch, OpenCV's image by image."""
    space = SearchSpace.wide_long()
    op = [operation.name for operation in space.operations].index(name)
    magnitude = space.operations[op].magnitude(13, 31, *images.shape[2:])
    actions, arrays = one_operation(len(images), op, 13), arrays_of(images)
    sides = {"ours": lambda: apply_actions(images, space, actions, interpolation=how)}
    in_torchvision = {
        "posterize": lambda: tvf.posterize(images, int(magnitude)),
        "contrast": lambda: tvf.adjust_contrast(images, magnitude),
        "flip_lr": lambda: tvf.horizontal_flip(images),
    }
    if name in in_torchvision:
        sides["theirs"] = in_torchvision[name]
    if has_albumentations():
        import albumentations as A

        degrees = {"limit": (magnitude, magnitude)}
        sheared = {"shear": {"x": (45 * magnitude,) * 2, "y": 0}}
        made = {
            "posterize": lambda: A.Posterize(num_bits=(int(magnitude),) * 2, p=1.0),
            "flip_lr": lambda: A.HorizontalFlip(p=1.0),
            "rotate": lambda: A.Rotate(**degrees, border_mode=0, interpolation=1, p=1.0),
            "shear_x": lambda: A.Affine(**sheared, interpolation=1, p=1.0),
        }
        if name in made:
            theirs = made[name]()
            sides["albumentations"] = lambda: [theirs(image=array)["image"] for array in arrays]
    return sides


def whole_steps_row(images: Tensor) -> dict[str, Callable[[], object]]:
    """Flips and translations by whole pixels, with both interpolations."""
    space = SearchSpace.wide_long()
    names = ("flip_lr", "flip_ud", "translate_x", "translate_y")
    chosen = [i for i, op in enumerate(space.operations) if op.name in names]
    actions = draw(space, len(images), 1)
    actions.ops[:, 0] = torch.tensor(chosen).repeat(len(images))[: len(images)]
    return {
        "ours": lambda: apply_actions(images, space, actions, interpolation="bilinear"),
        "theirs": lambda: apply_actions(images, space, actions),
    }


def measure_peers(repeats: int) -> list[str]:
    """Print the table; return the rows past their limit."""
    torch.set_num_threads(1)
    rows = {}
    if has_albumentations():
        for (form, count, side, how), limit in POLICIES.items():
            name = f"{form}, {count} x {side}, WideLong x {SLOTS}, {how}, / albumentations"
            rows[name] = policy_row(form, crops(count, side), how), limit
    if importlib.util.find_spec("nvidia.dali"):
        for (count, side), limit in DALI.items():
            images = crops(count, side)
            ours = policy_row("batch", images, "nearest")["ours"]
            sides = {"ours": ours, "theirs": dali_policy(images, SLOTS)}
            rows[f"batch, {count} x {side}, {SLOTS} operations, nearest, / DALI"] = sides, limit
    for (operation, how), limit in SINGLE.items():
        sides = operation_row(operation, crops(8, 512), how)
        if len(sides) > 1:
            rows[f"{operation}, 8 x 512, {how}, / the quicker peer"] = sides, limit
    name = "flips and whole translations, 32 x 224, bilinear, / nearest"
    rows[name] = whole_steps_row(crops(32, 224)), WHOLE_STEPS
    print("\n| | ours, ms | ours / theirs | at most |\n|---|---:|---:|---:|")
    missed = []
    for name, (sides, limit) in rows.items():
        times = medians(sides, repeats, time.thread_time, again=True)
        own = times.pop("ours")
        share = own / min(times.values())
        print(f"| {name} | {1e3 * own:.2f} | {share:.2f} | {limit} |", flush=True)
        if share > limit:
            missed.append(f"{name}: {share:.2f}, at most {limit}")
    return missed


if __name__ == "__main__":
    # DALI uses names of its own that it has given up.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="nvidia")
    KERNELS["uint8"].wait()
    if missed := measure_peers(7):
        sys.exit("past a limit:\n" + "\n".join(missed))
