"""Random numbers of its own for every rank of ``torch.distributed`` and every worker."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

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


class SharedGenerator:
    """A user's generator, the same one for all who were given it: also in workers and in copies.

    Pickled or copied together they keep one generator in common, as each pickle and copy holds one
    object once.

    Args:
        generator: on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._in_worker: torch.Generator | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes: as a tensor its state would travel to a spawned worker in shared memory that its
        # sender frees too early.
        return _restored, (self.generator.get_state().numpy().tobytes(),)

    def in_worker(self, seed: int) -> torch.Generator:
        """What a DataLoader worker draws from instead, made when it first draws.

        Args:
            seed: the worker's own.
        """
        if self._in_worker is None:
            mixed = (self.generator.initial_seed() ^ seed) % 2**63
            self._in_worker = torch.Generator().manual_seed(mixed)
        return self._in_worker


def shared(generator: torch.Generator) -> SharedGenerator:
    """The one :class:`SharedGenerator` of a generator, for as long as somebody holds it."""
    found = _SHARED.get(id(generator))
    if found is None:
        found = _SHARED[id(generator)] = SharedGenerator(generator)
    return found


#: By the id of their generators, which nothing else can have while they are held.
_SHARED: WeakValueDictionary[int, SharedGenerator] = WeakValueDictionary()


def _restored(state: bytes) -> torch.Generator:
    saved = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return torch.Generator().set_state(saved)
