"""Good and bad input through every entry that leads to a compiled kernel, each index checked.

    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=.numba_boundscheck \
        python examples/reliability/fuzz_kernels.py --cases 20000

A call returns and leaves its input as it was, or it is refused by a TypeError or ValueError.
Anything else is a finding, above all the IndexError of a kernel that leaves its arrays.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fuzz_files import mutate, places
from numba import config
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode

from ola_augment import (
    Actions,
    GARUpdater,
    LogProbs,
    OLAPolicy,
    Operation,
    Policy,
    PolicyTransform,
    RandAugmentPolicy,
    SearchSpace,
    UniformPolicy,
    load_policy,
    save_policy,
)
from ola_augment.kernels.compiled import KERNELS
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions, apply_geometry_to_masks, transform_points

NAN, INF = math.nan, math.inf
NUMBERS = [0.0, 0.5, 1.0, 2.0, -1.0, 1e-30, 255.0, 256.0, 1e6, 1e30, 1e38, 1e308, NAN, INF, -INF]
INTEGERS = [-(2**63), -(2**31), -129, -2, -1, 0, 1, 2, 5, 19, 31, 127, 2**31, 2**62, 2**63 - 1]
SIDES = [1, 1, 2, 3, 4, 5, 6, 8, 13, 33]
MODES = [InterpolationMode.NEAREST, InterpolationMode.BILINEAR]
NAMED = [SearchSpace.rand_augment(), SearchSpace.wide_long(), SearchSpace.wide_long(2)]


class Given(Policy):
    """A stranger's policy: whatever tables it was given."""

    def __init__(self, space: SearchSpace, max_ops: int, tables: LogProbs) -> None:
        super().__init__(space, max_ops, replacement=tables.ops is not None)
        self.tables = tables

    def log_probs(self) -> LogProbs:
        return self.tables


def rarely(chance: random.Random, one_in: int = 6) -> bool:
    return chance.randrange(one_in) == 0


def shaped_images(chance: random.Random) -> Tensor:
    """uint8 images in some memory layout; some are of another shape or dtype."""
    batch, channels = chance.choice((0, 1, 2, 3, 4)), chance.choice((1, 3))
    shape = [batch, channels, chance.choice(SIDES), chance.choice(SIDES)]
    if rarely(chance, 12):
        shape[chance.randrange(4)] = chance.choice((0, 2, 4))
    if rarely(chance, 40):
        shape = chance.choice((shape[1:], shape[2:], [1, *shape], []))
    kind = chance.randrange(4)
    values = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, shape)
    images = torch.from_numpy(np.asarray(values, np.uint8))
    if kind == 0 and images.ndim >= 2:
        images = images.mT.contiguous().mT
    elif kind == 1 and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    elif kind == 2 and images.ndim:
        images = images.repeat_interleave(2, -1)[..., ::2]
    if rarely(chance):
        dtype = chance.choice((torch.float32, torch.float16, torch.float64, torch.bfloat16))
        images = images.to(dtype) / 255
    elif rarely(chance, 40):
        images = images.to(chance.choice((torch.int64, torch.bool, torch.int8, torch.complex64)))
    return images


def wild(chance: random.Random) -> Tensor:
    """A scalar in double precision: assigned to float32, what is too large becomes infinite."""
    return torch.tensor(chance.choice(NUMBERS), dtype=torch.float64)


def number(chance: random.Random, domain: tuple[float, float]) -> float:
    """Mostly inside of a domain, and often at its ends."""
    if rarely(chance, 40):
        return chance.choice(NUMBERS) * chance.choice((1, -1))
    reach = (max(domain[0], -400.0), min(domain[1], 400.0))
    return chance.choice((*domain, chance.uniform(*reach), chance.uniform(*reach)))


def own_matrix(value: float) -> Callable[[Tensor, int, int], Tensor]:
    def matrix(magnitudes: Tensor, height: int, width: int) -> Tensor:
        result = torch.eye(2, 3, dtype=torch.float64).repeat(len(magnitudes), 1, 1)
        result[:, 0, 2], result[:, 1, 0], result[:, 1, 2] = value, magnitudes, -value
        return result

    return matrix


