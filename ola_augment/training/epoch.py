"""How many images an epoch of the training has: known at its start, or as a stream shows it."""

from __future__ import annotations

import contextlib
from typing import Any

from torch.utils.data import IterableDataset

from ola_augment.streams import world_size
from ola_augment.training.batches import drawing_nothing, examples_of

#: What those raise that have no length.
_NO_LENGTH = AttributeError, NotImplementedError, TypeError


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
        loader: with samplers, which say what a pass gives; with a dataset alone, which is that of
            all ranks, or a length, which is that of this one; or with none of these.
    """
    batches = getattr(loader, "batch_sampler", loader)  # None where the dataset has whole batches
    sized = not isinstance(getattr(loader, "dataset", None), IterableDataset)
    if sized and (batches is not loader or hasattr(loader, "sampler")) and batches is not None:
        with contextlib.suppress(*_NO_LENGTH):
            return _of_a_pass(batches)
        return None  # to look at a batch would draw it
    with contextlib.suppress(*_NO_LENGTH):
        if batches is not None:
            return len(loader.dataset)
    with contextlib.suppress(NotImplementedError, TypeError):
        count = len(loader)
        with drawing_nothing():
            return count and count * examples_of(next(iter(loader))) * world_size()
    return None


def _of_a_pass(batches: Any) -> int:
    """Examples of all ranks that a sampler of batches, or a loader with a sampler, hands out."""
    ranks = world_size()
    while hasattr(batches, "batch_sampler"):  # which ranks share, as in accelerate
        batches, ranks = batches.batch_sampler, 1
    sampler = getattr(batches, "sampler", None)
    if sampler is None:
        listed = isinstance(batches, (list, tuple))
        size = sum(map(len, batches)) if listed else len(batches) * batches.batch_size
        return int(size * ranks)
    parts = getattr(sampler, "num_replicas", 1)
    handed = len(sampler) * parts
    whole = len(getattr(sampler, "dataset", ()))
    # Parts of one length have some images twice, or lack some.
    return whole if abs(handed - whole) < parts else handed
