"""REINFORCE (equation 3): rewards move the logits of a policy, all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ola_augment.training.given import check_count
from ola_augment.training.ranks import own_policy, sum_over_ranks, sums_over_ranks
from ola_augment.training.reward import check_finite

#: Largest importance weight of an example drawn under other logits than today's.
MAX_WEIGHT = 10.0

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
        clipped: share of this rank's examples whose importance weight was cut to 10.

    Example:
        >>> UpdateStats(reward_mean=0.1, reward_std=1.0, entropy=12.0, stepped=True).clipped
        0.0
    """

    reward_mean: float
    reward_std: float
    entropy: float
    stepped: bool
    clipped: float = 0.0


class PolicyGradient:
    """REINFORCE on a policy: adds up gradients and hands them to the meta-optimizer.

    A step is all or nothing: whatever is raised in it, Ctrl-C included, leaves logits,
    meta-optimizer and accumulated steps as they were.
    """

    #: Whether examples are rewarded one by one (by alignments), or a batch as a whole.
    per_example: ClassVar[bool] = True

    def __init__(
        self,
        policy: LearnablePolicy[Any],
        lr: float,
        accumulate: int,
        *,
        optimizer: torch.optim.Optimizer | None,
        entropy_weight: float,
    ) -> None:
        own_policy(policy)
        named = policy.named_logits() if hasattr(policy, "named_logits") else None
        candidates = list(policy.parameters() if named is None else named.values())
        self._logits = [logits for logits in candidates if logits.requires_grad]
        if candidates and not self._logits:
            raise ValueError(
                f"policy {type(policy).__name__} is frozen; policy.requires_grad_() lets its "
                "logits learn again"
            )
        if not self._logits:
            raise ValueError(
                f"policy {type(policy).__name__} has no logits to learn; use OLAPolicy, "
                "SplitPolicy or a policy with trainable logits"
            )
        check_count("accumulate", accumulate, 1)
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
        # One entry per step since the last update: its gradient for every logits tensor, the mean
        # over its examples, and their number.
        self._pending: list[tuple[list[Tensor], float]] = []

    def _collect(self, actions: Any, rewards: Tensor) -> tuple[list[Tensor], float, float]:
        """Gradient of the batch mean of r_i log p(a_i), examples, share of clipped weights."""
        refuse_frozen(self._logits)
        own_policy(self.policy)
        check_finite("actions.log_prob", actions.log_prob, (len(rewards),))
        log_prob = self.policy.log_prob(actions)
        # exp(log p - log p_behaviour) is 1 when the actions were drawn under today's logits, and
        # its gradient is then that of log p; for older actions it is the importance weight. That
        # overflows where the logits have moved far; cut, the example still pulls, by no more.
        exact = (log_prob.detach() - actions.log_prob.to(log_prob)).exp()
        weights = exact.clamp(max=MAX_WEIGHT)
        count = torch.tensor(len(rewards), dtype=torch.float32, device=rewards.device)
        examples = sum_over_ranks(count)
        objective = (rewards.to(log_prob) * weights * log_prob).sum() / examples.to(log_prob)
        gradients = torch.autograd.grad(objective, self._logits, materialize_grads=True)
        sums = sums_over_ranks([gradient.to(rewards.device) for gradient in gradients])
        summed = [found.to(own) for found, own in zip(sums, gradients, strict=True)]
        if not all(bool(gradient.isfinite().all()) for gradient in summed):
            raise ValueError("the gradient of actions.log_prob is NaN or Inf; nothing has changed")
        clipped = float((exact > MAX_WEIGHT).float().mean()) if len(rewards) else 0.0
        return summed, float(examples), clipped

    def _update(self, pending: list[tuple[list[Tensor], float]], weights: list[float]) -> bool:
        """Move the logits if enough steps are pending; weighted, and by their examples."""
        if len(pending) < self.accumulate:
            self._pending = pending
            return False
        examples = sum(count for _, count in pending)
        ascents = [
            sum(
                weight * (count / examples) * gradients[index]
                for weight, (gradients, count) in zip(weights, pending, strict=True)
            )
            for index in range(len(self._logits))
        ]
        if self.entropy_weight:
            bonus = torch.autograd.grad(self.policy.entropy(), self._logits, materialize_grads=True)
            ascents = [a + self.entropy_weight * b for a, b in zip(ascents, bonus, strict=True)]
        logits_before = [logits.detach().clone() for logits in self._logits]
        optimizer_before = copy.deepcopy(self.optimizer.state_dict())
        try:
            for logits, ascent in zip(self._logits, ascents, strict=True):
                logits.grad = -ascent
            self.optimizer.step()
            if not all(bool(logits.isfinite().all()) for logits in self._logits):
                raise ValueError("the meta-optimizer made logits NaN or Inf; nothing has changed")
            self._pending = []
        except BaseException:
            with torch.no_grad():
                for logits, value in zip(self._logits, logits_before, strict=True):
                    logits.copy_(value)
            self.optimizer.load_state_dict(optimizer_before)
            raise
        finally:
            for logits in self._logits:
                logits.grad = None
        return True

    def _stats(self, raw: Tensor, stepped: bool, clipped: float) -> UpdateStats:
        with torch.no_grad():
            entropy = float(self.policy.entropy())
        return UpdateStats(
            float(raw.mean()), float(raw.std(correction=0)), entropy, stepped, clipped
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the logits: the meta-optimizer and the steps not yet applied.

        Returns:
            A new dictionary of plain tensors and data.
        """
        return {
            "kind": type(self).__name__,
            "accumulate": self.accumulate,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "pending": [[gradient.clone() for gradient in step] for step, _ in self._pending],
            "examples": [count for _, count in self._pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; load the policy's own state separately.

        Args:
            state: of an updater of the same kind and settings, for a policy of the same sizes.

        Raises:
            ValueError: the state belongs to a policy of other sizes, another kind of updater or
                meta-optimizer, or is not finite; nothing has changed.
        """
        kind = type(self).__name__
        if state.get("kind", kind) != kind:
            raise ValueError(f"state is of a {state['kind']}, this is a {kind}")
        if len(state["pending"]) >= self.accumulate:
            raise ValueError(
                f"state holds {len(state['pending'])} steps, this updater accumulates "
                f"{self.accumulate}"
            )
        expected = [tuple(logits.shape) for logits in self._logits]
        for step in state["pending"]:
            if (shapes := [tuple(gradient.shape) for gradient in step]) != expected:
                raise ValueError(f"state is for logits of {shapes}, the policy has {expected}")
        examples = state.get("examples", [])
        if len(examples) != len(state["pending"]):
            raise ValueError("state counts the examples of other steps than it holds")
        self._check_optimizer_state(state["optimizer"])
        if not all(
            bool(gradient.isfinite().all()) for step in state["pending"] for gradient in step
        ):
            raise ValueError("state holds gradients that are NaN or Inf")
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._pending = [
            ([gradient.clone() for gradient in step], float(count))
            for step, count in zip(state["pending"], examples, strict=True)
        ]

    def _check_optimizer_state(self, state: dict[str, Any]) -> None:
        """Torch takes moments of any shape and fails a step later."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        if [len(group["params"]) for group in state["param_groups"]] != groups:
            raise ValueError(f"state is of a meta-optimizer with other groups than {groups}")
        if {*self.optimizer.param_groups[0]} - {"params"} - {*state["param_groups"][0]}:
            raise ValueError("state is of another kind of meta-optimizer")
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if not isinstance(value, Tensor):
                    continue
                if value.dim() and value.shape != parameters[index].shape:
                    raise ValueError(
                        f"state is for logits of {tuple(value.shape)} ({name}), the policy has "
                        f"{tuple(parameters[index].shape)}"
                    )
                if not value.isfinite().all():
                    raise ValueError(f"state of the meta-optimizer holds NaN or Inf in {name}")


def refuse_frozen(logits: Iterable[Tensor]) -> None:
    """Refuse to move logits that were frozen since."""
    if not all(entry.requires_grad for entry in logits):
        raise RuntimeError(
            "the policy is frozen, its logits do not learn; policy.requires_grad_() lets them "
            "learn again, OLALearner passes over a frozen policy"
        )
