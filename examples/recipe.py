"""How the examples set OLA up: the recommended settings, the paper's, and each one by itself."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from data import Batches, ImageData, Preprocess
from torch import Tensor, nn

from ola_augment import GARUpdater, OLAAugment, OLALearner, Thermostat, ValueUpdater
from ola_augment.training import cosine_reward

#: docs/results.md has the comparisons that the recommendation rests on.
SETTINGS: dict[str, dict[str, Any]] = {
    # That of OLALearner.recommended.
    "recommended": {
        "meta_lr": 0.03,
        "reference": "held-out",
        "strength": "steered",
        "learn_until": 0.25,
    },
    "paper": {"meta_lr": 0.1, "reference": "next", "strength": "learned", "learn_until": 1.0},
}
#: Pairs that teach enough (up to twice as many do): with more, a run only costs more.
ENOUGH_PAIRS = 250


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--settings", choices=SETTINGS, default="recommended", help="what is not given below")
    add("--meta-lr", type=float, help="of the policy's Adam: 0.03, or the paper's 0.1")
    add("--entropy-weight", type=float, default=0.0, help="beyond the paper, which has none")
    add(
        "--reference",
        choices=["next", "current", "held-out"],
        help="gradient that is aligned with: of the plain batch after the augmented update (the "
        "paper) or before it, or the running mean of that of images held out: the data's reference "
        "images, or --held-out",
    )
    add(
        "--strength",
        type=strength,
        help="applied operations an image: a number, 'steered' by a thermostat from 1, or "
        "'learned' (the paper); with the first two the policy learns which operations, by values",
    )
    add(
        "--learn-every",
        type=int,
        help="learn from every so manyth pair of steps (default: with images held out so that some "
        f"{ENOUGH_PAIRS} teach, else 1)",
    )
    add(
        "--learn-until",
        type=float,
        help="share of the epochs; held-out images join the training after it, and with a strength "
        "operations are drawn uniformly until then",
    )
    add(
        "--held-out",
        type=int,
        help="training images held out if the data has no reference (default: a fifth, at most "
        "256)",
    )
    add("--shuffle", action="store_true", help="control: rewards of other examples of the batch")


def strength(text: str) -> str | float:
    return text if text in ("learned", "steered") else float(text)


def fill_in(options: argparse.Namespace) -> None:
    """Take from --settings what was not given."""
    for name, value in SETTINGS[options.settings].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.shuffle and options.strength == "learned":
        raise ValueError("--shuffle is a control of values: give a --strength")
    if not 0 < options.learn_until <= 1:
        raise ValueError(f"--learn-until must lie in (0, 1], got {options.learn_until}")


def is_recommended(options: argparse.Namespace) -> bool:
    """Whether nothing of the recommended setting was changed."""
    named = SETTINGS["recommended"].items()
    return options.learn_every is None and all(getattr(options, n) == value for n, value in named)


def described(options: argparse.Namespace) -> str:
    """The settings of a run of OLA, for the line above a table."""
    every = options.learn_every or 1
    learns = f"learning from every {every}. pair" if every > 1 else ""
    until = f"until {options.learn_until:g} of the epochs" if options.learn_until < 1 else ""
    parts = (
        "shuffled" * options.shuffle,
        f"reference {options.reference}",
        f"strength {options.strength}",
        f"meta lr {options.meta_lr}" * (options.strength == "learned"),
        f"entropy weight {options.entropy_weight}" * bool(options.entropy_weight),
        learns,
        until,
    )
    return "ola: " + ", ".join(part for part in parts if part)


def make_augment(space: str, options: argparse.Namespace, generator: torch.Generator) -> OLAAugment:
    start = {"learned": None, "steered": 1.0}.get(options.strength, options.strength)
    return OLAAugment(space, generator=generator, strength=start)


def hold_out(data: ImageData, options: argparse.Namespace, seed: int) -> ImageData:
    """Training images, without those that are held out as the reference; that one is set."""
    if data.reference is not None:
        return data
    size = len(data.train_images)
    held_out = min(256, size // 5) if options.held_out is None else options.held_out
    if not 0 < held_out < size:
        raise ValueError(f"--held-out must leave some of {size} training images, got {held_out}")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    held, kept = order[:held_out], order[held_out:]
    return replace(
        data,
        reference=(data.train_images[held], data.train_labels[held]),
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
    )


def make_batches(data: ImageData, options: argparse.Namespace, seed: int, learns: bool) -> Batches:
    """Batches for a method: all images, or those of the reference only after the learning."""
    if not (learns and options.reference == "held-out"):
        data = data.with_reference()
        return Batches(data.train_images, data.train_labels, options.batch_size, seed)
    data = hold_out(data, options, seed)
    return Batches(
        data.train_images,
        data.train_labels,
        options.batch_size,
        seed,
        late=data.reference,
        late_from=math.ceil(options.learn_until * options.epochs),
    )


def shuffled(alignments: Tensor, norms: Tensor) -> Tensor:
    """The control: what was drawn for an example has nothing to do with its reward."""
    return cosine_reward(alignments, norms)[torch.randperm(len(alignments))]


def make_learner(
    model: nn.Module,
    augment: OLAAugment,
    batches: Batches,
    preprocess: Preprocess,
    options: argparse.Namespace,
) -> OLALearner:
    pairs = options.epochs * len(batches) // 2
    reference: Any = options.reference

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(preprocess.test(images)), labels)

    if reference == "held-out":
        parts = -(-len(batches.late[0]) // options.batch_size)
        reference = list(zip(*(part.tensor_split(parts) for part in batches.late), strict=True))
    if is_recommended(options):
        learner = OLALearner.recommended(model, augment, reference, pairs, loss)
        if options.shuffle:
            learner.updater.reward = shuffled
        return learner
    learned = math.ceil(options.learn_until * options.epochs) * len(batches) // 2
    enough = max(1, learned // ENOUGH_PAIRS) if options.reference == "held-out" else 1
    thermostat = updater = None
    if options.strength == "steered":
        thermostat = Thermostat(augment.policy, lower_after=pairs // 4)
    if options.shuffle:
        updater = ValueUpdater(augment.policy, explore=True, reward=shuffled)
    elif options.strength == "learned":
        updater = GARUpdater(
            augment.policy, lr=options.meta_lr, entropy_weight=options.entropy_weight
        )
    return OLALearner(
        model,
        augment,
        reference=reference,
        learn_every=options.learn_every or enough,
        learn_pairs=None if options.learn_until == 1 else max(1, learned),
        thermostat=thermostat,
        updater=updater,
        loss=loss,
    )
