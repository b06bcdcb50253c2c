"""kornia's augmentations as operations, beside kornia's own: processor time of both.

    python examples/benchmarks/kornia_operations.py

Ours draw for each image what the actions record, kornia's once a batch or for each image, too. One
thread, float32, medians of runs in which the two take turns. Exits with 1 if search_space() takes
more than LIMITS times kornia's RandAugment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import RandAugment
from timing import medians

from ola_augment import Operation, PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.kornia import operation, search_space

SIZES = [(256, 32), (32, 224)]
#: By the side of the images; goal: 1.5.
LIMITS = {32: 3.5, 224: 1.5}
OWN: dict[str, Callable[[], K.AugmentationBase2D]] = {
    "RandomErasing": lambda: K.RandomErasing(p=1.0),
    "ColorJitter": lambda: K.ColorJitter(0.3, 0.3, 0.3, 0.1, p=1.0),
    "RandomRotation": lambda: K.RandomRotation(30.0, p=1.0),
    "RandomGaussianNoise": lambda: K.RandomGaussianNoise(std=0.1, p=1.0),
}


def transform(*operations: Operation, num_ops: int = 1) -> PolicyTransform:
    return PolicyTransform(UniformPolicy(SearchSpace(operations), num_ops, 1.0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    slow = False
    print("| images | augmentation | ours, ms | kornia, ms | ours / kornia | limit |")
    print("|---|---|---:|---:|---:|---:|")
    for count, side in SIZES:
        images = torch.rand(count, 3, side, side)
        policy = transform(*search_space().operations, num_ops=2)
        both = {"search_space(), 2 operations": (policy, RandAugment(n=2, m=15))}
        for name, make in OWN.items():
            both[name] = (transform(operation(make())), make())
        for name, (mine, other) in both.items():
            pair = {"ours": partial(mine, images), "theirs": partial(other, images)}
            own, its = (1e3 * time for time in medians(pair, options.repeats).values())
            ratio, limit = own / its, LIMITS[side] if "space" in name else None
            slow |= limit is not None and ratio > limit
            row = f"| {count} x {side} | {name} | {own:.1f} | {its:.1f} | {ratio:.2f} |"
            print(row, limit or "", "|", flush=True)
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
