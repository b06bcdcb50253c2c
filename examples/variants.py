"""What ablation.py compares: the paper's updater, and one factor changed in each variant.

All but ``paper`` are beyond the paper. A leave-one-out baseline is no variant of its own: the
reward less the mean of the batch's other rewards is n / (n - 1) times the reward less the batch's
mean, and normalisation cancels the factor.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from data import Batches, ImageData
from torch import Tensor

from ola_augment import Actions, GARUpdater, OLAPolicy


class Shuffled(GARUpdater):
    """The control: each reward goes to a random example of the batch."""

    def step(self, actions: Actions, alignments: Tensor) -> Any:
        return super().step(actions, alignments[torch.randperm(len(alignments))])


class Decayed(GARUpdater):
    """Meta lr falls to 0 over the run, as a cosine."""

    def __init__(self, policy: OLAPolicy, steps: int, **options: Any) -> None:
        super().__init__(policy, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, actions: Actions, alignments: Tensor) -> Any:
        stats = super().step(actions, alignments)
        self.schedule.step()
        return stats


class PulledToUniform(OLAPolicy):
    """Minus the KL divergence from the uniform policy takes the entropy's place."""

    def entropy(self) -> Tensor:
        num_ops, keep, drop, magnitude, _ = self.log_probs()

        def divergence(log_probs: Tensor) -> Tensor:
            size = log_probs.shape[-1]
            return (log_probs.exp() * (log_probs + math.log(size))).sum(-1)

        slot = divergence(torch.stack((keep, drop), -1)) + keep.exp() * divergence(magnitude)
        counts = torch.arange(1, len(num_ops) + 1)
        return -(divergence(num_ops) + (num_ops.exp() @ counts.float()) * slot.mean())


class OperationBaseline(GARUpdater):
    """Subtracts from each alignment a running mean over the operations that the image got."""

    def __init__(self, policy: OLAPolicy, **options: Any) -> None:
        super().__init__(policy, **options)
        self.means = torch.zeros(len(policy.space))

    def step(self, actions: Actions, alignments: Tensor) -> Any:
        kept = torch.zeros(len(alignments), len(self.means))
        kept.scatter_add_(1, actions.ops.clamp(min=0), actions.keep.float())
        counts = kept.sum(1).clamp(min=1)
        baseline = kept @ self.means / counts
        means = kept.T @ alignments / kept.sum(0).clamp(min=1)
        seen = kept.sum(0) > 0
        self.means[seen] += 0.05 * (means - self.means)[seen]
        return super().step(actions, alignments - baseline)


class EffectivePolicy(OLAPolicy):
    """Draws without effect do not count: identity's keep, magnitudes of operations without one."""

    def _log_prob(self, actions: Actions, log_probs: Any) -> Tensor:
        plain = torch.tensor([operation.low is None for operation in self.space.operations])
        idle = torch.tensor([operation.name == "identity" for operation in self.space.operations])
        magnitude = torch.where(plain[:, None], torch.zeros(()), log_probs.magnitude)
        keep = torch.where(idle, torch.zeros(()), log_probs.keep)
        drop = torch.where(idle, torch.zeros(()), log_probs.drop)
        effective = log_probs._replace(keep=keep, drop=drop, magnitude=magnitude)
        return super()._log_prob(actions, effective)


class TwoStreams:
    """Batches in turn from two sources: augmented ones from the first, plain from the second.

    With several pairs of sources, each epoch uses the next pair.
    """

    def __init__(self, pairs: list[tuple[Batches, Batches]], steps: int) -> None:
        self.pairs = [tuple(map(_forever, pair)) for pair in pairs]
        self.steps = steps
        self.epoch = self.turn = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pair = self.pairs[self.epoch % len(self.pairs)]
        self.epoch += 1
        for _ in range(self.steps):
            self.turn += 1
            yield next(pair[(self.turn + 1) % 2])


def _forever(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def folds(data: ImageData, options: argparse.Namespace, seed: int, count: int) -> TwoStreams:
    """In turn, ``count`` thirds of the images are only reference and the rest only augmented."""
    images, labels, size = data.train_images, data.train_labels, options.batch_size
    pairs = []
    for fold in torch.arange(len(images)).tensor_split(3)[:count]:
        rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, fold, False)
        augmented = Batches(images[rest], labels[rest], size, seed)
        pairs.append((augmented, Batches(images[fold], labels[fold], size, seed + 1)))
    return TwoStreams(pairs, len(images) // size)


def held_out(data: ImageData, options: argparse.Namespace, seed: int) -> TwoStreams:
    return folds(data, options, seed, 1)


def rotating_fold(data: ImageData, options: argparse.Namespace, seed: int) -> TwoStreams:
    return folds(data, options, seed, 3)


def large_reference(data: ImageData, options: argparse.Namespace, seed: int) -> TwoStreams:
    """Reference batches four times as large."""
    images, labels = data.train_images, data.train_labels
    augmented = Batches(images, labels, options.batch_size, seed)
    plain = Batches(images, labels, 4 * options.batch_size, seed + 1)
    return TwoStreams([(augmented, plain)], len(augmented))


def one_stream(data: ImageData, options: argparse.Namespace, seed: int) -> Batches:
    return Batches(data.train_images, data.train_labels, options.batch_size, seed)


class Variant(NamedTuple):
    """How a run differs: its updater (None learns nothing), batches, reward's size and policy.

    ``updater`` is called with the policy and the number of updates, ``batches`` with the data, the
    options and the seed, ``policy`` with the space; ``cosine``: the cosine is the reward.
    """

    updater: Callable[..., GARUpdater] | None = lambda policy, steps: GARUpdater.paper(policy)
    batches: Callable[..., Any] = one_stream
    cosine: bool = False
    policy: Callable[[str], OLAPolicy] = OLAPolicy


VARIANTS = {
    "none": Variant(None),
    "randaugment": Variant(None),
    "trivialaugment": Variant(None),
    "uniform": Variant(None),
    "paper": Variant(),
    "lr 0.03": Variant(lambda policy, steps: GARUpdater(policy, lr=0.03)),
    "lr 0.01": Variant(lambda policy, steps: GARUpdater(policy, lr=0.01)),
    "lr 0.003": Variant(lambda policy, steps: GARUpdater(policy, lr=0.003)),
    "lr decay": Variant(lambda policy, steps: Decayed(policy, steps, lr=0.1)),
    "entropy 0.02": Variant(lambda policy, steps: GARUpdater(policy, lr=0.1, entropy_weight=0.02)),
    "kl 0.05": Variant(
        lambda policy, steps: GARUpdater(policy, lr=0.1, entropy_weight=0.05),
        policy=PulledToUniform,
    ),
    "kl 0.2": Variant(
        lambda policy, steps: GARUpdater(policy, lr=0.1, entropy_weight=0.2), policy=PulledToUniform
    ),
    "accumulate 4": Variant(lambda policy, steps: GARUpdater.paper(policy, accumulate=4)),
    "baseline": Variant(lambda policy, steps: OperationBaseline(policy, lr=0.1)),
    "cosine": Variant(cosine=True),
    "cosine, lr 0.01": Variant(lambda policy, steps: GARUpdater(policy, lr=0.01), cosine=True),
    "effective draws": Variant(policy=EffectivePolicy),
    "held-out reference": Variant(batches=held_out),
    "rotating reference": Variant(batches=rotating_fold),
    "large reference": Variant(batches=large_reference),
    "shuffled": Variant(lambda policy, steps: Shuffled(policy, lr=0.1)),
    "shuffled, lr 0.01": Variant(lambda policy, steps: Shuffled(policy, lr=0.01)),
}
