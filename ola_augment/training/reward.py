"""Rewards: what an example's augmentation earns (equation 1 and the next-step loss)."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ola_augment.training.ranks import sum_over_ranks

#: From alignments (B,), and norms (B,) where it has a parameter of that name, to rewards (B,).
Reward = Callable[..., Tensor]


def gradient_alignment_reward(alignments: Tensor) -> Tensor:
    """GAR: alignments, normalised within the batch to mean 0 and standard deviation 1.

    Equation 1 is the alignment itself, r_i = <grad l_i(theta_t), grad L(theta_{t+1})>; see
    :class:`~ola_augment.alignment.GradientAlignment`. Under ``torch.distributed`` the batch is
    that of all ranks.

    Args:
        alignments: (B,), finite.

    Returns:
        (B,), zeros if all alignments are equal (a batch of one included).
    """
    return normalize(alignments)


def cosine_reward(alignments: Tensor, norms: Tensor) -> Tensor:
    """Normalised cosines between the examples' gradients and the reference gradient.

    An example whose gradient is large does not weigh more for it. The norm of the reference
    gradient is the same for all and cancels.

    Args:
        alignments: (B,), finite.
        norms: (B,), norms of the examples' gradients, 0 or more.

    Returns:
        (B,); an example without a gradient counts as a cosine of 0.
    """
    cosines = torch.where(norms > 0, alignments / norms, torch.zeros_like(alignments))
    return normalize(cosines)


def takes_norms(reward: Reward) -> bool:
    """Whether a reward needs the norms of the examples' gradients."""
    if not callable(reward):
        raise TypeError(f"reward must be a function of alignments, got {type(reward).__name__}")
    return "norms" in inspect.signature(reward).parameters


def next_step_loss_reward(next_losses: Tensor) -> Tensor:
    """NSLR: minus the next step's loss, one reward a step, normalised over the steps given.

    Args:
        next_losses: (T,), L(theta_{t+1}) of T steps, finite.

    Returns:
        (T,), zeros if all losses are equal.
    """
    return normalize(-next_losses)


def normalize(values: Tensor) -> Tensor:
    """Shift and scale to mean 0 and (population) standard deviation 1, over all ranks.

    Values that differ by rounding alone count as equal and give zeros.

    Args:
        values: (B,) floating, finite.

    Returns:
        (B,) of the same dtype.
    """
    exact = values.detach().double()
    sums = torch.stack((exact.new_tensor(float(len(exact))), exact.sum(), (exact**2).sum()))
    count, total, squares = sum_over_ranks(sums).unbind()
    centered = exact - total / count
    std = (sum_over_ranks((centered**2).sum()) / count).sqrt()
    size = (squares / count).sqrt()
    rounding = 4 * torch.finfo(values.dtype).eps * size
    scaled: Tensor = centered / torch.where(std > rounding, std, torch.inf)
    return scaled.to(values.dtype)
