"""Which of many held-out images decide: a sample of all of them, whatever their order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ola_augment.actions import Actions, as_actions
from ola_augment.training.batches import (
    are_actions,
    are_names,
    entries_of,
    examples_of,
    tensors_of,
)
from ola_augment.training.held_out_batches import NO_BATCH, SPREAD, checked, keys_of, part_of

#: Of batches without a length, which may have no end, so many examples are read for each that is
#: wanted.
_READ = 64


def sample_of(batches: Iterable[Any], most: int) -> list[Any]:
    """The batches, or of more examples than ``most`` a sample, in other batches.

    What an example holds decides whether it is in the sample (those with the least checksums are),
    so that ranks and resumed runs agree, whatever the order. Batches without a tensor, of which
    nothing is known, are taken from the start.

    Args:
        batches: read once; where they have no length, 64 times ``most`` examples of them.
        most: examples that are wanted; as many as the first batch has, if that is more.

    Raises:
        ValueError: there is no batch, or one that cannot be parted.
    """
    iterator = map(checked, batches)
    kept: list[Any] = []
    count = 0
    for batch in iterator:
        kept.append(batch)
        count += examples_of(batch)
        most = max(most, examples_of(kept[0]))
        if count > most and not tensors_of(batch):
            return kept[:-1]
        if count > most:
            limit = math.inf if _has_length(batches) else _READ * most
            return _drawn(itertools.chain(kept, iterator), most, limit)
    if not kept:
        raise ValueError(NO_BATCH)
    return kept


def _drawn(batches: Iterable[Any], most: int, limit: float) -> list[Any]:
    found: list[tuple[int, Any]] = []  # checksum and example, the least first
    read = size = 0
    for batch in batches:
        size = size or examples_of(batch)
        bound = found[-1][0] if len(found) == most else math.inf
        keys = [key * SPREAD % 2**32 for key in keys_of(batch)]
        wanted = [index for index, key in enumerate(keys) if key < bound]
        found += [(keys[index], _one(batch, index, len(keys))) for index in wanted]
        found.sort(key=lambda entry: entry[0])
        del found[most:]
        read += len(keys)
        if read >= limit:
            break
    return _together([example for _, example in found], size)


def _one(batch: Any, index: int, size: int) -> Any:
    """A batch of one example of another one."""
    return part_of(batch, torch.arange(size, device="cpu") == index)


def _together(examples: list[Any], size: int) -> list[Any]:
    """Batches of about so many examples, of one shape each."""
    alike: dict[Any, list[Any]] = {}
    for example in examples:
        alike.setdefault(_looks(example), []).append(example)
    made = []
    for some in alike.values():
        parts = -(-len(some) // size)  # as even as can be
        made += [_joined(some[part::parts]) for part in range(parts)]
    return made


def _looks(batch: Any) -> tuple[Any, ...]:
    parts = entries_of(batch)[0]
    return tuple((p.shape, p.dtype) if isinstance(p, Tensor) else type(p) for p in parts)


def _joined(examples: list[Any]) -> Any:
    spec = entries_of(examples[0])[1]
    columns = zip(*(entries_of(example)[0] for example in examples), strict=True)
    return tree_unflatten([_column(column) for column in columns], spec)


def _column(entries: tuple[Any, ...]) -> Any:
    """One entry of all examples; that of the first where it is the batch's."""
    first = entries[0]
    if are_actions(first):
        return Actions.cat([as_actions(entry) for entry in entries])
    if are_names(first):
        return type(first)(itertools.chain(*entries))
    return torch.cat(entries) if isinstance(first, Tensor) and first.dim() else first


def _has_length(batches: Iterable[Any]) -> bool:
    try:
        return len(batches) >= 0  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # of a loader over a stream
        return False