def spaces(chance: random.Random) -> SearchSpace:
    """A named space, or operations with magnitudes of any size."""
    if chance.randrange(3) == 0:
        return chance.choice(NAMED)
    operations = []
    for name in chance.sample(list(TABLE), chance.randint(1, 4)):
        row = TABLE[name]
        if row.domain is None:
            operations.append(Operation(name))
            continue
        side = chance.choice((None, "width", "height")) if row.unit == "px" else None
        operations.append(
            Operation(
                name,
                number(chance, row.domain),
                number(chance, row.domain),
                integer=chance.random() < 0.5,
                signed=row.domain[0] < 0 and chance.random() < 0.5,
                side=side,
                per=chance.choice((1, 7, 32)),
            )
        )
    if rarely(chance):
        value = number(chance, (-40, 40))
        operations.append(Operation("own", -1, 1, matrix=own_matrix(value)))
    return SearchSpace(tuple(operations), chance.choice((2, 3, 11)))


def policies(chance: random.Random, space: SearchSpace) -> Policy:
    """One of the package's with any logits, or a stranger's with any tables."""
    size, bins, slots = len(space), space.num_magnitude_bins, min(chance.randint(1, 4), len(space))
    kind = chance.randrange(5)
    if kind == 0:
        return UniformPolicy(space, slots, chance.random())
    if kind == 1:
        return RandAugmentPolicy(space, slots, chance.randrange(bins))
    policy = OLAPolicy(space, slots, strength=chance.choice((None, chance.uniform(0, slots))))
    scale = chance.choice((0.0, 1.0, 30.0, 1e4, 1e38))
    with torch.no_grad():
        for logits in policy.named_logits().values():
            logits.copy_(torch.randn(logits.shape) * scale)
            if rarely(chance, 20):
                logits.view(-1)[chance.randrange(logits.numel())] = wild(chance)
    if kind < 4:
        return policy
    tables = [table for table in policy.log_probs() if table is not None]
    index = chance.randrange(len(tables))
    tables[index] = chance.choice(
        (
            tables[index].detach() + chance.uniform(-0.5, 0.5),
            wild(chance).float().expand(tables[index].shape),
            tables[index][:-1],
            torch.zeros(size + 1, bins + 1),
        )
    )
    return Given(space, slots, LogProbs(*tables))


def some_actions(
    chance: random.Random, space: SearchSpace, batch: int, slots: int | None = None
) -> Actions:
    """Drawn for these images; half of them damaged in one field."""
    slots = slots or chance.randint(1, min(4, len(space)))
    generator = torch.Generator().manual_seed(chance.randrange(2**32))
    actions = OLAPolicy(space, slots).sample(batch, generator)
    if chance.random() < 0.5:
        return actions
    name = chance.choice(Actions._fields)
    value = getattr(actions, name).clone()
    damage = chance.randrange(6)
    if damage == 0:
        value = value.to(chance.choice((torch.float32, torch.int64, torch.int32, torch.bool)))
    elif damage == 1:
        value = chance.choice((value[:-1], value[..., :-1], value[None], torch.cat([value] * 2)))
    elif value.numel():
        integer = torch.tensor(chance.choice(INTEGERS))
        entry = wild(chance) if value.is_floating_point() else integer
        value.view(-1)[chance.randrange(value.numel())] = entry
    return actions._replace(**{name: value})


def fills(chance: random.Random, images: Tensor) -> float | list[float]:
    if rarely(chance, 10):
        return chance.choice((*NUMBERS, [], [0, 0], [NAN, 0, 0]))
    value = chance.random() if images.is_floating_point() else chance.randrange(256)
    channels = images.shape[-3] if images.ndim > 2 else 1
    return chance.choice((0, value, [value] * channels))


def transforms(chance: random.Random, policy: Policy, images: Tensor) -> PolicyTransform:
    return PolicyTransform(policy, interpolation=chance.choice(MODES), fill=fills(chance, images))


def batch_of(images: Tensor) -> int:
    return len(images) if images.ndim == 4 else 1


def apply(chance: random.Random, images: Tensor) -> None:
    space = spaces(chance)
    mode = chance.choice(list(InterpolationMode) if rarely(chance, 12) else MODES)
    actions = some_actions(chance, space, batch_of(images))
    apply_actions(images, space, actions, interpolation=mode, fill=fills(chance, images))


def augment(chance: random.Random, images: Tensor) -> None:
    transforms(chance, policies(chance, spaces(chance)), images).augment(images)


def replay(chance: random.Random, images: Tensor) -> None:
    policy = policies(chance, spaces(chance))
    actions = some_actions(chance, policy.space, batch_of(images))
    transforms(chance, policy, images).replay(images, actions)


def collate(chance: random.Random, images: Tensor) -> None:
    transform = transforms(chance, policies(chance, spaces(chance)), images)
    if samples := [(image, 0) for image in images]:
        transform.collate(samples)


