"""Updaters: rewards of a batch, or of its examples, for :class:`PolicyGradient` (equation 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ola_augment.training.policy_gradient import (
    LearnablePolicy,
    PolicyGradient,
    UpdateStats,
)
from ola_augment.training.ranks import sum_over_ranks
from ola_augment.training.reward import (
    Reward,
    check_everywhere,
    checked_rewards,
    gradient_alignment_reward,
    next_step_loss_reward,
    takes_norms,
)


class GARUpdater(PolicyGradient):
    """Gradient-alignment reward: one reward per example (equations 1 and 3).

    The objective, maximised, is the batch mean of r_i log p(a_i; phi), with rewards normalised
    within the batch. Under ``torch.distributed`` batch and gradient are those of all ranks, so that
    the logits stay equal.

    Args:
        policy: anything with ``log_prob(actions)``, ``entropy()`` and ``named_logits()`` (or, as
            other modules have, ``parameters()``).
        lr: of the meta-optimizer, Adam; positive. The paper's is 0.1 (:meth:`paper`); 0.03 did as
            well and saturates later (`Results <../results.html>`__).
        accumulate: calls of :meth:`step` whose gradients are averaged for one update.
        optimizer: over ``policy.named_logits().values()``, instead of Adam; ``lr`` is then ignored.
        entropy_weight: beyond the paper: adds this times the policy's entropy to the objective.
        reward: of the examples of a batch: ``reward(alignments)``, or ``reward(alignments, norms)``
            with the norms of their gradients, all (B,); the paper's normalises the alignments.

    Raises:
        ValueError: a policy without trainable logits, an optimizer without them, or a number out
            of range.
        TypeError: a reward that cannot be called so.

    Example:
        >>> from ola_augment import OLAPolicy
        >>> policy = OLAPolicy()
        >>> updater = GARUpdater(policy)
        >>> updater.step(policy.sample(8), torch.randn(8)).stepped
        True

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    def __init__(
        self,
        policy: LearnablePolicy[Any],
        lr: float = 0.03,
        accumulate: int = 1,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        entropy_weight: float = 0.0,
        reward: Reward = gradient_alignment_reward,
    ) -> None:
        super().__init__(policy, lr, accumulate, optimizer=optimizer, entropy_weight=entropy_weight)
        self.takes_norms = takes_norms(reward)
        self.reward = reward

    @classmethod
    def paper(cls, policy: LearnablePolicy[Any], accumulate: int = 1) -> GARUpdater:
        """Make an updater with the paper's settings: equation 1, normalised, and Adam at 0.1.

        Args:
            policy: with logits to learn.
            accumulate: calls of :meth:`step` whose gradients are averaged for one update.

        Returns:
            The updater.

        Raises:
            ValueError: a policy without trainable logits, or ``accumulate`` below 1.
        """
        return cls(policy, lr=0.1, accumulate=accumulate)

    def step(self, actions: Any, alignments: Tensor, norms: Tensor | None = None) -> UpdateStats:
        """Reward the actions of one augmented batch.

        Args:
            actions: of B examples, with the ``log_prob`` they were drawn with.
            alignments: (B,) floating, <grad l_i(theta_t), grad L(theta_{t+1})>.
            norms: (B,) floating, ``|grad l_i(theta_t)|``, for rewards that take them.

        Returns:
            What the call did.

        Raises:
            RuntimeError: the policy is frozen.
            TypeError: alignments or norms that are no floating-point tensor.
            ValueError: alignments, norms or rewards of another shape than (B,), or NaN or Inf among
                them; the logits and the gradients added up so far are untouched.
        """
        rewards = checked_rewards(self.reward, len(actions.log_prob), alignments, norms)
        gradients, examples, clipped = self._collect(actions, rewards)
        pending = [*self._pending, (gradients, examples)]
        return self._stats(alignments, self._update(pending, [1.0] * len(pending)), clipped)


class NSLRUpdater(PolicyGradient):
    """Next-step loss reward: one reward, minus the next loss, for a whole batch.

    Unbiased with high variance; the paper's reason for GAR. A lone reward cannot be normalised,
    so the rewards of ``accumulate`` steps are normalised together and make one update.

    Args:
        policy: anything with ``log_prob(actions)``, ``entropy()`` and ``named_logits()`` (or, as
            other modules have, ``parameters()``).
        lr: of the meta-optimizer, Adam; positive.
        accumulate: steps that make one update, at least 2.
        optimizer: over ``policy.named_logits().values()``, instead of Adam; ``lr`` is then ignored.
        entropy_weight: beyond the paper: adds this times the policy's entropy to the objective.

    Raises:
        ValueError: a policy without trainable logits, an optimizer without them, or a number out
            of range.

    Example:
        >>> from ola_augment import OLAPolicy
        >>> policy = OLAPolicy()
        >>> updater = NSLRUpdater(policy, accumulate=2)
        >>> [updater.step(policy.sample(8), torch.tensor(loss)).stepped for loss in (0.7, 0.5)]
        [False, True]

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    per_example = False

    def __init__(
        self,
        policy: LearnablePolicy[Any],
        lr: float = 0.1,
        accumulate: int = 10,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__(policy, lr, accumulate, optimizer=optimizer, entropy_weight=entropy_weight)
        if accumulate < 2:
            raise ValueError(f"accumulate must be at least 2 for NSLR, got {accumulate}")
        self._losses: list[Tensor] = []

    def step(self, actions: Any, next_loss: Tensor) -> UpdateStats:
        """Reward the actions of one augmented batch.

        Args:
            actions: of B examples, with the ``log_prob`` they were drawn with.
            next_loss: floating scalar, L(theta_{t+1}) on the batch after the update.

        Returns:
            What the call did.

        Raises:
            RuntimeError: the policy is frozen.
            TypeError: a loss that is no floating-point tensor.
            ValueError: a loss that is no scalar, NaN or Inf; nothing has changed.
        """
        check_everywhere("next_loss", next_loss, ())
        share = next_loss.detach() / sum_over_ranks(torch.ones_like(next_loss.detach()))
        losses = torch.stack([*self._losses, sum_over_ranks(share)])
        ones = losses.new_ones(len(actions.log_prob))
        gradients, examples, clipped = self._collect(actions, ones)
        pending = [*self._pending, (gradients, examples)]
        stepped = self._update(pending, next_step_loss_reward(losses).tolist())
        self._losses = [] if stepped else list(losses)
        return self._stats(-losses, stepped, clipped)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the logits: the meta-optimizer and the steps not yet applied.

        Returns:
            A new dictionary of plain tensors and data.
        """
        return {**super().state_dict(), "losses": [loss.clone() for loss in self._losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; load the policy's own state separately.

        Args:
            state: of an updater of the same kind and settings, for a policy of the same sizes.

        Raises:
            ValueError: the state does not fit; nothing has changed.
        """
        losses = [loss.clone() for loss in state.get("losses", [])]
        if len(losses) != len(state["pending"]):
            raise ValueError("state holds another number of losses than of steps")
        super().load_state_dict(state)
        self._losses = losses
