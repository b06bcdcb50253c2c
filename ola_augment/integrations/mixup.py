"""Mixup of timm on augmented batches: each example's reward goes to both its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ola_augment.extras import needs
from ola_augment.training.reward import Reward, gradient_alignment_reward, takes_norms

with needs("timm"):
    from timm.data import Mixup

__all__ = ["CreditedMixup"]


class CreditedMixup(Mixup):  # type: ignore[misc]
    """A ``timm.data.Mixup`` for augmented batches.

    A mixed example has two images and the draws of both. Its reward is credited to each of them in
    proportion to its share of the example; a draw gets the sum of what its two examples earn.

    Mix every augmented batch of the learner, and plain ones by a ``Mixup`` of their own.

    Args:
        args: positional arguments of ``timm.data.Mixup``.
        kwargs: its keyword arguments, such as ``mixup_alpha``, ``cutmix_alpha``, ``mode`` and
            ``num_classes``.

    Example:
        >>> from ola_augment import GARUpdater, OLAAugment, OLALearner
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> augment, mixup = OLAAugment(), CreditedMixup(mixup_alpha=0.2, num_classes=2)
        >>> updater = GARUpdater(augment.policy, reward=mixup.credited())
        >>> learner = OLALearner(model, augment, updater=updater)
        >>> images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
        >>> with learner.augmented_step():
        ...     mixed, targets = mixup(learner.augment(images), labels)
        ...     torch.nn.functional.cross_entropy(model(mixed), targets).backward()

    References:
        `mixup: Beyond Empirical Risk Minimization <https://arxiv.org/abs/1710.09412>`__
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shares: list[Tensor] = []  # of batches that await their reward

    def _mix_batch(self, x: Tensor) -> Any:
        return self._remember(x, super()._mix_batch(x))

    def _mix_elem(self, x: Tensor) -> Any:
        return self._remember(x, super()._mix_elem(x))

    def _mix_pair(self, x: Tensor) -> Any:
        return self._remember(x, super()._mix_pair(x))

    def _remember(self, x: Tensor, share: Any) -> Any:
        shares = torch.as_tensor(share, dtype=torch.float64, device="cpu").reshape(-1)
        shares = shares.expand(len(x))
        self._shares.append(shares.clone())
        return share

    def credited(self, reward: Reward = gradient_alignment_reward) -> Reward:
        """A reward for an updater, credited to images.

        Args:
            reward: of the mixed examples: from alignments (B,), and norms (B,) if it takes them, to
                rewards (B,).

        Returns:
            A function of the same arguments: the rewards (B,) of the images' draws.

        Raises:
            TypeError: ``reward`` is not callable.
        """
        if takes_norms(reward):
            return lambda alignments, norms: self._credit(reward(alignments, norms))
        return lambda alignments: self._credit(reward(alignments))

    def _credit(self, rewards: Tensor) -> Tensor:
        waiting, self._shares = self._shares, []
        batches: list[Tensor] = []  # older ones may have missed their reward
        while waiting and sum(map(len, batches)) < len(rewards):
            batches.insert(0, waiting.pop())
        if sum(map(len, batches)) != len(rewards):
            raise ValueError(
                f"{len(rewards)} rewards are not those of the latest mixed batches (of "
                f"{[len(batch) for batch in batches]} examples): mix every augmented batch once, "
                "and plain ones by a Mixup of their own"
            )
        parts = []
        split = torch.split(rewards, [len(batch) for batch in batches])
        for earned, batch in zip(split, batches, strict=True):
            share = batch.to(earned)
            parts.append(share * earned + ((1 - share) * earned).flip(0))  # its partner's too
        return torch.cat(parts)