def annotated(chance: random.Random, images: Tensor) -> None:
    """A sample of an image and what belongs to it, as torchvision passes it on."""
    transform = transforms(chance, policies(chance, spaces(chance)), images)
    if images.ndim == 4 and len(images) and chance.random() < 0.7:
        images = images[0]
    size = tuple(images.shape[-2:])
    if rarely(chance):
        size = (chance.choice(SIDES), chance.choice(SIDES))
    points = torch.stack([wild(chance) for _ in range(8)]).view(2, 4)
    others = [
        tv_tensors.Mask(torch.zeros((*images.shape[:-3], *size), dtype=torch.int64)),
        tv_tensors.BoundingBoxes(
            points, format=chance.choice(("XYXY", "XYWH", "CXCYWH")), canvas_size=size
        ),
        tv_tensors.KeyPoints(points[:, :2], canvas_size=size),
    ]
    kinds = (Tensor, tv_tensors.Image, tv_tensors.Video)[: 2 if images.ndim < 4 else 3]
    picture: object = images.as_subclass(chance.choice(kinds))
    if images.ndim == 3 and images.dtype == torch.uint8 and chance.random() < 0.5:
        pixels = images.permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    possible = others[: 1 if images.ndim == 4 and not rarely(chance) else 3]
    transform([picture, *chance.sample(possible, chance.randint(0, len(possible)))])


def masks(chance: random.Random, images: Tensor) -> None:
    space = spaces(chance)
    apply_geometry_to_masks(images, space, some_actions(chance, space, batch_of(images)))


def points(chance: random.Random, images: Tensor) -> None:
    space, batch = spaces(chance), batch_of(images)
    values = wild(chance).expand(batch, 2, 2 if chance.random() < 0.9 else 3)
    height, width = chance.choice(SIDES), chance.choice((*SIDES, *SIDES, 0))
    transform_points(values, space, some_actions(chance, space, batch), height, width)


def learn(chance: random.Random, images: Tensor) -> None:
    policy = policies(chance, spaces(chance))
    batch = chance.randint(0, 3)
    actions = some_actions(chance, policy.space, batch, policy.max_ops)
    policy.log_prob(actions)
    alignments = torch.randn(batch)
    if rarely(chance) and batch:
        alignments[0] = wild(chance)
    GARUpdater(policy).step(actions, alignments)
    policy.sample(chance.choice((-1, 0, 3)))


def file(chance: random.Random, images: Tensor) -> None:
    """A damaged policy file that can still be read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.json"
        save_policy(chance.choice((OLAPolicy, UniformPolicy))(chance.choice(NAMED), 2), path)
        data = path.read_bytes()
        content = json.loads(data)
        known = list(places(content))
        for _ in range(8):
            path.write_bytes(mutate(data, content, known, chance))
            with contextlib.suppress(ValueError):
                transforms(chance, load_policy(path), images).augment(images)


ENTRIES = (apply, augment, replay, collate, annotated, masks, points, learn, file)


def indices_are_checked() -> bool:
    """Whether the kernels notice an operation that is none."""
    if not config.BOUNDSCHECK:
        return False
    image, rows = np.zeros((1, 1, 1, 1), np.uint8), np.full((1, 1), 9, np.int64)
    try:
        KERNELS["uint8"].wait()(
            image, image.copy(), 0, rows, np.zeros((1, 1, 2), np.float32),
            np.zeros(1, np.int64), np.zeros((1, 6)), np.zeros((1, 6), np.int64),
            np.zeros(1, np.uint8), False, 1, np.zeros(0),
            np.zeros(7, np.float32), True,
        )  # fmt: skip
    except IndexError:
        return True
    return False


def fuzz(cases: int, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Of each entry, how many calls returned and were refused; anything else is a finding."""
    counts: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    for case in range(cases):
        chance = random.Random(f"{seed} {case}")
        torch.manual_seed(case)
        entry = ENTRIES[case % len(ENTRIES)]
        images = shaped_images(chance)
        before = images.clone()
        refused = False
        try:
            entry(chance, images)
        except (TypeError, ValueError):
            refused = True
        except Exception as error:
            raise AssertionError(f"case {case} of seed {seed}, {entry.__name__}") from error
        if not torch.equal(images, before):
            raise AssertionError(f"case {case}, {entry.__name__}: wrote to its input")
        counts[entry.__name__][refused] += 1
    return {name: (count[False], count[True]) for name, count in counts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    warnings.simplefilter("error")
    if not indices_are_checked():
        print("indices are not checked: set NUMBA_BOUNDSCHECK=1 and a NUMBA_CACHE_DIR of its own")
        return 1
    counts = fuzz(options.cases, options.seed)
    for name, (returned, refused) in counts.items():
        print(f"{name}: {returned} returned, {refused} refused")
    print(f"{options.cases} cases, no index out of bounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
