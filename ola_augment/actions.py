"""Actions: what a policy drew for each example of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ola_augment.space import SearchSpace


class Actions(NamedTuple):
    """One draw for each of B examples, in ``S = max_ops`` slots; all tensors on the CPU.

    Slots are applied from left to right. Unused slots and slots whose operation was dropped hold
    bin 0 and sign +1, so that equal augmentations are equal tensors.

    Attributes:
        num_ops: (B,) int64, how many operations were drawn, 1 .. S.
        ops: (B, S) int64, index into ``space.operations``; -1 in unused slots.
        keep: (B, S) bool, whether the drawn operation is applied; False in unused slots.
        magnitude_bins: (B, S) int64, 0 .. num_magnitude_bins - 1.
        signs: (B, S) int8, -1 or +1; a fair coin for signed operations, not learned.
        centers: (B, S, 2) float32 in [0, 1), the (y, x) of a cutout as fractions of the image.
        log_prob: (B,) float32, log-probability under the policy that drew them (no grad).
    """

    num_ops: Tensor
    ops: Tensor
    keep: Tensor
    magnitude_bins: Tensor
    signs: Tensor
    centers: Tensor
    log_prob: Tensor

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return len(self.num_ops)

    def select(self, index: Tensor | slice | list[int] | int) -> Actions:
        """Actions of some of the examples (``actions[i]`` is a tuple's field, as for any tuple)."""
        return Actions(*(field[index] for field in self))

    @staticmethod
    def cat(parts: list[Actions]) -> Actions:
        """Concatenate along the batch, as when several micro-batches make one update.

        Raises:
            ValueError: no parts, or parts with different numbers of slots.
        """
        if not parts:
            raise ValueError("parts must hold at least one Actions, got an empty list")
        slots = {part.ops.shape[1] for part in parts}
        if len(slots) > 1:
            raise ValueError(f"all parts must have the same number of slots, got {sorted(slots)}")
        return Actions(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def check_actions(actions: Actions, space: SearchSpace, batch_size: int | None = None) -> None:
    """Refuse actions that do not belong to a space or to a batch.

    Raises:
        TypeError: not an :class:`Actions`, or a field of a wrong dtype.
        ValueError: fields of different batch sizes or slots, another batch size than
            ``batch_size``, or operations or bins that the space does not have.
    """
    if not isinstance(actions, Actions):
        raise TypeError(f"actions must be an Actions, got {type(actions).__name__}")
    batch, slots = len(actions.num_ops), actions.ops.shape[-1]
    shapes = ((batch,), *((batch, slots),) * 4, (batch, slots, 2), (batch,))
    for name, value, shape in zip(Actions._fields, actions, shapes, strict=True):
        if tuple(value.shape) != shape:
            raise ValueError(f"actions.{name} must have shape {shape}, got {tuple(value.shape)}")
    dtypes = {
        "num_ops": torch.int64,
        "ops": torch.int64,
        "keep": torch.bool,
        "magnitude_bins": torch.int64,
        "signs": torch.int8,
    }
    for name, dtype in dtypes.items():
        if getattr(actions, name).dtype != dtype:
            raise TypeError(f"actions.{name} must be {dtype}, got {getattr(actions, name).dtype}")
    if batch_size is not None and batch != batch_size:
        raise ValueError(f"actions hold {batch} examples, the batch has {batch_size}")
    if batch == 0:
        return
    if int(actions.ops.max()) >= len(space) or int(actions.ops.min()) < -1:
        raise ValueError(
            f"actions.ops must lie in -1 .. {len(space) - 1} for space {space.name!r}, got "
            f"{int(actions.ops.min())} .. {int(actions.ops.max())}; drawn from another space?"
        )
    bins = actions.magnitude_bins
    if int(bins.max()) >= space.num_magnitude_bins or int(bins.min()) < 0:
        raise ValueError(
            f"actions.magnitude_bins must lie in 0 .. {space.num_magnitude_bins - 1}, got "
            f"{int(bins.min())} .. {int(bins.max())}; drawn from another space?"
        )
