"""How a batch goes through an augmentation of kornia, found out from what it draws."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from ola_augment.integrations.kornia.draws import Call, Draws, numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Seeds = NDArray[np.uint64]

Params = dict[str, Tensor]

#: No number of colours, so that a row for each of them is not taken for a row for each image.
_IMAGES = 5
_SHAPE = "forward_input_shape"  # which kornia adds to what it draws
_SEEDS = np.arange(24, dtype=np.uint64)


class Source(Protocol):
    """What is run: an augmentation whose magnitude is given."""

    def draw(self, shape: tuple[int, ...]) -> Params:
        """Parameters for images (n, C, H, W)."""

    def give(self, params: Params, magnitudes: Tensor) -> Params:
        """The same with the magnitudes (n,) among them."""

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """What they make of the images."""


@dataclass(frozen=True)
class Plan:
    """How images of one size are run.

    Attributes:
        random: anything but the magnitude is drawn.
        later: random numbers are drawn while parameters are applied, too.
        fixed: parameters of one image where nothing is random and those of n are n times the same.
        shared: by their number, the calls of random functions whose result kornia shares within a
            batch: images for which they come out alike are run together. None: image by image.
    """

    random: bool
    later: bool
    shared: dict[int, Call] | None
    fixed: Params | None = None


def run(source: Source, images: Tensor, magnitudes: Tensor, seeds: Seeds, plan: Plan) -> Tensor:
    """Run images so that each draws what it would draw alone.

    Args:
        source: what is run.
        images: (n, C, H, W), at least one.
        magnitudes: (n,), on the CPU.
        seeds: (n,), of the images; not read if nothing is random.
        plan: of images of this size.

    Returns:
        (n, C, H, W).
    """
    if plan.fixed is not None:
        params = source.give(_repeated(plan.fixed, tuple(images.shape)), magnitudes)
        return source.apply(images, params)
    if not plan.random:
        seeds = np.zeros_like(seeds)
    groups = _groups(seeds, plan.shared)
    parts = []
    for rows in groups:
        chosen = images if len(groups) == 1 else images[rows]
        draws = Draws(seeds[rows], plan.shared)
        with draws:
            params = source.give(source.draw(tuple(chosen.shape)), magnitudes[rows])
            if plan.later:
                parts.append(source.apply(chosen, params))
        if not plan.later:
            parts.append(source.apply(chosen, params))
    if len(groups) == 1:
        return parts[0]
    order = torch.from_numpy(np.concatenate(groups).argsort()).to(images.device)
    return torch.cat(parts)[order]


def make_plan(source: Source, shape: tuple[int, ...], magnitude: float) -> Plan:
    """Find out how images are run, from what is drawn for them and from noise.

    Args:
        source: what is run.
        shape: (C, H, W) of the images.
        magnitude: to try.

    Raises:
        Exception: whatever kornia raises for an image of this size.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((_IMAGES, *shape), generator=generator, dtype=torch.float32, device="cpu")
    magnitudes = images.new_full((_IMAGES,), magnitude)
    single = Draws(_SEEDS[:1])
    with single:
        params = source.give(source.draw((1, *shape)), magnitudes[:1])
        before = len(single.calls)
        source.apply(images[:1], params)
    later = len(single.calls) > before
    random = later or _varies(source, (1, *shape), magnitudes[:1])
    plan = Plan(random, later, None)
    try:
        shared = _shared(source, images, magnitudes, single.calls)
        fixed = None if random else _fixed(source, tuple(images.shape), magnitudes)
        together = Plan(random, later, shared, fixed)
        seeds = _SEEDS[:_IMAGES]
        alone = run(source, images, magnitudes, seeds, plan)
        other = run(source, images, magnitudes, seeds, together)
    except (RuntimeError, ValueError, LookupError):  # its parameters are not one an image
        return plan
    same = alone.shape == other.shape and torch.allclose(alone, other, atol=1e-5)
    return together if same else plan


def _shared(
    source: Source, images: Tensor, magnitudes: Tensor, single: list[Call]
) -> dict[int, Call] | None:
    """Which calls give a batch one result, as those for a single image make it."""
    draws = Draws(_SEEDS[:1])
    with draws:
        source.apply(images, source.give(source.draw(tuple(images.shape)), magnitudes))
    pairs = list(zip(single, draws.calls, strict=False))
    shared = {k: one for k, (one, many) in enumerate(pairs) if not many.has_rows(len(images))}
    if len(single) != len(draws.calls) or any(call.tensors() for call in shared.values()):
        return None
    return shared


def _groups(seeds: Seeds, shared: dict[int, Call] | None) -> list[NDArray[np.int64]]:
    """Rows that are run together."""
    rows = np.arange(len(seeds))
    if shared is None:
        return list(rows[:, None])
    if not shared or (seeds == seeds[0]).all():
        return [rows]
    groups = defaultdict(list)
    uniforms = {k: numbers(seeds, k, math.prod(call.shape)) for k, call in shared.items()}
    for i in rows.tolist():
        results = (call.sample(uniforms[k][i]) for k, call in shared.items())
        groups[tuple(tuple(result.flatten().tolist()) for result in results)].append(i)
    return [np.array(group) for group in groups.values()]


def _varies(source: Source, shape: tuple[int, ...], magnitudes: Tensor) -> bool:
    """Whether one image's parameters come out in more than one way."""
    first: Params | None = None
    for i in range(len(_SEEDS)):
        with Draws(_SEEDS[i : i + 1]):
            drawn = source.give(source.draw(shape), magnitudes)
        first = first or drawn
        if not _same(first, drawn):
            return True
    return False


def _fixed(source: Source, shape: tuple[int, ...], magnitudes: Tensor) -> Params | None:
    """Parameters of one image, if those of a batch are the same for each."""
    with Draws(_SEEDS[:1]):
        one = source.give(source.draw((1, *shape[1:])), magnitudes[:1])
        batch = source.give(source.draw(shape), magnitudes)
    return one if _same(_repeated(one, shape), batch) else None


def _repeated(one: Params, shape: tuple[int, ...]) -> Params:
    params = {
        key: value.expand(shape[0], *value.shape[1:]) if value.shape[:1] == (1,) else value
        for key, value in one.items()
    }
    return params | {_SHAPE: torch.tensor(shape, device="cpu")}


def _same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
