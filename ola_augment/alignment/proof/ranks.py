"""Processes whose forward passes communicate repeat them the same number of times.

A collective inside ``forward`` waits for all processes. How often a pass is repeated depends on
each process's own data, so that they ask each other before every repetition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ola_augment.alignment._torch import collectives

_DONE, _ANOTHER, _FAILED = range(3)


class RefusedElsewhere(RuntimeError):
    """Another process refused its examples, and knows that this one follows."""


class Ranks:
    """The processes of a model.

    Args:
        device: of the model, on which they communicate.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        #: Whether a forward pass was seen to communicate.
        self.together = False

    def calls(self) -> int:
        """How many collectives there were, over all groups."""
        return collectives()

    def another(self) -> None:
        """This process is about to repeat a pass; the others repeat one, too.

        Raises:
            RuntimeError: another process refused its examples.
        """
        self._agree(_ANOTHER)

    def done(self, repeat: Callable[[], object]) -> None:
        """This process needs no more repetitions: repeat a pass as long as another one does.

        Raises:
            RuntimeError: another process refused its examples.
        """
        while self._agree(_DONE) == _ANOTHER:
            repeat()

    def failed(self) -> None:
        """This process refuses its examples: the others need not wait for it."""
        self._agree(_FAILED)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What this process refuses in the block the others hear of."""
        try:
            yield
        except RefusedElsewhere:
            raise
        except (RuntimeError, ValueError):
            self.failed()
            raise

    def _agree(self, state: int) -> int:
        if not self.together:
            return _DONE
        states = torch.tensor([state], device=self.device)
        dist.all_reduce(states, dist.ReduceOp.MAX)
        if int(states) == _FAILED and state != _FAILED:
            raise RefusedElsewhere("another process refused its examples: its message says why")
        return int(states)
