"""Thermostat: how much to augment, steered by how well the plain training images are fitted."""

from __future__ import annotations

import math
from typing import Any

import torch

from ola_augment.policy import OLAPolicy, check_strength
from ola_augment.training.given import are_counts
from ola_augment.training.ranks import mean_over_ranks, own_policy


class Thermostat:
    """Raises a policy's strength while the model fits its plain training images, else lowers it.

    A model that has memorised its training images has room for more augmentation, one that cannot
    even fit them for less; no first-order reward sees either. In the manner of the adaptive
    augmentation of StyleGAN2-ADA (Karras et al., 2020), with training accuracy as its heuristic.

    Args:
        policy: an :class:`OLAPolicy` with a ``strength``, which is where it starts.
        raise_above: running mean of the accuracy, in [0, 1], above which the strength rises.
        lower_below: running mean below which it falls, in [0, ``raise_above``].
        up: by how many operations an image it rises with each call, 0 or more.
        down: by how many it falls with each call, 0 or more.
        most: largest strength, 0 .. ``max_ops``; None is the policy's ``max_ops``.
        lower_after: calls before which it does not fall: any model starts with a low accuracy.
        smoothing: of the running mean, in [0, 1).

    Attributes:
        accuracy: running mean, from 0.
        calls: so far.

    Raises:
        TypeError: another kind of policy.
        ValueError: a policy without ``strength``, or a number out of range.

    Example:
        >>> policy = OLAPolicy(strength=1.0)
        >>> thermostat = Thermostat(policy, up=0.5, smoothing=0.0)
        >>> thermostat.step(accuracy=0.99)
        1.5

    References:
        `Training Generative Adversarial Networks with Limited Data
        <https://arxiv.org/abs/2006.06676>`__
    """

    def __init__(
        self,
        policy: OLAPolicy,
        *,
        raise_above: float = 0.9,
        lower_below: float = 0.4,
        up: float = 0.02,
        down: float = 0.05,
        most: float | None = None,
        lower_after: int = 0,
        smoothing: float = 0.95,
    ) -> None:
        check_strength(policy)
        if not 0 <= lower_below <= raise_above <= 1:
            raise ValueError(
                "lower_below and raise_above must be ordered and in [0, 1], got "
                f"{lower_below} and {raise_above}"
            )
        if not (up >= 0 and down >= 0):
            raise ValueError(f"up and down must be 0 or more, got {up} and {down}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        if lower_after < 0:
            raise ValueError(f"lower_after must be 0 or more, got {lower_after}")
        self.most = float(policy.max_ops) if most is None else float(most)
        if not 0 <= self.most <= policy.max_ops:
            raise ValueError(f"most must lie in 0 .. max_ops = {policy.max_ops}, got {most}")
        self.policy = policy
        self.raise_above = raise_above
        self.lower_below = lower_below
        self.up = up
        self.down = down
        self.lower_after = lower_after
        self.smoothing = smoothing
        self.accuracy = 0.0
        self.calls = 0

    def step(self, accuracy: float) -> float:
        """Take in the accuracy of one plain training batch, and move the strength.

        Args:
            accuracy: in [0, 1]; under ``torch.distributed`` the ranks' are averaged.

        Returns:
            The new strength.

        Raises:
            ValueError: no accuracy; nothing has changed.
        """
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy must lie in [0, 1], got {accuracy}")
        own_policy(self.policy)
        everywhere = float(
            mean_over_ranks(torch.tensor(float(accuracy), dtype=torch.float64, device="cpu"))
        )
        self.accuracy = self.smoothing * self.accuracy + (1 - self.smoothing) * everywhere
        self.calls += 1
        strength = self.policy.strength or 0.0
        if self.accuracy > self.raise_above:
            strength = max(strength, min(strength + self.up, self.most))
        elif self.accuracy < self.lower_below and self.calls > self.lower_after:
            strength = max(strength - self.down, 0.0)
        self.policy.strength = strength
        return strength

    def state_dict(self) -> dict[str, Any]:
        """The running mean and the number of calls; the strength is in the policy's state.

        Returns:
            A new dictionary of plain numbers.
        """
        return {"accuracy": self.accuracy, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state: of any thermostat.

        Raises:
            ValueError: not such a state; nothing has changed.
        """
        accuracy: Any = state.get("accuracy")
        calls: Any = state.get("calls")
        if not (isinstance(accuracy, float) and math.isfinite(accuracy) and 0 <= accuracy <= 1):
            raise ValueError(f"state's accuracy must lie in [0, 1], got {accuracy!r}")
        if not are_counts(calls):
            raise ValueError(f"state's calls must be an int of 0 or more, got {calls!r}")
        self.accuracy, self.calls = accuracy, calls
