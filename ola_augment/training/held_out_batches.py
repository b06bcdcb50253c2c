"""Held-out batches: read again and again, and parted into two halves."""

from __future__ import annotations

import bisect
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import Dataset, IterableDataset

from ola_augment.actions import as_actions
from ola_augment.streams import rank_here, world_size
from ola_augment.training.batches import (
    IMAGES,
    TARGETS,
    are_actions,
    are_names,
    class_labels,
    drawing_nothing,
    entries_of,
    examples_of,
    named,
    tensors_of,
)
from ola_augment.training.ranks import gather_over_ranks

#: What is refused where nothing can be measured on.
NO_BATCH = (
    "reference holds no batch: there must be held-out images, and with drop_last=True as many as a "
    "batch"
)
#: Odd and large: numbers times this tell apart what lies side by side.
SPREAD = 2654435761


class Cycle:
    """Batches without end, from a position on."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if iter(batches) is batches:  # it can be read once only
            raise ValueError("reference must be a list or loader of batches, got an iterator")
        if isinstance(batches, (list, tuple)) and any(hasattr(part, "shape") for part in batches):
            raise ValueError(
                "held-out reference must be a list or loader of batches, got tensors; [(images, "
                "targets)] is one batch, DataLoader(TensorDataset(images, targets), 64) makes more"
            )
        listed = isinstance(batches, (list, tuple, Dataset))
        if listed and not isinstance(batches, IterableDataset):
            first = next(iter(batches), None)
            if first is None:
                raise ValueError(NO_BATCH)
            checked(first)
        self._batches = batches
        self._iterator: Iterator[Any] = iter(())
        self._read = 0
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def next(self) -> tuple[Any, ...]:
        """The next batch; after the last one, the first."""
        if self._read != self.position:  # just loaded
            with drawing_nothing():
                self._iterator = iter(self._batches)
                for _ in itertools.islice(self._iterator, self.position):
                    pass
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator, self.position = iter(self._batches), 0
            batch = next(self._iterator, None)
            if batch is None:
                raise ValueError(NO_BATCH)
        self.position += 1
        self._read = self.position
        return checked(batch)

    def __getstate__(self) -> dict[str, Any]:
        # An iterator stays with its process; the copy goes on at the same position.
        return {**self.__dict__, "_iterator": iter(()), "_read": -1}


def count_examples(batches: Iterable[Any]) -> int:
    """Number of examples in batches, which are read through once."""
    with drawing_nothing():
        return sum(map(examples_of, batches))


def examples_of_ranks(batches: Iterable[Any], count: int) -> tuple[float, float]:
    """Examples in the batches of all ranks, and in this rank's (``count``) times the ranks.

    Those that several ranks read, in whatever order, count once, a part of them on each. Images say
    so. Images of a loader may look another way each time they are read, and are taken for the same
    if their labels are: so none counts more than it should.
    """
    if world_size() == 1:
        return float(count), float(count)
    told = [count, 0, 0]
    with drawing_nothing():
        for batch in batches:
            labels = [label * SPREAD % 2**32 for label in _classes(batch)]
            more = 0, sum(keys_of(batch)), sum(labels)
            told = [(one + other) % 2**50 for one, other in zip(told, more, strict=True)]
    own = torch.tensor(told, dtype=torch.float64, device="cpu")
    found = torch.stack(gather_over_ranks(own, own.device))
    same = found[:, None] == found
    alike = same[..., 1] if isinstance(batches, (list, tuple)) else same[..., 1] | same[..., 2]
    counts = found[:, 0] / (same[..., 0] & alike).sum(1)
    return float(counts.sum()), float(counts[rank_here()]) * world_size()


def checked(batch: Any) -> tuple[Any, ...]:
    """A batch as the arguments of a loss, after the model.

    Raises:
        ValueError: it is a single example, whose label is one number, or has none.
    """
    label = _images_and_targets(batch)[1]
    if isinstance(label, (int, float)) or (hasattr(label, "shape") and not len(label.shape)):
        raise ValueError(
            "held-out images must come in batches, images (B, ...) and targets (B,), got a single "
            "example: DataLoader(held_out, batch_size=64, shuffle=True) makes batches of a data set"
        )
    if tensors_of(batch) and not examples_of(batch):
        raise ValueError("held-out reference holds a batch of no image: leave it out")
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def refuse_no_tensors(batch: Any) -> None:
    """Refuse images and targets that are no tensors.

    Raises:
        ValueError: they are not.
    """
    parts = (part for part in _images_and_targets(batch) if part is not None)
    entries = itertools.chain.from_iterable(entries_of(part)[0] for part in parts)
    if kinds := sorted({type(e).__name__ for e in entries if not isinstance(e, Tensor)}):
        raise ValueError(
            "images and targets of held-out batches must be tensors (B, ...), got "
            f"{', '.join(kinds)}: v2.PILToTensor() in the data set's transform makes them of PIL "
            "images, torch.from_numpy of arrays, torch.tensor of a list of labels"
        )


def _images_and_targets(batch: Any) -> tuple[Any, Any]:
    """What should be images and targets, whatever they are; None where there are none."""
    if isinstance(batch, Mapping):
        return named(batch, IMAGES), named(batch, TARGETS)
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else ()
    return (*parts, None, None)[:2]


def halves_of(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Two halves of the examples of some batches, as batches; of each class a half.

    What an example holds decides where it goes, so that ranks and resumed runs agree, whatever the
    order. The second half is not empty.
    """
    keys = [list(zip(_classes(batch), keys_of(batch), strict=True)) for batch in batches]
    known: dict[int, list[int]] = {}
    for label, key in sorted(itertools.chain(*keys)):
        known.setdefault(label, []).append(key)

    def first(label: int, key: int) -> bool:
        above = 2 * bisect.bisect_left(known[label], key) + 1 - len(known[label])
        return above > 0 if above else key % 2 == 1  # the odd one of a class

    chosen = [[first(label, key) for label, key in some] for some in keys]
    swapped = all(itertools.chain(*chosen))
    halves: tuple[list[Any], list[Any]] = ([], [])
    for half, wanted in zip(halves, (not swapped, swapped), strict=True):
        for batch, some in zip(batches, chosen, strict=True):
            where = torch.tensor([is_first == wanted for is_first in some], device="cpu")
            half += [part_of(batch, where)] if where.any() else []
    return halves


def _classes(batch: Any) -> list[int]:
    """The label of each example; one for all where there are none."""
    labels = class_labels(batch)
    return [0] * examples_of(batch) if labels is None else labels


def keys_of(batch: Any) -> list[int]:
    """A number for each example of a batch, by the bytes of its images."""
    tensors = tensors_of(batch)
    if not tensors:
        return [0]
    rows = tensors[0].detach().cpu().reshape(len(tensors[0]), -1).contiguous()
    return [zlib.crc32(row.view(torch.uint8).numpy().tobytes()) for row in rows]


def part_of(batch: Any, where: Tensor) -> Any:
    """Some examples of a batch."""

    def chosen(entry: Any) -> Any:
        if are_actions(entry):
            return as_actions(entry).select(where)
        if are_names(entry) and len(entry) == len(where):
            return type(entry)(itertools.compress(entry, where.tolist()))
        if not (isinstance(entry, Tensor) and entry.dim()):
            return entry
        if len(entry) != len(where):
            raise ValueError(
                "held-out batches must consist of tensors (B, ...) of one B, for a trial to part "
                f"them in two halves, got {len(where)} and {len(entry)}"
            )
        return entry[where.to(entry.device)]

    entries, spec = entries_of(batch)
    return tree_unflatten(map(chosen, entries), spec)
