"""Updaters: rewards move the logits of a policy (equation 3)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ola_augment.training.reward import (
    gradient_alignment_reward,
    next_step_loss_reward,
    sum_over_ranks,
)

ActionsT = TypeVar("ActionsT", contravariant=True)


class LearnablePolicy(Protocol[ActionsT]):
    """What an updater needs of a policy; :class:`OLAPolicy` and :class:`SplitPolicy` have it."""

    def log_prob(self, actions: ActionsT) -> Tensor:
        """(B,), differentiable in the parameters."""

    def entropy(self) -> Tensor:
        """Differentiable scalar."""

    def parameters(self) -> Any:
        """Logits, as of an ``nn.Module``; not called if there is a ``named_logits()``."""


class UpdateStats(NamedTuple):
    """What one call of ``step`` did, as Python numbers for logging.

    Attributes:
        reward_mean: mean of the raw rewards, before normalisation.
        reward_std: their (population) standard deviation.
        entropy: of the policy after the call, in nats.
        stepped: whether the logits moved (every ``accumulate`` calls).
    """

    reward_mean: float
    reward_std: float
    entropy: float
    stepped: bool


class _PolicyGradient:
    """REINFORCE on a policy: adds up gradients and hands them to the meta-optimizer."""

    def __init__(
        self,
        policy: LearnablePolicy[Any],
        lr: float = 0.1,
        accumulate: int = 1,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        entropy_weight: float = 0.0,
    ) -> None:
        named = policy.named_logits() if hasattr(policy, "named_logits") else None
        candidates = policy.parameters() if named is None else named.values()
        self._logits = [logits for logits in candidates if logits.requires_grad]
        if not self._logits:
            raise ValueError(
                f"policy {type(policy).__name__} has no logits to learn; use OLAPolicy, "
                "SplitPolicy or a policy with trainable logits"
            )
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be an int of at least 1, got {accumulate!r}")
        if optimizer is None and not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not entropy_weight >= 0:
            raise ValueError(f"entropy_weight must be 0 or more, got {entropy_weight}")
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if lost := sum(id(logits) not in held for logits in self._logits):
                raise ValueError(
                    f"optimizer must hold the policy's logits, {lost} of {len(self._logits)} are "
                    "missing; make it over policy.named_logits().values()"
                )
        self.policy = policy
        self.accumulate = accumulate
        self.entropy_weight = entropy_weight
        self.optimizer = optimizer or torch.optim.Adam(self._logits, lr=lr)
        # One entry per step since the last update: its gradient for every logits tensor.
        self._pending: list[list[Tensor]] = []

    def _collect(self, actions: Any, rewards: Tensor) -> None:
        """Keep the gradient of the batch mean of r_i log p(a_i); rewards are constants."""
        _check_finite("actions.log_prob", actions.log_prob, (len(rewards),))
        log_prob = self.policy.log_prob(actions)
        # exp(log p - log p_behaviour) is 1 when the actions were drawn under today's logits, and
        # its gradient is then that of log p; for older actions it is the importance weight.
        weights = (log_prob - actions.log_prob.to(log_prob)).exp()
        examples = sum_over_ranks(torch.tensor(float(len(rewards)), device=rewards.device))
        objective = (rewards.to(log_prob) * weights).sum() / examples.to(log_prob)
        gradients = torch.autograd.grad(objective, self._logits, materialize_grads=True)
        self._pending.append(
            [sum_over_ranks(gradient.to(rewards.device)).to(gradient) for gradient in gradients]
        )

    def _step_if_due(self, weights: Tensor) -> bool:
        """Move the logits along the mean of the collected gradients, weighted per step."""
        if len(self._pending) < self.accumulate:
            return False
        ascents = [
            sum(weight * gradient for weight, gradient in zip(weights.tolist(), steps, strict=True))
            / self.accumulate
            for steps in zip(*self._pending, strict=True)
        ]
        if self.entropy_weight:
            bonus = torch.autograd.grad(self.policy.entropy(), self._logits, materialize_grads=True)
            ascents = [a + self.entropy_weight * b for a, b in zip(ascents, bonus, strict=True)]
        for logits, ascent in zip(self._logits, ascents, strict=True):
            logits.grad = -ascent
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._pending.clear()
        return True

    def _stats(self, raw: Tensor, stepped: bool) -> UpdateStats:
        with torch.no_grad():
            entropy = float(self.policy.entropy())
        return UpdateStats(float(raw.mean()), float(raw.std(correction=0)), entropy, stepped)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the logits: the meta-optimizer and the steps not yet applied."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "pending": [[gradient.clone() for gradient in step] for step in self._pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; load the policy's own state separately.

        Raises:
            ValueError: the state belongs to a policy of other sizes; nothing has changed.
        """
        expected = [tuple(logits.shape) for logits in self._logits]
        for step in state["pending"]:
            if (shapes := [tuple(gradient.shape) for gradient in step]) != expected:
                raise ValueError(f"state is for logits of {shapes}, the policy has {expected}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._pending = [[gradient.clone() for gradient in step] for step in state["pending"]]


class GARUpdater(_PolicyGradient):
    """Gradient-alignment reward: one reward per example (equations 1 and 3).

    The objective, maximised, is the batch mean of r_i log p(a_i; phi), with rewards normalised
    within the batch. The defaults are the paper's. Under ``torch.distributed`` batch and gradient
    are those of all ranks, so that the logits stay equal.

    Args:
        policy: anything with ``log_prob(actions)``, ``entropy()`` and ``named_logits()`` (or, as
            other modules have, ``parameters()``).
        lr: of the meta-optimizer, Adam; 0.03 did as well and saturates later (docs/results.md).
        accumulate: calls of :meth:`step` whose gradients are averaged for one update.
        optimizer: over ``policy.named_logits().values()``, instead of Adam; ``lr`` is then ignored.
        entropy_weight: beyond the paper: adds this times the policy's entropy to the objective.

    Raises:
        ValueError: a policy without trainable logits, an optimizer without them, or a number out
            of range.
    """

    def step(self, actions: Any, alignments: Tensor) -> UpdateStats:
        """Reward the actions of one augmented batch.

        Args:
            actions: of B examples, with the ``log_prob`` they were drawn with.
            alignments: (B,), <grad l_i(theta_t), grad L(theta_{t+1})>.

        Raises:
            TypeError: alignments that are no floating-point tensor.
            ValueError: alignments of another shape than (B,), or NaN or Inf among them; the
                logits and the gradients added up so far are untouched.
        """
        _check_finite("alignments", alignments, (len(actions.log_prob),))
        if not len(alignments):
            raise ValueError("alignments must hold at least one example, got none")
        self._collect(actions, gradient_alignment_reward(alignments))
        return self._stats(alignments, self._step_if_due(torch.ones(self.accumulate)))


class NSLRUpdater(_PolicyGradient):
    """Next-step loss reward: one reward, minus the next loss, for a whole batch.

    Unbiased with high variance; the paper's reason for GAR. A lone reward cannot be normalised,
    so the rewards of ``accumulate`` steps are normalised together and make one update.

    Args:
        policy: as for :class:`GARUpdater`.
        lr: of the meta-optimizer, Adam.
        accumulate: steps that make one update, at least 2.
        optimizer: over ``policy.named_logits().values()``, instead of Adam; ``lr`` is then ignored.
        entropy_weight: beyond the paper: adds this times the policy's entropy to the objective.

    Raises:
        ValueError: a policy without trainable logits, an optimizer without them, or a number out
            of range.
    """

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
            next_loss: scalar, L(theta_{t+1}) on the batch after the update.

        Raises:
            TypeError: a loss that is no floating-point tensor.
            ValueError: a loss that is no scalar, NaN or Inf; nothing has changed.
        """
        _check_finite("next_loss", next_loss, ())
        share = next_loss.detach() / sum_over_ranks(torch.ones_like(next_loss.detach()))
        loss = sum_over_ranks(share)
        self._collect(actions, torch.ones(len(actions.log_prob), device=loss.device))
        self._losses.append(loss)
        losses = torch.stack(self._losses)
        stepped = self._step_if_due(next_step_loss_reward(losses))
        if stepped:
            self._losses.clear()
        return self._stats(-losses, stepped)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the logits: the meta-optimizer and the steps not yet applied."""
        return {**super().state_dict(), "losses": [loss.clone() for loss in self._losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; load the policy's own state separately."""
        super().load_state_dict(state)
        self._losses = [loss.clone() for loss in state["losses"]]


def _check_finite(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or Inf of {values.numel()}")
