"""What the tables of a policy must be, whatever made them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ola_augment.draw import LogProbs
from ola_augment.space import SearchSpace


def checked_tables(
    log_probs: LogProbs, max_ops: int, space: SearchSpace, replacement: bool
) -> LogProbs:
    """The tables, if they are of the right kind and shape.

    Raises:
        TypeError, ValueError: as said, by name.
    """
    if not isinstance(log_probs, LogProbs):
        raise TypeError(f"log_probs() must return LogProbs, got {type(log_probs).__name__}")
    size, bins = len(space), space.num_magnitude_bins
    if log_probs.ops is not None and not replacement:
        raise ValueError("log_probs().ops is for policies that draw with replacement=True")
    shapes = ((max_ops,), (size,), (size,), (size, bins), (size,))
    for name, table, shape in zip(LogProbs._fields, log_probs, shapes, strict=True):
        if name == "ops" and table is None:
            continue
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"log_probs().{name} must be a floating-point tensor")
        if table.shape != shape:
            raise ValueError(
                f"log_probs().{name} must have shape {shape}, got {tuple(table.shape)}"
            )
    return log_probs


def check_probabilities(log_probs: LogProbs, policy: str) -> None:
    """Refuse tables that would lead a draw out of the space.

    Raises:
        ValueError: some do not add up to 1.
    """
    probs = {
        name: table.double().exp().numpy()
        for name, table in log_probs._asdict().items()
        if table is not None
    }
    totals = {name: table.sum(-1) for name, table in probs.items() if name != "drop"}
    totals["keep"] = probs["keep"] + probs["drop"]
    for name, total in totals.items():
        # Not tighter: logits that move meanwhile in another process tear the tables a little.
        if not (np.abs(total - 1) < 0.5).all():
            raise ValueError(
                f"log_probs().{name} of {policy} must be log-probabilities that "
                f"add up to 1, got {np.ravel(total).tolist()}; are the logits finite?"
            )


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy over the last axis; an impossible outcome (-inf) adds 0."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(finite.exp() * finite).sum(-1)
