"""What loaders hand out: tuples, dictionaries, and actions of workers that augment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from ola_augment.actions import Actions, as_actions

IMAGES = ("images", "image", "pixel_values")
TARGETS = ("targets", "labels", "label", "target")


class Batch(NamedTuple):
    """Images and targets on the model's device, and the actions of workers that augmented."""

    images: Tensor
    targets: Any
    actions: Actions | None


def read_batch(batch: Any, device: torch.device | None = None, whose: str = "loader") -> Batch:
    """Understand one batch of a loader.

    Args:
        batch: (images, targets), (images, targets, :class:`Actions`), or a mapping with an entry
            ``images``, ``image`` or ``pixel_values``, an entry ``targets``, ``labels``, ``label``
            or ``target``, and perhaps ``actions``.
        device: that images and targets are moved to; None leaves them.
        whose: what an error calls the loader.

    Raises:
        ValueError: anything else.
    """
    if isinstance(batch, Mapping):
        images, targets = named(batch, IMAGES), named(batch, TARGETS)
        actions = batch.get("actions")
    else:
        parts = tuple(batch) if isinstance(batch, (tuple, list)) else ()
        images, targets, actions = (*parts, None, None, None)[:3] if len(parts) < 4 else (None,) * 3
    actions = as_actions(actions)
    known = actions is None or isinstance(actions, Actions)
    if not isinstance(images, Tensor) or targets is None or not known:
        what = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else _describe(batch)
        raise ValueError(
            f"{whose} must give (images, targets), (images, targets, Actions) or a mapping with "
            f"one of {', '.join(IMAGES)} and one of {', '.join(TARGETS)}; got {what}"
        )
    if device is not None:
        images, targets = move(images, device), move(targets, device)
    return Batch(images, targets, actions)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader and its samplers the epoch, as a ``DistributedSampler`` wants it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batch_sampler)
    for part in (*parts, getattr(batch_sampler, "sampler", None)):
        if callable(announce := getattr(part, "set_epoch", None)):
            announce(epoch)


def drawing_nothing() -> AbstractContextManager[None]:
    """A block that leaves torch's generator of the CPU as it was: each iterator of a loader draws.

    What is read once more after a run was resumed must not change what is drawn after it.
    """
    return torch.random.fork_rng(devices=[])


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in batch)})"
    return type(batch).__name__


def move(value: Any, device: torch.device) -> Any:
    """A tensor, or the entries of a mapping, on a device; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: move(entry, device) for name, entry in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def named(batch: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The entry of a mapping that has the first of these names; None if it has none of them."""
    return next((batch[name] for name in names if name in batch), None)


def entries_of(batch: Any) -> tuple[list[Any], TreeSpec]:
    """The entries of a batch of any nesting, and what ``tree_unflatten`` puts together again.

    Those of a mapping lie as those of a tuple would: images, targets, others by their names.
    :class:`Actions` are one entry, and so is a list of names.
    """
    return tree_flatten(_in_order(batch), is_leaf=lambda part: are_actions(part) or are_names(part))


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors (B, ...) among the entries of a batch, images first."""
    return [part for part in entries_of(batch)[0] if isinstance(part, Tensor) and part.dim()]


def examples_of(batch: Any) -> int:
    """Number of examples of a batch; 1 if nothing in it says."""
    tensors = tensors_of(batch)
    return len(tensors[0]) if tensors else 1


def class_labels(batch: Any) -> list[int] | None:
    """The labels of a batch of any structure.

    Args:
        batch: whose only tensor of integers with one dimension they are.

    Returns:
        One for each example, or None if there are none, or several that might be them.
    """
    whole = (torch.uint8, torch.int16, torch.int32, torch.int64)
    found = [
        part for part in tensors_of(batch) if part.dim() == 1 and part.dtype in whole and len(part)
    ]
    return found[0].tolist() if len(found) == 1 else None


def are_actions(part: Any) -> bool:
    """Whether an entry of a batch is what workers drew for it."""
    return isinstance(as_actions(part), Actions)


def are_names(part: Any) -> bool:
    """Whether an entry of a batch is a list of texts or paths, as of the examples' files."""
    listed = type(part) in (tuple, list) and len(part) > 0
    return listed and all(isinstance(entry, (str, bytes, os.PathLike)) for entry in part)


def _in_order(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _in_order(batch[name]) for name in sorted(batch, key=_place)}
    return type(batch)(map(_in_order, batch)) if type(batch) in (tuple, list) else batch


def _place(name: Any) -> tuple[bool, bool, str]:
    return name not in IMAGES, name not in TARGETS, str(name)
