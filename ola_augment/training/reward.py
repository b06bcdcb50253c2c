"""Rewards: what an example's augmentation earns (equation 1 and the next-step loss)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ola_augment.training.ranks import all_ranks, sum_over_ranks

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


def checked_rewards(
    reward: Reward, examples: int, alignments: Tensor, norms: Tensor | None
) -> Tensor:
    """Rewards (B,) of a batch; what is no finite number is refused on all ranks."""
    check_everywhere("alignments", alignments, (examples,))
    if not takes_norms(reward):
        rewards = reward(alignments)
    elif norms is None:
        raise ValueError(
            "norms are needed by this reward, got None; take them from "
            "engine.capture(norms=True), as OLALearner does"
        )
    else:
        check_everywhere("norms", norms, (examples,))
        rewards = reward(alignments, norms)
    check_everywhere("rewards", rewards, (examples,))
    return rewards


def check_everywhere(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse on all ranks what one of them refuses: a rank that goes on alone waits for ever."""
    error: Exception | None = None
    try:
        check_finite(name, values, shape)
        if not values.numel():
            raise ValueError(f"{name} must hold at least one example, got none")
    except (TypeError, ValueError) as refusal:
        error = refusal
    device = values.device if isinstance(values, Tensor) else torch.device("cpu")
    if not all_ranks(error is None, device):
        raise error or ValueError(f"another rank refused its {name}: all ranks skip this step")


def check_finite(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what are no finite floating-point numbers of a shape."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if tuple(values.shape) != shape:
        message = f"{name} must have shape {shape}, got {tuple(values.shape)}"
        passes, rest = divmod(values.numel(), max(1, math.prod(shape)))
        if name == "alignments" and values.dim() == 1 and passes > 1 and not rest:
            message += (
                f": the model was called {passes} times on the augmented examples (R-Drop, two "
                "views, an adversarial pass), and each pass has alignments of its own; capture "
                "with a GradientAlignment and give their sums, "
                f"captured.align().view({passes}, -1).sum(0), to an updater"
            )
        raise ValueError(message)
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or Inf of {values.numel()}")
