"""Actions: what a policy drew for each example of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ola_augment.kernels.functional import beside, unwrapped
from ola_augment.space import SearchSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Actions(NamedTuple):
    """One draw for each of B examples, in ``S = max_ops`` slots; all tensors on the CPU.

    Slots are applied from left to right; the first ``num_ops`` are used. Policies write bin 0 and
    sign +1 where an operation was dropped and into unused slots, so that equal augmentations are
    equal tensors.

    Attributes:
        num_ops: (B,) int64, how many operations were drawn, 1 .. S.
        ops: (B, S) int64, index into ``space.operations``; -1 in unused slots and only there.
        keep: (B, S) bool, whether the drawn operation is applied; False in unused slots.
        magnitude_bins: (B, S) int64, 0 .. num_magnitude_bins - 1.
        signs: (B, S) int8, -1 or +1; a fair coin for signed operations, not learned.
        centers: (B, S, 2) float32 in [0, 1), the (y, x) of a cutout as fractions of the image, and
            what a user's own random kernel draws from.
        log_prob: (B,) floating point, finite, at most 0: log-probability under the policy that
            drew them (no grad).

    Example:
        >>> from ola_augment import OLAPolicy
        >>> actions = OLAPolicy(max_ops=4).sample(8)
        >>> actions.batch_size, actions.ops.shape
        (8, torch.Size([8, 4]))
    """

    num_ops: Tensor
    ops: Tensor
    keep: Tensor
    magnitude_bins: Tensor
    signs: Tensor
    centers: Tensor
    log_prob: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process in one storage: each tensor alone would keep a file open there.
        if not all(isinstance(field, Tensor) for field in self):
            return Actions, tuple(self)
        if len({field.device for field in self}) > 1:
            return Actions, tuple(self)
        layout = [(field.dtype, field.shape) for field in self]
        fields = sorted(self, key=lambda field: -field.dtype.itemsize)  # aligned
        rows = [f.detach().contiguous().view(-1).view(torch.uint8) for f in fields if f.numel()]
        return _unpacked, (
            torch.cat(rows or [torch.empty(0, dtype=torch.uint8, device="cpu")]),
            layout,
        )

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return len(self.num_ops)

    def select(self, index: Tensor | slice | list[int] | int) -> Actions:
        """Actions of some of the examples (``actions[i]`` is a tuple's field, as for any tuple).

        Args:
            index: of the examples, 0 .. B - 1, or a mask (B,); an int drops the dimension B.

        Returns:
            The actions of these examples, in the order of ``index``.
        """
        return Actions(*(field[index] for field in self))

    @staticmethod
    def cat(parts: list[Actions]) -> Actions:
        """Concatenate along the batch, as when several micro-batches make one update.

        Args:
            parts: at least one, all with the same number of slots.

        Returns:
            The actions of all examples, in the order of the parts.

        Raises:
            ValueError: no parts, or parts with different numbers of slots.
        """
        if not parts:
            raise ValueError("parts must hold at least one Actions, got an empty list")
        slots = {part.ops.shape[1] for part in parts}
        if len(slots) > 1:
            raise ValueError(f"all parts must have the same number of slots, got {sorted(slots)}")
        return Actions(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


_DTYPES = {
    "num_ops": torch.int64,
    "ops": torch.int64,
    "keep": torch.bool,
    "magnitude_bins": torch.int64,
    "signs": torch.int8,
    "centers": torch.float32,
}


def _unpacked(packed: Tensor, layout: list[tuple[torch.dtype, torch.Size]]) -> Actions:
    """Views of one storage."""
    fields: dict[int, Tensor] = {}
    begin = 0
    for index, (dtype, shape) in sorted(enumerate(layout), key=lambda item: -item[1][0].itemsize):
        end = begin + shape.numel() * dtype.itemsize
        fields[index] = packed[begin:end].view(dtype).view(shape)
        begin = end
    return Actions(*(fields[index] for index in range(len(layout))))


def as_actions(value: Any) -> Any:
    """Actions that a framework has rebuilt as a plain tuple or list, and anything else as it is.

    Ray Train, skorch and others move the entries of a tuple to a device and forget its type.
    """
    if isinstance(value, Actions) or not isinstance(value, (tuple, list)):
        return value
    if len(value) != len(Actions._fields) or not all(isinstance(v, Tensor) for v in value):
        return value
    actions = Actions(*value)
    fits = all(getattr(actions, name).dtype == dtype for name, dtype in _DTYPES.items())
    return actions if fits and actions.ops.ndim in (1, 2) else value


def unwrapped_actions(actions: Actions) -> Actions:
    """Actions that went through a transform of ``torch.func``, as they were; any other as it is."""
    if not isinstance(actions, Actions) or not all(isinstance(field, Tensor) for field in actions):
        return actions
    return Actions(*map(unwrapped, actions))


def check_actions(actions: Actions, space: SearchSpace, batch_size: int | None = None) -> None:
    """Refuse actions that break an invariant of :class:`Actions`, or belong to another space.

    What policies write into slots that are not kept (bin 0, sign +1) is theirs to choose; the
    values themselves must be legal there too.

    Args:
        actions: anything.
        space: that they must index.
        batch_size: how many examples they must have, if that is known.

    Raises:
        TypeError: not an :class:`Actions`, a field that is no tensor or of a wrong dtype.
        ValueError: fields not on the CPU, of a wrong shape, or with a value out of range; an
            operation in an unused slot, or none in a used one.
    """
    if not isinstance(actions, Actions):
        raise TypeError(f"actions must be an Actions, got {type(actions).__name__}")
    _check_fields(actions)
    batch = len(actions.num_ops)
    if batch_size is not None and batch != batch_size:
        raise ValueError(f"actions hold {batch} examples, the batch has {batch_size}")
    if batch:
        with beside():
            _check_values(actions, space)


def _check_fields(actions: Actions) -> None:
    for name, value in zip(Actions._fields, actions, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"actions.{name} must be a tensor, got {type(value).__name__}")
        if value.device.type != "cpu":
            raise ValueError(f"actions.{name} must be on the CPU, got {value.device}")
        if value.dtype != (dtype := _DTYPES.get(name, value.dtype)):
            raise TypeError(f"actions.{name} must be {dtype}, got {value.dtype}")
    if not actions.log_prob.is_floating_point():
        raise TypeError(f"actions.log_prob must be floating point, got {actions.log_prob.dtype}")
    if actions.ops.ndim != 2:
        raise ValueError(
            f"actions.ops must have shape (batch, slots), got {tuple(actions.ops.shape)}"
        )
    batch, slots = actions.ops.shape
    shapes = ((batch,), *((batch, slots),) * 4, (batch, slots, 2), (batch,))
    for name, value, shape in zip(Actions._fields, actions, shapes, strict=True):
        if value.shape != shape:
            raise ValueError(f"actions.{name} must have shape {shape}, got {tuple(value.shape)}")


def _check_values(actions: Actions, space: SearchSpace) -> None:
    # NumPy looks at one example in a few microseconds, several times as fast as torch.
    num_ops, ops, keep, bins, signs, centers, log_prob = (
        field.detach().numpy() if field.dtype != torch.bfloat16 else field.detach().float().numpy()
        for field in actions
    )
    slots = ops.shape[1]
    _check_range("num_ops", num_ops, min(1, slots), slots)
    other = "; drawn from another space?"
    _check_range("ops", ops, -1, len(space) - 1, f" for space {space.name!r}", other)
    _check_range("magnitude_bins", bins, 0, space.num_magnitude_bins - 1, "", other)
    used = np.arange(slots) < num_ops[:, None]
    misplaced = (ops >= 0) != used
    if misplaced.any():
        raise ValueError(
            "actions.ops must be -1 in the slots from num_ops on, and only there, got "
            f"{ops[misplaced.any(1)][0].tolist()}"
        )
    if (keep & ~used).any():
        raise ValueError("actions.keep must be False in the slots from num_ops on")
    _check_all("signs", signs, np.abs(signs) == 1, "be -1 or +1")
    _check_all("centers", centers, (centers >= 0) & (centers < 1), "lie in [0, 1)")
    # A little above 0 is what rounding makes of a certain draw.
    possible = (log_prob > -np.inf) & (log_prob <= 1e-3)
    _check_all("log_prob", log_prob, possible, "be finite and at most 0")


def _check_range(
    name: str, values: NDArray[Any], low: int, high: int, where: str = "", hint: str = ""
) -> None:
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(
            f"actions.{name} must lie in {low} .. {high}{where}, got "
            f"{values.min()} .. {values.max()}{hint}"
        )


def _check_all(name: str, values: NDArray[Any], fine: NDArray[np.bool_], rule: str) -> None:
    if not fine.all():
        raise ValueError(f"actions.{name} must {rule}, got {values[~fine][0]}")
