"""What is estimated of operations and of a trial, and how far such estimates are to be trusted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Values(NamedTuple):
    """What operations and magnitudes are worth, in standard deviations of an example's reward.

    Attributes:
        operation: (A,) v(a) less the mean over operations, float64.
        operation_std: (A,) standard deviations of these.
        magnitude: (A, K) v(a, k) - v(a).
        magnitude_std: (A, K) standard deviations of these, 0 for operations without magnitude.

    Example:
        >>> from ola_augment import OLAPolicy, ValueUpdater
        >>> ValueUpdater(OLAPolicy(strength=1.0)).values().operation.shape
        torch.Size([19])
    """

    operation: Tensor
    operation_std: Tensor
    magnitude: Tensor
    magnitude_std: Tensor

    @property
    def operation_t(self) -> Tensor:
        """(A,) v(a) less the mean, in standard deviations of the estimate."""
        return _t(self.operation, self.operation_std)

    @property
    def magnitude_t(self) -> Tensor:
        """(A, K) v(a, k) - v(a), likewise; 0 for operations without magnitude."""
        return _t(self.magnitude, self.magnitude_std)


class Contrast(NamedTuple):
    """What a window with augmentation takes off the held-out loss beyond one without.

    Attributes:
        effect: in nats (of cross entropy) a window; positive where augmentation helps.
        std: its standard error; NaN before there are enough windows.
        windows: that it rests on.

    Example:
        >>> Contrast(0.2, 0.1, 12).t
        2.0
    """

    effect: float
    std: float
    windows: int

    @property
    def still(self) -> bool:
        """Whether nothing changed at all, as where the model is not the one that is trained."""
        return self.effect == self.std == 0

    @property
    def t(self) -> float:
        """The effect in standard errors; NaN where there is none."""
        return self.effect / self.std if self.std > 0 else math.nan


def trusted_share(t: Tensor) -> float:
    """The share of t-values that is no noise, tau^2 / (1 + tau^2) with tau^2 = mean t^2 - 1.

    Args:
        t: any number of them; a 0 stands for what has no value, and does not count.

    Returns:
        In [0, 1); 0 where they differ no more than chance would have it.
    """
    counted = t[t != 0]
    spread = float(counted.square().mean()) - 1 if len(counted) else 0.0
    return max(spread, 0.0) / (1 + max(spread, 0.0))


def _t(mean: Tensor, std: Tensor) -> Tensor:
    return torch.where(std > 1e-9, mean / std, 0.0)  # no magnitude, no deviation from its mean
