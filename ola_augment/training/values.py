"""Values: what each operation and magnitude is worth, and how sure that is."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ola_augment.actions import Actions, check_actions
from ola_augment.policy import OLAPolicy, check_strength
from ola_augment.training.estimates import Values, trusted_share
from ola_augment.training.given import are_counts
from ola_augment.training.policy_gradient import UpdateStats, refuse_frozen
from ola_augment.training.ranks import own_policy, sum_over_ranks
from ola_augment.training.reward import Reward, checked_rewards, cosine_reward, takes_norms

#: Functions of the magnitude: constant, linear, quadratic; orthonormal over [-1, 1].
_DEGREES = 3


class ValueUpdater:
    """Learns by estimates of what an operation is worth, instead of REINFORCE.

    Beyond the paper. Rewards are explained by the operations that an image got,

        r_i = mean + sum over the applied slots s of v(a_s, k_s) + noise,

    with v(a, k) quadratic in the magnitude bin k, by ridge regression over all examples so far, a
    step counting ``decay`` times the one after it. With v(a) the mean over bins, estimates and
    their standard deviations give

        t(a) = (v(a) - mean v) / std,    t(a, k) = (v(a, k) - v(a)) / std,
        p(a), p(k | a) proportional to exp(scale * limit * tanh(t / limit)):

    an operation, and then a magnitude, is drawn the more often the surer it is better than the
    others. No operation dies: what was bad is still tried, and may become good. Draws under older
    logits, as those of DataLoader workers, need no importance weights.

    Args:
        policy: an :class:`OLAPolicy` with a ``strength``.
        decay: of a step's weight in (0, 1]; 0.997 forgets over some 300 steps.
        scale: of the logits, positive.
        limit: on t, positive: probabilities of operations differ by a factor of at most
            exp(2 scale limit), and so do those of an operation's magnitudes.
        explore: leave the logits as they are until :meth:`commit`. What is drawn by values is seen
            more often and so memorised sooner, and then it is worth less: values of draws
            that do not depend on them can be compared.
        prior: examples' worth of belief that all are worth the same, positive.
        shrink: trust the t-values as far as they differ more than chance would have it. The largest
            of 19 is 2 though all operations are alike, and exp(2) is 7. With tau^2 = mean t^2 - 1,
            not below 0, all are multiplied by tau^2 / (1 + tau^2) (James and Stein, 1961), those
            of operations and those of magnitudes each by their own.
        reward: of the examples of a batch: ``reward(alignments)``, or ``reward(alignments, norms)``
            with the norms of their gradients, all (B,).

    Attributes:
        steps: batches that were learned from.
        examples: in them, over all ranks.

    Raises:
        TypeError: another kind of policy, or a reward that is no function.
        ValueError: a policy without ``strength``, or a number out of range.

    Example:
        >>> policy = OLAPolicy(strength=1.5)
        >>> updater = ValueUpdater(policy)
        >>> updater.step(policy.sample(8), torch.randn(8), norms=torch.ones(8)).stepped
        True
    """

    #: Examples are rewarded one by one.
    per_example: ClassVar[bool] = True

    def __init__(
        self,
        policy: OLAPolicy,
        *,
        decay: float = 0.997,
        scale: float = 1.0,
        limit: float = 4.0,
        prior: float = 10.0,
        explore: bool = False,
        shrink: bool = False,
        reward: Reward = cosine_reward,
    ) -> None:
        check_strength(policy)
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay}")
        for name, value in (("scale", scale), ("limit", limit), ("prior", prior)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.takes_norms = takes_norms(reward)
        self.reward = reward
        self.policy = policy
        self.decay = decay
        self.scale = scale
        self.limit = limit
        self.prior = prior
        self.explores = explore
        self.shrink = shrink
        self.steps = 0
        self.examples = 0
        operations, bins = policy.space.operations, policy.space.num_magnitude_bins
        basis = torch.linspace(-1, 1, bins, dtype=torch.float64, device="cpu")
        basis = torch.stack(
            (torch.ones_like(basis), basis * 3**0.5, (3 * basis**2 - 1) / 2 * 5**0.5), dim=1
        )
        constant = basis * torch.tensor([1.0, 0.0, 0.0], device="cpu")
        # (A, K, 3): an operation without magnitude is worth the same in every bin.
        self._basis = torch.stack(
            [constant if operation.low is None else basis for operation in operations]
        )
        size = len(operations) * _DEGREES
        # Row (a, k) is the features of an example that gets a with bin k.
        rows = torch.zeros(
            len(operations), bins, len(operations), _DEGREES, dtype=torch.float64, device="cpu"
        )
        rows[range(len(operations)), :, range(len(operations))] = self._basis
        rows = rows.view(len(operations), bins, size)
        self._operation_rows = rows.mean(1) - rows.mean((0, 1))
        self._magnitude_rows = rows - rows.mean(1, keepdim=True)
        self._precision = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        self._moment = torch.zeros(size, dtype=torch.float64, device="cpu")

    def features(self, actions: Actions) -> Tensor:
        """What an example's applied operations contribute to its reward.

        Args:
            actions: of B examples.

        Returns:
            (B, 3 A) float64.
        """
        applied = self._basis[actions.ops.clamp(min=0), actions.magnitude_bins]
        applied = applied * actions.keep[..., None]
        shape = (len(actions.ops), len(self.policy.space), _DEGREES)
        index = actions.ops.clamp(min=0)[..., None].expand(applied.shape)
        return applied.new_zeros(shape).scatter_add(1, index, applied).flatten(1)

    def values(self) -> Values:
        """The estimates so far.

        Returns:
            Of all operations and bins; before the first step all are worth 0.
        """
        prior = self.prior * torch.eye(len(self._moment), dtype=torch.float64, device="cpu")
        covariance = torch.linalg.inv(self._precision + prior)
        weights = covariance @ self._moment

        def estimate(rows: Tensor) -> tuple[Tensor, Tensor]:
            variance = ((rows @ covariance) * rows).sum(-1)
            return rows @ weights, variance.clamp(min=0).sqrt()

        return Values(*estimate(self._operation_rows), *estimate(self._magnitude_rows))

    def told_apart(self) -> float:
        """How sure it is that operations differ in value.

        Returns:
            The share, in [0, 1), of how far their estimates differ that chance does not explain.
        """
        return trusted_share(self.values().operation_t)

    def step(
        self, actions: Actions, alignments: Tensor, norms: Tensor | None = None
    ) -> UpdateStats:
        """Learn from the rewards of one augmented batch and set the policy's logits.

        Args:
            actions: of B examples.
            alignments: (B,) floating, <grad l_i, g>.
            norms: (B,) floating, ``|grad l_i|``, for rewards that take them.

        Returns:
            What the call did; ``stepped`` is False while it explores.

        Raises:
            TypeError: alignments or norms that are no floating-point tensor.
            ValueError: alignments, norms or rewards of another shape than (B,), or NaN or Inf among
                them, or actions of another policy; nothing has changed.
            RuntimeError: the policy is frozen.
        """
        refuse_frozen((self.policy.keep_logits, self.policy.magnitude_logits))
        own_policy(self.policy)
        rewards = checked_rewards(self.reward, len(actions.log_prob), alignments, norms)
        check_actions(actions, self.policy.space, len(rewards))
        rewards = rewards.detach().double()
        features = self.features(actions).to(rewards.device)
        count = sum_over_ranks(rewards.new_tensor(float(len(rewards))))
        features = features - sum_over_ranks(features.sum(0)) / count
        squares = sum_over_ranks(features.T @ features).cpu()
        precision = self.decay * self._precision + squares
        moment = self.decay * self._moment + sum_over_ranks(features.T @ rewards).cpu()
        before = self._precision, self._moment
        self._precision, self._moment = precision, moment
        self.steps, self.examples = self.steps + 1, self.examples + int(count)
        try:
            if not self.explores:
                self._set_logits()
        except BaseException:
            self._precision, self._moment = before
            self.steps, self.examples = self.steps - 1, self.examples - int(count)
            raise
        with torch.no_grad():
            entropy = float(self.policy.entropy())
        spread = float(alignments.std(correction=0))
        return UpdateStats(float(alignments.mean()), spread, entropy, stepped=not self.explores)

    def commit(self) -> None:
        """End the exploration: draw by what was learned, now and after every later step.

        Raises:
            RuntimeError: the policy is frozen.
        """
        refuse_frozen((self.policy.keep_logits, self.policy.magnitude_logits))
        self._set_logits()
        self.explores = False

    def _set_logits(self) -> None:
        values = self.values()
        chosen = self._bounded(values.operation_t)
        kept = 0.5 * (chosen - chosen.max()).exp()  # the best is kept as often as at the start
        magnitudes = self._bounded(values.magnitude_t)
        with torch.no_grad():
            self.policy.keep_logits.copy_(kept.logit())
            self.policy.magnitude_logits.copy_(magnitudes)

    def _bounded(self, t: Tensor) -> Tensor:
        if self.shrink:
            t = t * trusted_share(t)
        return self.scale * self.limit * (t / self.limit).tanh()

    def state_dict(self) -> dict[str, Any]:
        """What was learned, beside the logits.

        Returns:
            A new dictionary of plain tensors and data.
        """
        return {
            "kind": type(self).__name__,
            "explores": self.explores,
            "precision": self._precision.clone(),
            "moment": self._moment.clone(),
            "steps": self.steps,
            "examples": self.examples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; load the policy's own state separately.

        Args:
            state: of a ValueUpdater for a policy over as many operations.

        Raises:
            ValueError: the state is of another kind of updater, of another size, or not finite;
                nothing has changed.
        """
        kind = type(self).__name__
        if state.get("kind") != kind:
            raise ValueError(f"state is of a {state.get('kind')}, this is a {kind}")
        explores = state.get("explores")
        if not isinstance(explores, bool):
            raise ValueError(f"state's explores must be a bool, got {explores!r}")
        counts = [state.get("steps"), state.get("examples")]
        if not are_counts(*counts):
            raise ValueError(f"state is damaged: counts {counts}")
        for name, own in (("precision", self._precision), ("moment", self._moment)):
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != own.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"state's {name} must have shape {tuple(own.shape)}, got {shape}")
            if not value.isfinite().all():
                raise ValueError(f"state's {name} holds NaN or Inf")
        self._precision = state["precision"].to("cpu", torch.float64, copy=True)
        self._moment = state["moment"].to("cpu", torch.float64, copy=True)
        self.explores = explores
        self.steps, self.examples = state["steps"], state["examples"]
