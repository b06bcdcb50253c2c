"""Random numbers of its own for every rank of ``torch.distributed``."""

from __future__ import annotations

import torch
from torch import distributed as dist

# Odd, and far from small numbers: seeds of neighbouring ranks share no pattern.
_STEP = 0x9E3779B97F4A7C15


def world_size() -> int:
    """Number of ranks; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_here() -> int:
    """Of this process; 0 without ``torch.distributed``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def stream_of(generator: torch.Generator | None, rank: int) -> torch.Generator | None:
    """What a rank draws from next, where all have seeded their generators alike.

    Nothing is kept: who saves or seeds the generator has saved or seeded this as well.

    Args:
        generator: None is torch's global one.
        rank: 0 draws from the generator itself, as a single process does.

    Returns:
        A generator for the next draw.
    """
    if not rank:
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    return torch.Generator().manual_seed((seed + rank * _STEP) % 2**63)
