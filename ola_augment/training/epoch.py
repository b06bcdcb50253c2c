"""How many images an epoch of the training has: known at its start, or as a stream shows it."""

from __future__ import annotations

import contextlib
from typing import Any

from ola_augment.streams import world_size
from ola_augment.training.batches import drawing_nothing, examples_of


class EpochImages:
    """Number of training images in an epoch, over all ranks.

    Attributes:
        longest: where it is not known, the most that an epoch has shown so far.
        seen: in the epoch that is under way.
    """

    def __init__(self) -> None:
        self._known: int | None = None
        self.longest = 0
        self.seen = 0

    def begin(self, loader: Any) -> None:
        """An epoch of a loader begins."""
        self._known, self.seen = known_size(loader), 0

    def with_batch(self, batch: Any) -> int:
        """The number, with what a batch tells that comes next."""
        if self._known:
            return self._known
        self.seen += examples_of(batch) * world_size()
        self.longest = max(self.longest, self.seen)
        return self.longest

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"longest": self.longest, "seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.longest, self.seen = state["longest"], state["seen"]


def known_size(loader: Any) -> int | None:
    """Number of images in an epoch of a loader; None of a stream, which only its end would tell.

    Args:
        loader: with a dataset, which is that of all ranks, or a length, which is that of this one;
            or with neither.
    """
    whole_batches = getattr(loader, "batch_sampler", loader) is None  # the dataset's entries
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        if not whole_batches:
            return len(loader.dataset)
    with contextlib.suppress(NotImplementedError, TypeError):
        batches = len(loader)
        with drawing_nothing():
            return batches and batches * examples_of(next(iter(loader))) * world_size()
    return None
