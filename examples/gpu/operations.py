"""Operations on the device: uint8 against Pillow, floats against the CPU, no waiting."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rows import check, pictures
from torch import Tensor

from ola_augment import Actions, SearchSpace
from ola_augment.operations.program import program

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from batched_kernels import apply_batched
from pillow_reference import draw, one_operation, pillow_apply

SPACES = (SearchSpace.rand_augment(), SearchSpace.wide_long())
#: Grey levels between floats on two devices: rounding in single precision.
FLOAT_BOUND = 0.05


def on_device(
    images: Tensor, space: SearchSpace, actions: Actions, bilinear: bool, device: str
) -> Tensor:
    """What the batched kernels return there, moved back."""
    height, width = images.shape[2:]
    given, black = images.to(device), (0, 0, 0)[: images.shape[1]]
    return apply_batched(given, program(space, height, width), actions, black, bilinear).cpu()


def draws(space: SearchSpace, op: int, count: int, quick: bool) -> Actions:
    """Every magnitude and sign of an operation on ``count`` images; some when ``quick``."""
    operation, bins = space.operations[op], space.num_magnitude_bins
    chosen = range(bins) if not quick else (0, bins // 2, bins - 1)
    chosen = chosen if operation.low is not None else (0,)
    signs = (1, -1) if operation.signed else (1,)
    parts = [one_operation(count, op, b, s, seed=b) for b in chosen for s in signs]
    return Actions.cat(parts)


def single(bilinear: bool, device: str, quick: bool) -> tuple[bool, str]:
    images = pictures(6, 24)
    compared, different = 0, []
    for space in SPACES:
        for op, operation in enumerate(space.operations):
            actions = draws(space, op, len(images), quick)
            batch = images.repeat(len(actions.num_ops) // len(images), 1, 1, 1)
            expected = pillow_apply(batch, space, actions, bilinear)
            result = on_device(batch, space, actions, bilinear, device)
            compared += len(batch)
            if not torch.equal(result, expected):
                different.append(f"{operation.name} ({space.name})")
    found = f"differ: {', '.join(different)}" if different else f"{compared:,} images equal"
    return not different, found


def chains(bilinear: bool, device: str, quick: bool) -> tuple[bool, str]:
    images = pictures(60 if quick else 1000, 32)
    different = 0
    for seed, space in enumerate(SPACES):
        actions = draw(space, len(images), 4, seed)
        expected = pillow_apply(images, space, actions, bilinear)
        result = on_device(images, space, actions, bilinear, device)
        different += int((result != expected).flatten(1).any(1).sum())
    return different == 0, f"{different} of {2 * len(images):,} images differ"


def floats(bilinear: bool, device: str, quick: bool) -> tuple[bool, str]:
    images = pictures(24, 24) / 255
    largest, where = 0.0, ""
    for space in SPACES:
        for op, operation in enumerate(space.operations):
            actions = draws(space, op, 4 if quick else 24, True)
            batch = images[: len(actions.num_ops)]
            batch = batch.repeat(-(-len(actions.num_ops) // len(batch)), 1, 1, 1)
            batch = batch[: len(actions.num_ops)]
            one, other = (
                on_device(batch, space, actions, bilinear, there) for there in (device, "cpu")
            )
            difference = 255 * float((one - other).abs().max())
            if difference > largest:
                largest, where = difference, f" ({operation.name})"
    return largest <= FLOAT_BOUND, f"{largest:.1e} grey levels{where}"


def waits(floating: bool) -> tuple[bool, str]:
    images = pictures(200, 16).cuda()
    images = images / 255 if floating else images
    actions = draw(SPACES[1], 200, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = apply_batched(images, program(SPACES[1], 16, 16), actions, (0, 0, 0), True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return kept.shape == images.shape, "the host never waits"


def main(device: str, quick: bool) -> None:
    for bilinear in (False, True):
        mode = "bilinear" if bilinear else "nearest"
        check("operations", f"uint8, each operation, {mode}", "Pillow's, bit for bit",
              lambda bilinear=bilinear: single(bilinear, device, quick))  # fmt: skip
        check("operations", f"uint8, chains of four, {mode}", "Pillow's, bit for bit",
              lambda bilinear=bilinear: chains(bilinear, device, quick))  # fmt: skip
        check("operations", f"float32, each operation, {mode}", f"<= {FLOAT_BOUND} from the CPU",
              lambda bilinear=bilinear: floats(bilinear, device, quick))  # fmt: skip
    if device == "cuda":
        for floating in (False, True):
            check("operations", "no synchronisation, " + ("float32" if floating else "uint8"),
                  "none", lambda floating=floating: waits(floating))  # fmt: skip
