"""The policy that learns (Algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.draw import LogProbs, log_one_hot
from ola_augment.logits import zero_logits
from ola_augment.policy.base import Policy, depends_on_logits_alone
from ola_augment.space import SearchSpace, named_space


class OLAPolicy(Policy):
    """The learned policy of Algorithm 2; uniform at the start, all logits 0.

    With ``strength`` it learns which operations, not how many: an operation that is dropped in
    Algorithm 2 is drawn again, so that operation a fills a slot with probability
    sigmoid(l_d[a]) / sum_b sigmoid(l_d[b]), and each of the ``max_ops`` slots is applied with
    probability ``strength / max_ops``, an operation at most once. A good operation can so reach
    every image; in Algorithm 2 it reaches those it is drawn for.

    Args:
        space: a :class:`SearchSpace` or its name.
        max_ops: largest number of operations for one image; None is 4, or all of a smaller space.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.
        strength: expected number of applied operations an image, 0 .. ``max_ops``, those that are
            drawn again counted too; it can be changed later. None learns it, as the paper does.

    Attributes:
        num_ops_logits: (max_ops,) l_r, of 1 .. max_ops operations; only without ``strength``.
        keep_logits: (A,) l_d; an operation is kept with probability sigmoid(l_d).
        magnitude_logits: (A, K) l_k.

    Raises:
        ValueError: ``strength`` out of range.
        TypeError: ``strength`` is no number.

    Example:
        >>> policy = OLAPolicy("wide_long")
        >>> actions = policy.sample(8)
        >>> policy.log_prob(actions).shape
        torch.Size([8])
        >>> OLAPolicy("wide_long", strength=1.5).strength
        1.5

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    def __init__(
        self,
        space: str | SearchSpace = "wide_long",
        max_ops: int | None = None,
        num_magnitude_bins: int = 31,
        strength: float | None = None,
    ) -> None:
        space = named_space(space, num_magnitude_bins)
        if max_ops is None:
            max_ops = 4 if strength is not None else min(4, len(space))
        super().__init__(space, max_ops, replacement=strength is not None, once=True)
        size, bins = len(self.space), self.space.num_magnitude_bins
        if strength is None:
            self.num_ops_logits = zero_logits(max_ops)
        else:
            # Beside the logits, where workers see it change and files keep it.
            self.expected_ops = zero_logits(requires_grad=False)
            self.strength = strength
        self.keep_logits = zero_logits(size)
        self.magnitude_logits = zero_logits(size, bins)

    @property
    def strength(self) -> float | None:
        """Expected number of applied operations an image, 0 .. ``max_ops``; None: it is learned.

        It can be set, in a policy that was made with one.

        Raises:
            TypeError: set to something that is no number.
            ValueError: set to a number out of range.
            AttributeError: set in a policy that learns it.
        """
        return float(self.expected_ops) if "expected_ops" in self.named_logits() else None

    @strength.setter
    def strength(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"strength must be a number, got {value!r}")
        if "expected_ops" not in self.named_logits():
            raise AttributeError(
                "this policy learns its strength; make an OLAPolicy(strength=...) to set it"
            )
        if not 0 <= value <= self.max_ops:
            raise ValueError(f"strength must lie in 0 .. max_ops = {self.max_ops}, got {value}")
        with torch.no_grad():
            self.expected_ops.fill_(float(value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        value = state_dict.get(f"{prefix}expected_ops")
        fits = not isinstance(value, Tensor) or value.dim() or 0 <= float(value) <= self.max_ops
        if not fits:
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}expected_ops must lie in 0 .. {self.max_ops}, got {value}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def requires_grad_(self, requires_grad: bool = True) -> OLAPolicy:
        """Freeze or unfreeze the logits; the strength is not learned by gradients.

        Args:
            requires_grad: False freezes them.

        Returns:
            The policy itself.
        """
        super().requires_grad_(requires_grad)
        if "expected_ops" in self.named_logits():
            self.expected_ops.requires_grad_(False)
        return self

    def arguments(self) -> dict[str, Any]:
        """Arguments that make such a policy again, without space; for files and ``repr``.

        Returns:
            Argument name -> JSON value.
        """
        strength = self.strength
        return {"max_ops": self.max_ops} | ({} if strength is None else {"strength": strength})

    @depends_on_logits_alone
    def log_probs(self) -> LogProbs:
        """Tables of Algorithm 2: softmax(l_r), sigmoid(l_d), softmax(l_k).

        Returns:
            The tables, differentiable in the logits; with a strength, ``ops`` too.
        """
        # Copies: another process may write the logits between two reads of them.
        keep = self.keep_logits.clone()
        magnitude = F.log_softmax(self.magnitude_logits.clone(), dim=1)
        strength = self.strength
        if strength is None:
            num_ops = F.log_softmax(self.num_ops_logits.clone(), dim=0)
            return LogProbs(num_ops, F.logsigmoid(keep), F.logsigmoid(-keep), magnitude)
        applied = torch.full_like(keep, strength / self.max_ops)
        return LogProbs(
            num_ops=log_one_hot(self.max_ops - 1, self.max_ops).to(keep.dtype),
            keep=applied.log(),
            drop=torch.log1p(-applied),
            magnitude=magnitude,
            ops=F.log_softmax(F.logsigmoid(keep), dim=0),
        )


def check_strength(policy: object) -> None:
    """Refuse a policy without a given strength.

    Raises:
        TypeError: no :class:`OLAPolicy`.
        ValueError: one that learns its strength.
    """
    if not isinstance(policy, OLAPolicy):
        raise TypeError(f"policy must be an OLAPolicy, got {type(policy).__name__}")
    if policy.strength is None:
        raise ValueError(
            "policy learns its strength, here it must be given: OLAPolicy(strength=...) or "
            "OLAAugment(strength=...)"
        )
