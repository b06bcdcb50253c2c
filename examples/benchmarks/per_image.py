"""One image a call, as torchvision is used, and loaders, beside torchvision.

    python examples/benchmarks/per_image.py [--data ZIP]

Every row is a ratio, ours over torchvision's, of medians over repeats in which both take turns: of
CPU time, or of seconds where other processes work.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import PIL.Image
import torch
from photographs import crops as photographs
from timing import medians
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

import ola_augment
from ola_augment.operations import compile_kernels

#: Calls in a block: enough that both sides draw every operation.
CALLS = {32: 300, 224: 100}
#: Ours may cost this share of torchvision's time, and these rows a little more.
LIMIT = 1.0
LOOSER = {"TrivialAugment, tensor 32x32": 1.1}
#: Ours in a collate function must be this many times as fast as torchvision image by image.
COLLATE = 5

PAIRS = {
    "RandAugment": (ola_augment.RandAugment, v2.RandAugment),
    "TrivialAugment": (ola_augment.TrivialAugment, v2.TrivialAugmentWide),
}


#: A loader of decoded pictures of 224 pixels, with ``collate``: at most this share. The goal is
#: 0.5, and runs differ by a tenth: two workers and the process that waits share two cores.
COLLATED_LIMIT = 0.55


class Pictures(Dataset):
    """Decoded PIL images, as tensors once they are transformed."""

    def __init__(self, pictures: list[PIL.Image.Image], transform: Callable) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return tvf.pil_to_tensor(self.transform(self.pictures[i]))


class Jpegs(Dataset):
    """The first training images of a zip of JPEG files, decoded when asked for."""

    def __init__(self, path: Path, count: int, transform: Callable) -> None:
        with zipfile.ZipFile(path) as archive:
            names = (n for n in archive.namelist() if n.startswith("train/") and n.endswith("jpg"))
            self.files = [archive.read(name) for name in islice(names, count)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return tvf.pil_to_tensor(
            self.transform(PIL.Image.open(io.BytesIO(self.files[i])).convert("RGB"))
        )


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Ours over theirs, in medians of repeats that take turns."""
    times = medians({"ours": ours, "theirs": theirs}, repeats, clock)
    return times["ours"] / times["theirs"]


def measure_calls(crops: Callable[[int, int], Tensor], repeats: int) -> list[str]:
    """Print the table of single images; return the rows past their limit."""
    print("\nOne image a call, one thread, time of ours over torchvision's:\n")
    print("| | not reading `last_actions` | reading it |\n|---|---:|---:|")
    rows = {}
    for side, calls in CALLS.items():
        tensors = list(crops(calls, side))
        for form, images in (
            ("PIL", [tvf.to_pil_image(tensor) for tensor in tensors]),
            ("tensor", tensors),
        ):
            for name, (our_kind, their_kind) in PAIRS.items():
                ours, theirs = our_kind(), their_kind()

                def read(images: list = images, ours: Callable = ours) -> list:
                    return [(ours(image), ours.last_actions) for image in images]

                def call(images: list = images, ours: Callable = ours) -> list:
                    return [ours(image) for image in images]

                def other(images: list = images, theirs: Callable = theirs) -> list:
                    return [theirs(image) for image in images]

                row = f"{name}, {form} {side}x{side}"
                rows[row] = ratio(call, other, repeats)
                print(f"| {row} | {rows[row]:.2f} | {ratio(read, other, repeats):.2f} |")
    ours, theirs = ola_augment.TrivialAugment(), v2.TrivialAugmentWide()
    images = [crops(1, side)[0] for side in range(40, 100)]
    rows["TrivialAugment, tensors of 60 sizes"] = ratio(
        lambda: [ours(image) for image in images],
        lambda: [theirs(image) for image in images],
        repeats,
    )
    print(f"| TrivialAugment, tensors of 60 sizes | {[*rows.values()][-1]:.2f} | |")
    limits = {row: LOOSER.get(row, LIMIT) for row in rows}
    return [
        f"{row}: {r:.2f} of torchvision's, at most {limits[row]}"
        for row, r in rows.items()
        if r > limits[row]
    ]


