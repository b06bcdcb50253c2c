"""One image a call, as torchvision is used: rows of ``augment.py``.

Every row is a ratio, ours over torchvision's, of medians over repeats in which both take turns.
"""

from __future__ import annotations

import io
import statistics
import time
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import PIL.Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

import ola_augment
from ola_augment.operations import compile_kernels

#: Calls in a block: enough that both sides draw every operation.
CALLS = {32: 300, 224: 100}
#: Ours may cost this share of torchvision's time.
LIMIT = 1.0
#: Ours in a collate function must be this many times as fast as torchvision image by image.
COLLATE = 5

PAIRS = {
    "RandAugment": (ola_augment.RandAugment, v2.RandAugment),
    "TrivialAugment": (ola_augment.TrivialAugment, v2.TrivialAugmentWide),
}


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


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> float:
    """Ours over theirs, in medians of repeats that take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for function in (ours, theirs):
        function()
    for _ in range(repeats):
        for function, times in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


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
    return [
        f"{row}: {r:.2f} of torchvision's, at most {LIMIT}" for row, r in rows.items() if r > LIMIT
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
    alone = ratio(epoch(ours, default_collate), epoch(theirs, default_collate), turns)
    collated = ratio(epoch(lambda x: x, ours.collate), epoch(theirs, default_collate), turns)
    print(f"\nA loader with 2 workers over {count} JPEG files, time of ours over torchvision's: "
          f"{alone:.2f} image by image, {collated:.2f} with collate")  # fmt: skip
    missed = [f"loader, image by image: {alone:.2f}, at most {LIMIT}"] if alone > LIMIT else []
    return missed + ([f"loader, collate: {collated:.2f}"] if collated > LIMIT else [])


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
