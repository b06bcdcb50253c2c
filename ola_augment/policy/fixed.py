"""Policies without logits: UniformAugment (Algorithm 3) and RandAugment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ola_augment.draw import LogProbs, log_one_hot
from ola_augment.operation import whole
from ola_augment.policy.base import Policy, depends_on_logits_alone
from ola_augment.space import SearchSpace


class UniformPolicy(Policy):
    """UniformAugment (Algorithm 3): nothing is learned.

    With ``num_ops=1, keep_prob=1.0`` it is TrivialAugment (Müller and Hutter, 2021).

    Args:
        space: a :class:`SearchSpace` or its name.
        num_ops: operations drawn for every image, without replacement.
        keep_prob: probability in [0, 1] of applying each.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.

    Raises:
        ValueError: ``keep_prob`` outside [0, 1].

    Example:
        >>> int(UniformPolicy("wide_long", num_ops=2).sample(1).num_ops)
        2

    References:
        `UniformAugment: A Search-free Probabilistic Data Augmentation Approach
        <https://arxiv.org/abs/2003.14348>`__
    """

    def __init__(
        self,
        space: str | SearchSpace = "wide_long",
        num_ops: int = 2,
        keep_prob: float = 0.5,
        num_magnitude_bins: int = 31,
    ) -> None:
        super().__init__(space, num_ops, num_magnitude_bins)
        if not 0 <= keep_prob <= 1:
            raise ValueError(f"keep_prob must lie in [0, 1], got {keep_prob}")
        self.keep_prob = float(keep_prob)

    def arguments(self) -> dict[str, Any]:
        """Arguments that make such a policy again, without space; for files and ``repr``.

        Returns:
            Argument name -> JSON value.
        """
        return {"num_ops": self.max_ops, "keep_prob": self.keep_prob}

    @depends_on_logits_alone
    def log_probs(self) -> LogProbs:
        """Tables of Algorithm 3.

        Returns:
            The tables, constant.
        """
        size, bins = len(self.space), self.space.num_magnitude_bins
        return LogProbs(
            num_ops=log_one_hot(self.max_ops - 1, self.max_ops),
            keep=_table(self.keep_prob).log().expand(size),
            drop=_table(1 - self.keep_prob).log().expand(size),
            magnitude=_table(-math.log(bins)).expand(size, bins),
        )


class RandAugmentPolicy(Policy):
    """RandAugment (Cubuk et al., 2020): N operations with replacement, all at one magnitude bin.

    Args:
        space: a :class:`SearchSpace` or its name.
        num_ops: operations applied to every image (N); 0 is one slot that is never kept, so that
            images come back as they are.
        magnitude: the bin of all of them (M), 0 .. num_magnitude_bins - 1.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.

    Raises:
        TypeError: ``num_ops`` or ``magnitude`` is not an int.
        ValueError: ``num_ops`` below 0, ``magnitude`` is no bin of the space.

    Example:
        >>> RandAugmentPolicy(num_ops=2, magnitude=9).sample(1).magnitude_bins
        tensor([[9, 9]])

    References:
        `RandAugment: Practical automated data augmentation with a reduced search space
        <https://arxiv.org/abs/1909.13719>`__
    """

    def __init__(
        self,
        space: str | SearchSpace = "rand_augment",
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
    ) -> None:
        num_ops = whole("num_ops", num_ops)
        if num_ops < 0:
            raise ValueError(f"num_ops must be 0 or more, got {num_ops}")
        super().__init__(space, max(1, num_ops), num_magnitude_bins, replacement=True)
        self.num_ops = num_ops
        bins = self.space.num_magnitude_bins
        if isinstance(magnitude, bool) or not isinstance(magnitude, int):
            raise TypeError(f"magnitude must be an int (a bin), got {magnitude!r}")
        if not 0 <= magnitude < bins:
            raise ValueError(f"magnitude must be a bin in 0 .. {bins - 1}, got {magnitude}")
        self.magnitude = magnitude

    def arguments(self) -> dict[str, Any]:
        """Arguments that make such a policy again, without space; for files and ``repr``.

        Returns:
            Argument name -> JSON value.
        """
        return {"num_ops": self.num_ops, "magnitude": self.magnitude}

    @depends_on_logits_alone
    def log_probs(self) -> LogProbs:
        """Tables with all mass on N operations, kept, at bin M.

        Returns:
            The tables, constant.
        """
        size, bins = len(self.space), self.space.num_magnitude_bins
        certain, never = _table(0.0).expand(size), _table(-math.inf).expand(size)
        return LogProbs(
            num_ops=log_one_hot(self.max_ops - 1, self.max_ops),
            keep=certain if self.num_ops else never,
            drop=never if self.num_ops else certain,
            magnitude=log_one_hot(self.magnitude, bins).expand(size, bins),
        )


def _table(value: float) -> Tensor:
    """A scalar in float32, whatever the default dtype and device are."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")