def measure_loader(path: Path, repeats: int) -> list[str]:
    """Print images/s of a loader with two workers over JPEG files; return what is too slow."""
    compile_kernels()
    ours, theirs = ola_augment.TrivialAugment(), v2.TrivialAugmentWide()
    count = 8000

    def epoch(transform: Callable, collate: Callable) -> Callable[[], None]:
        data = Jpegs(path, count, transform)
        loader = DataLoader(data, 128, num_workers=2, collate_fn=collate, persistent_workers=True)

        def run() -> None:
            for _ in loader:
                pass

        return run

    turns = max(3, repeats // 3)
    seconds = time.perf_counter
    other = epoch(theirs, default_collate)
    alone = ratio(epoch(ours, default_collate), other, turns, seconds)
    collated = ratio(epoch(lambda x: x, ours.collate), other, turns, seconds)
    print(f"\nA loader with 2 workers over {count} JPEG files, time of ours over torchvision's: "
          f"{alone:.2f} image by image, {collated:.2f} with collate")  # fmt: skip
    missed = [f"loader, image by image: {alone:.2f}, at most {LIMIT}"] if alone > LIMIT else []
    return missed + ([f"loader, collate: {collated:.2f}"] if collated > LIMIT else [])


def measure_pictures(crops: Callable[[int, int], Tensor], repeats: int) -> list[str]:
    """Print what a loader takes over pictures that are decoded; return what is past its limit."""
    compile_kernels()
    pictures = [tvf.to_pil_image(image) for image in crops(1024, 224)]
    policy = ola_augment.UniformPolicy("wide_long", num_ops=2, keep_prob=1.0)
    ours, theirs = ola_augment.PolicyTransform(policy), v2.RandAugment(num_ops=2)

    def epoch(transform: Callable, collate: Callable) -> Callable[[], None]:
        data = Pictures(pictures, transform)
        loader = DataLoader(data, 64, num_workers=2, collate_fn=collate, persistent_workers=True)

        def run() -> None:
            for _ in loader:
                pass

        return run

    collated = ratio(
        epoch(lambda x: x, ours.collate),
        epoch(theirs, default_collate),
        max(5, repeats // 2),
        time.perf_counter,
    )
    print(f"\nA loader with 2 workers over {len(pictures)} pictures of 224x224, WideLong x 2 with "
          f"collate over torchvision's RandAugment x 2 on PIL images: {collated:.2f}")  # fmt: skip
    if collated <= COLLATED_LIMIT:
        return []
    return [f"loader, 224, collate: {collated:.2f}, at most {COLLATED_LIMIT}"]


def measure_collate(crops: Callable[[int, int], Tensor], repeats: int) -> list[str]:
    """Print how much faster 128 tensors are augmented in a collate function."""
    compile_kernels()
    ours, theirs, tensors = (
        ola_augment.TrivialAugment(),
        v2.TrivialAugmentWide(),
        list(crops(128, 32)),
    )
    share = ratio(
        lambda: ours.collate(tensors),
        lambda: default_collate([theirs(tensor) for tensor in tensors]),
        repeats,
    )
    print(f"\n128 tensors of 32x32 in a collate function: {1 / share:.1f} times as fast")
    return [f"collate: {1 / share:.1f}x, at least {COLLATE}x"] if 1 / share < COLLATE else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--data", type=Path, help="zip with train/CLASS/*.jpg for the loader")
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = measure_calls(photographs, options.repeats)
    missed += measure_collate(photographs, options.repeats)
    missed += measure_pictures(photographs, options.repeats)
    if options.data:
        missed += measure_loader(options.data, options.repeats)
    if missed:
        sys.exit("past a limit:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
