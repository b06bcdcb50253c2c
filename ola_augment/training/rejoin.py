"""Held-out images come back into the training, in proportion to their number."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ola_augment.streams import rank_here

#: Held-out examples that are shuffled together; so many are kept in memory.
_SHUFFLED = 512


class Rejoin:
    """Replaces some examples of each training batch by held-out ones.

    Of a batch of B examples B H / (H + N) become held-out ones, for H held-out and N training
    images: so many there would be if both were one data set. Batches keep their size, and an epoch
    its number of batches. Held-out examples come in a random order, whatever that of their batches:
    images that lie sorted by class would fill each training batch with one class.

    Args:
        batches: a list or loader of held-out batches that look like those of the training.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._stream: Iterator[list[Tensor]] = iter(())
        self._left: list[Tensor] = []  # of the block that is being used
        self._size = 0
        self._owed = 0.0
        self._taken = 0

    def __getstate__(self) -> dict[str, Any]:
        # An iterator stays with its process; a copy begins anew.
        return {**self.__dict__, "_stream": iter(()), "_left": []}

    def _shuffled(self) -> Iterator[list[Tensor]]:
        """One pass over the held-out examples, shuffled in blocks."""
        seed = 1_000_003 * rank_here() + self._taken // self._size
        generator = torch.Generator().manual_seed(seed)
        block: list[list[Tensor]] = []
        for batch in itertools.chain(self._batches, [None]):
            if batch is not None:
                block.append(_leaves(batch, "held-out images")[0])
            if block and (batch is None or sum(len(parts[0]) for parts in block) >= _SHUFFLED):
                joined = [torch.cat(parts) for parts in zip(*block, strict=True)]
                order = torch.randperm(len(joined[0]), generator=generator)
                yield [part[order.to(part.device)] for part in joined]
                block = []

    def check(self, batch: Any) -> None:
        """Refuse training batches that held-out ones could not join.

        Raises:
            ValueError: they differ in structure, shape or dtype.
        """
        own, _ = _leaves(batch, "the training")
        held, _ = _leaves(next(iter(self._batches)), "held-out images")
        what = [[(tuple(part.shape[1:]), part.dtype) for part in parts] for parts in (own, held)]
        if what[0] != what[1]:
            raise ValueError(
                "held-out batches must look like those of the training, which they are to join "
                f"later: shapes and dtypes {what[1]} and {what[0]}; pre-process both alike, or "
                "leave them out for good with rejoin=False"
            )

    def mix(self, batch: Any, train_size: int) -> Any:
        """A batch of which some examples, the last ones, are held-out ones.

        Args:
            batch: of the training; any nesting of tensors (B, ...).
            train_size: number of training images in an epoch.

        Returns:
            A batch of the same structure and shapes.
        """
        own, spec = _leaves(batch, "the training")
        self._size = self._size or self._count()
        size = len(own[0])
        self._owed += size * self._size / (self._size + train_size)
        count = min(int(self._owed), size)
        self._owed -= count
        if not count:
            return batch
        held = self._take(count)
        mixed = [
            torch.cat((part[: size - count], other.to(part.device)))
            for part, other in zip(own, held, strict=True)
        ]
        return tree_unflatten(mixed, spec)

    def _count(self) -> int:
        return sum(len(_leaves(batch, "held-out images")[0][0]) for batch in self._batches)

    def _take(self, count: int) -> list[Tensor]:
        parts = []
        while count:
            if not self._left or not len(self._left[0]):
                self._left = next(self._stream, [])
                if not self._left:
                    self._stream = self._shuffled()
                    continue
            parts.append([part[:count] for part in self._left])
            self._left = [part[count:] for part in self._left]
            self._taken += len(parts[-1][0])
            count -= len(parts[-1][0])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """How many held-out examples are owed, and were used."""
        return {"owed": self._owed, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run was, if held-out batches come in the same order again."""
        self._stream, self._left = iter(()), []
        self._owed, taken = float(state["owed"]), int(state["taken"])
        self._size = self._size or self._count()
        within = taken % self._size
        self._taken = taken - within
        if within:
            self._take(within)


class Rejoined:
    """A loader whose batches held-out images join once a learner does not need them any more.

    Everything else is the loader's own.
    """

    def __init__(self, loader: Iterable[Any], learner: Any) -> None:
        self.loader = loader
        self._learner = learner

    def __iter__(self) -> Iterator[Any]:
        size = train_size(self.loader)
        for batch in self.loader:
            yield self._learner.rejoin(batch, size)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def train_size(loader: Iterable[Any]) -> int:
    """Number of images in an epoch of a loader.

    Args:
        loader: with a dataset or a length; one that has neither is read through.
    """
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, Sized):
        return len(dataset)
    known = isinstance(loader, Sized)
    first = next(iter(loader), None) if known else None
    if first is not None:
        return len(loader) * len(_leaves(first, "the training")[0][0])  # type: ignore[arg-type]
    return sum(len(_leaves(batch, "the training")[0][0]) for batch in loader)


def _leaves(batch: Any, whose: str) -> tuple[list[Tensor], Any]:
    parts, spec = tree_flatten(batch)
    if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
        kinds = sorted({type(part).__name__ for part in parts})
        raise ValueError(
            f"batches of {whose} must consist of tensors (B, ...) for held-out images to join the "
            f"training, got {', '.join(kinds)}; leave them out for good with rejoin=False"
        )
    return parts, spec
