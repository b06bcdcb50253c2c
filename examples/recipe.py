"""How the examples set OLA up: the recommended settings, the paper's, and each one by itself."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from data import Batches, ImageData, Preprocess
from options import ENOUGH_PAIRS, is_recommended
from torch import Tensor, nn

from ola_augment import GARUpdater, OLAAugment, OLALearner, Thermostat, ValueUpdater
from ola_augment.training import Trial, cosine_reward
from ola_augment.training.reward import Reward

#: Held-out images whose gradient one pair takes; the reference is a mean over pairs.
HELD_OUT_BATCH = 32


def uniform(alignments: Tensor, norms: Tensor) -> Tensor:
    """The control that learns no operation."""
    return torch.zeros_like(alignments)


def shuffled(alignments: Tensor, norms: Tensor) -> Tensor:
    """The control: what was drawn for an example has nothing to do with its reward."""
    return cosine_reward(alignments, norms)[torch.randperm(len(alignments))]


#: What the learned policy is held against.
CONTROLS: dict[str, Reward] = {"shuffled": shuffled, "uniform": uniform}


def make_augment(space: str, options: argparse.Namespace, generator: torch.Generator) -> OLAAugment:
    start = {"learned": None, "steered": 1.0, "tried": 1.0}.get(options.strength, options.strength)
    return OLAAugment(space, generator=generator, strength=start)


def hold_out(data: ImageData, options: argparse.Namespace, seed: int) -> ImageData:
    """Training images, without those that are held out as the reference; that one is set."""
    if data.reference is not None:
        return data
    size = len(data.train_images)
    held_out = min(256, max(1, size // 5)) if options.held_out is None else options.held_out
    if held_out >= size:
        raise ValueError(f"{held_out} of {size} training images are held out: none is left")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    held, kept = order[:held_out], order[held_out:]
    return replace(
        data,
        reference=(data.train_images[held], data.train_labels[held]),
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
    )


def make_batches(
    data: ImageData, options: argparse.Namespace, seed: int, learns: bool
) -> tuple[Batches, tuple[Tensor, Tensor] | None]:
    """Batches for a method: all images, or those that are not held out."""
    if not (learns and options.reference == "held-out"):
        data = data.with_reference()
        return Batches(data.train_images, data.train_labels, options.batch_size, seed), None
    data = hold_out(data, options, seed)
    batches = Batches(
        data.train_images,
        data.train_labels,
        options.batch_size,
        seed,
        others=len(data.reference[0]) if options.learn_until < 1 else 0,
    )
    return batches, data.reference


def make_learner(
    model: nn.Module,
    augment: OLAAugment,
    batches: Batches,
    held_out: tuple[Tensor, Tensor] | None,
    preprocess: Preprocess,
    options: argparse.Namespace,
    target_domain: bool,
) -> OLALearner:
    pairs = options.epochs * len(batches) // 2
    reference: Any = options.reference

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(preprocess.test(images)), labels)

    if reference == "held-out":
        assert held_out is not None
        # A folder's images lie class by class; each batch is to have some of all.
        order = torch.randperm(len(held_out[0]), generator=torch.Generator().manual_seed(0))
        held_out = held_out[0][order], held_out[1][order]
        parts = -(-len(order) // HELD_OUT_BATCH)
        reference = list(zip(*(part.tensor_split(parts) for part in held_out), strict=True))
    if is_recommended(options):
        learner = OLALearner.recommended(
            model, augment, reference, pairs, loss, target_domain=target_domain
        )
        if options.control:
            learner.updater.reward = CONTROLS[options.control]
        return learner
    learned = math.ceil(options.learn_until * options.epochs) * len(batches) // 2
    enough = max(1, learned // ENOUGH_PAIRS) if options.reference == "held-out" else 1
    thermostat = trial = updater = None
    if options.strength == "steered":
        thermostat = Thermostat(augment.policy, lower_after=pairs // 4)
    elif options.strength == "tried":
        trial = Trial(augment.policy, learned, pairs // 2)
    if options.control:
        updater = ValueUpdater(augment.policy, explore=True, reward=CONTROLS[options.control])
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
        trial=trial,
        rejoin=reference is not options.reference and options.learn_until < 1,
        updater=updater,
        loss=loss,
    )
