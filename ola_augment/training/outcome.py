"""What came of a pair, on all ranks: whether it can teach, and the update that it makes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.streams import world_size
from ola_augment.training.everyone import Everyone
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.ranks import alike, shared_outcome
from ola_augment.training.reward import cosine_reward, gradient_alignment_reward
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater

#: Updaters that learn from a batch of all ranks as from any other.
_OURS = (GARUpdater, ValueUpdater)
Updater = GARUpdater | NSLRUpdater | ValueUpdater


def outcome(
    updater: Updater,
    everyone: Everyone,
    actions: list[Actions],
    signal: tuple[Tensor, ...] | None,
    device: torch.device,
) -> tuple[bool, int, Callable[[], UpdateStats]]:
    """Whether a rank is bad, all ranks' examples, and how to learn from these.

    Args:
        updater: that learns.
        everyone: gathers.
        actions: of this rank's examples.
        signal: what the updater takes after them; None where something was not finite.
        device: of the model.
    """
    if world_size() == 1 or not compares(updater) or type(updater) not in _OURS:
        examples = sum(len(part.log_prob) for part in actions)
        bad, examples = shared_outcome(signal is None, examples, device)
        return bad, examples, functools.partial(_learn, updater, actions, signal)
    found = everyone.gather(actions, signal, device)

    def learn() -> UpdateStats:
        if found is None:  # somewhere the updater has a word to say
            return _learn(updater, actions, signal)
        with alike():
            return _learn(updater, [found[0]], found[1])

    return everyone.bad, everyone.examples, learn


def _learn(
    updater: Updater, actions: list[Actions], signal: tuple[Tensor, ...] | None
) -> UpdateStats:
    assert signal is not None
    return updater.step(Actions.cat(actions), *signal)


def compares(updater: object) -> bool:
    """Whether rewards are differences within a batch, of which nothing else is known."""
    return getattr(updater, "reward", None) in (gradient_alignment_reward, cosine_reward)
