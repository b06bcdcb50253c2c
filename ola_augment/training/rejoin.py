"""Held-out images come back into the training, in proportion to their number."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ola_augment.actions import Actions, as_actions
from ola_augment.policy import Policy
from ola_augment.streams import rank_here
from ola_augment.training.batches import are_actions, drawing_nothing, entries_of
from ola_augment.training.flat import nothing_applied
from ola_augment.training.given import are_counts
from ola_augment.training.held_out_batches import (
    NO_BATCH,
    checked,
    count_examples,
    examples_of_ranks,
    refuse_no_tensors,
)

#: Entries of a state.
_STATE = ("owed", "taken")
#: Held-out examples that are shuffled together; so many are kept in memory.
_SHUFFLED = 512


class Rejoin:
    """Replaces some examples of each training batch by held-out ones.

    Of a batch of B examples B H / (H + N) become held-out ones, for H held-out and N training
    images: so many there would be if both were one data set; of images that are to come F times as
    ``often``, as if there were F H of them. Ranks read the same held-out batches,
    or a part each: of R ranks' batches one with H' of the H images gets B R H' / (H + N) of them.
    Batches keep their size, and an epoch its number of batches. Held-out examples come in a random
    order, whatever that of their batches: images that lie sorted by class would fill each training
    batch with one class.

    Batches are any nesting of tensors (B, ...); a mapping and a tuple fit each other, images before
    targets, and floats those of another precision. To images that join a batch whose images workers
    augmented, nothing was applied.

    Args:
        batches: a list or loader of held-out batches that look like those of the training.
        policy: that draws, where batches of the training hold :class:`Actions`.
    """

    def __init__(self, batches: Iterable[Any], policy: Policy | None = None) -> None:
        self._batches = batches
        self._policy = policy
        self._stream: Iterator[list[Tensor]] = iter(())
        self._left: list[Tensor] = []  # of the block that is being used
        self._size = 0  # of the batches that this rank reads
        self._counts: tuple[float, float] | None = None  # of all ranks' batches
        self._owed = 0.0
        self._taken = 0
        self._behind = False  # a copy, whose stream is not where its count is

    def __getstate__(self) -> dict[str, Any]:
        # An iterator stays with its process; the copy goes on at the same example.
        return {**self.__dict__, "_stream": iter(()), "_left": [], "_behind": True}

    def _shuffled(self) -> Iterator[list[Tensor]]:
        """One pass over the held-out examples, shuffled in blocks."""
        seed = 1_000_003 * rank_here() + self._taken // self._size
        generator = torch.Generator().manual_seed(seed)
        block: list[list[Tensor]] = []
        for batch in itertools.chain(self._batches, [None]):
            if batch is not None:
                block.append(_leaves(batch, "held-out images"))
            if block and (batch is None or sum(len(parts[0]) for parts in block) >= _SHUFFLED):
                joined = [torch.cat(parts) for parts in zip(*block, strict=True)]
                order = torch.randperm(len(joined[0]), generator=generator, device="cpu")
                yield [part[order.to(part.device)] for part in joined]
                block = []

    def check(self, batch: Any) -> None:
        """Refuse training batches that held-out ones could not join.

        Raises:
            ValueError: they differ in structure, shape or dtype.
        """
        own = _leaves(batch, "the training")
        with drawing_nothing():
            first = next(iter(self._batches), None)
        if first is None:
            raise ValueError(NO_BATCH)
        checked(first)
        refuse_no_tensors(first)
        held = _leaves(first, "held-out images")
        what = [[(tuple(part.shape[1:]), part.dtype) for part in parts] for parts in (own, held)]
        # Of floats any precision, which a trainer may have changed.
        kinds = [[(shape, dtype.is_floating_point or dtype) for shape, dtype in w] for w in what]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "held-out batches must look like those of the training, which they are to join "
                f"later: shapes and dtypes {what[1]} and {what[0]}; pre-process both alike, or "
                "leave them out for good with rejoin=False"
            )

    def mix(self, batch: Any, train_size: int, often: float = 1.0) -> Any:
        """A batch of which some examples, the last ones, are held-out ones.

        Args:
            batch: of the training.
            train_size: number of training images in an epoch, over all ranks.
            often: how much more often a held-out image is to come than one of the training.

        Returns:
            A batch of the same structure and shapes.
        """
        parts, spec = entries_of(batch)
        self._size = self._size or count_examples(self._batches)
        self._counts = self._counts or examples_of_ranks(self._batches, self._size)
        everywhere, here = self._counts
        size = len(_tensors(parts, "the training")[0])
        self._owed += size * often * here / (often * everywhere + train_size)
        count = min(int(self._owed), size)
        self._owed -= count
        if not count:
            return batch
        held = iter(self._take(count))
        mixed = tree_unflatten([self._joined(part, held, count) for part in parts], spec)
        if not isinstance(batch, Mapping):
            return mixed
        changed: Any = copy.copy(batch)
        changed.update(mixed)
        return changed

    def _joined(self, part: Any, held: Iterator[Tensor], count: int) -> Any:
        if not are_actions(part):
            return torch.cat((part[: len(part) - count], next(held).to(part)))
        assert self._policy is not None
        actions = Actions(*(field.cpu() for field in as_actions(part)))
        last = torch.arange(len(actions.keep), device="cpu") >= len(actions.keep) - count
        return nothing_applied(actions, last, self._policy)

    def _take(self, count: int) -> list[Tensor]:
        if self._behind:
            self._catch_up()
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
        """Go on where a run was, if held-out batches come in the same order again.

        Raises:
            ValueError: the state is damaged; nothing has changed.
        """
        check_state(state)
        self._owed, self._taken = float(state["owed"]), int(state["taken"])
        self._catch_up()

    def _catch_up(self) -> None:
        """Go through the pass that is under way, as far as its examples were taken."""
        self._stream, self._left, self._behind = iter(()), [], False
        self._size = self._size or count_examples(self._batches)
        within = self._taken % max(self._size, 1)  # the half that trains may hold no image
        self._taken -= within
        if within:
            with drawing_nothing():
                self._take(within)


def checked_often(rejoin: float, reference: object) -> float:
    """How often held-out images are to come, as a number: 0 is never.

    Raises:
        ValueError: it is out of range, or there are none.
    """
    if rejoin and isinstance(reference, str):
        raise ValueError("rejoin needs held-out batches")
    if not 0 <= rejoin < math.inf:
        raise ValueError(f"rejoin must be a bool or a number above 0, got {rejoin}")
    return float(rejoin)


def check_state(state: Any) -> None:
    """Refuse a damaged state of a :class:`Rejoin`.

    Raises:
        ValueError: it is one.
    """
    owed, taken = (state.get(name) if isinstance(state, Mapping) else None for name in _STATE)
    if not isinstance(owed, float) or not owed >= 0 or not are_counts(taken):
        raise ValueError(f"state of the held-out images that joined is damaged: {state!r:.80}")


class Rejoined:
    """A loader whose batches held-out images join once a learner does not need them any more.

    Everything else is the loader's own.
    """

    def __init__(self, loader: Iterable[Any], learner: Any) -> None:
        self.loader = loader
        self._learner = learner

    def __iter__(self) -> Iterator[Any]:
        self._learner.epoch.begin(self.loader)
        return map(self._learner.rejoin, self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.loader, name)


def _leaves(batch: Any, whose: str) -> list[Tensor]:
    """Tensors of a batch, without actions."""
    return _tensors(entries_of(batch)[0], whose)


def _tensors(parts: list[Any], whose: str) -> list[Tensor]:
    parts = [part for part in parts if not are_actions(part)]
    if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
        found = ", ".join(sorted({type(part).__name__ for part in parts}))
    elif len(sizes := sorted({len(part) for part in parts})) > 1:
        found = " and ".join(map(str, sizes))
    else:
        return parts
    raise ValueError(
        f"batches of {whose} must consist of tensors (B, ...) of one B, for held-out images to "
        f"join the training, got {found}: let a collate_fn leave out what is no such tensor, or "
        "leave held-out images out for good with rejoin=False"
    )
