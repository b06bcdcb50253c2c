"""Drawing actions from the tables of a policy (Algorithm 2), for a batch or for one image."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ola_augment.actions import Actions

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LogProbs(NamedTuple):
    """The log-probabilities that define a policy over S slots, A operations and K bins.

    Attributes:
        num_ops: (S,), of applying 1 .. S operations.
        keep: (A,), of keeping a drawn operation.
        drop: (A,), of dropping it.
        magnitude: (A, K), of each magnitude bin of a kept operation.
        ops: (A,), of drawing each operation into a slot; None where all are drawn alike. Only for
            policies that draw with replacement.

    Example:
        >>> from ola_augment import UniformPolicy
        >>> tables = UniformPolicy("rand_augment", num_ops=2).log_probs()
        >>> tables.keep.shape, tables.magnitude.shape
        (torch.Size([14]), torch.Size([14, 31]))
    """

    num_ops: Tensor
    keep: Tensor
    drop: Tensor
    magnitude: Tensor
    ops: Tensor | None = None


def log_one_hot(index: int, size: int) -> Tensor:
    """A certain outcome: (size,), 0 at ``index`` and -inf elsewhere."""
    table = torch.full((size,), -torch.inf, dtype=torch.float32, device="cpu")
    table[index] = 0
    return table


class Tables:
    """A policy's distribution as draws read it; made once for as many draws as it is valid for.

    Args:
        log_probs: on the CPU, without gradient; tables of probabilities.
        log_choices: (S,), log of the number of ordered choices of 1 .. S operations.
        signed: (A,) bool, which operations draw a sign.
        replacement: whether an operation can be drawn twice for one image.
        once: whether one that is drawn again after it was kept is dropped.
    """

    def __init__(
        self,
        log_probs: LogProbs,
        log_choices: Tensor,
        signed: NDArray[np.bool_],
        replacement: bool,
        once: bool,
    ) -> None:
        self.log_choices = log_choices
        self.log_probs = log_probs
        self.signed = signed
        self.replacement = replacement
        self.once = once
        self.num_ops_cdf = _cumulative(log_probs.num_ops)
        self.keep = log_probs.keep.double().exp().numpy()
        self.magnitude_cdf = _cumulative(log_probs.magnitude)
        self.ops_cdf = None if log_probs.ops is None else _cumulative(log_probs.ops)
        self._scalars: _Scalars | None = None

    @property
    def scalars(self) -> _Scalars:
        """The same as plain numbers, which one image reads faster than arrays."""
        if self._scalars is None:
            self._scalars = _Scalars(self)
        return self._scalars

    def draw(self, n: int, generator: torch.Generator | None) -> Actions:
        """Draw the augmentations of n images; each depends on its own random numbers alone."""
        if n == 1 and self.log_probs.keep.dtype in (torch.float32, torch.float64):
            return Actions(*(field[None] for field in self.draw_one(generator).actions()))
        drawn = (*draw_batch(self._uniforms(n, generator).numpy(), self), np.empty(0))
        actions = Actions(*map(torch.from_numpy, drawn))
        return actions._replace(log_prob=self.log_prob(actions))

    def log_prob(self, actions: Actions) -> Tensor:
        """Log-probability of what was drawn from these tables, (B,)."""
        return log_prob(actions, self.log_probs, self.log_choices, self.once)

    def draw_one(self, generator: torch.Generator | None) -> Draw:
        """Draw the augmentation of one image."""
        return draw_one(self._uniforms(1, generator).tolist()[0], self.scalars)

    def _uniforms(self, n: int, generator: torch.Generator | None) -> Tensor:
        numbers = 1 + 6 * len(self.num_ops_cdf)
        return torch.rand(n, numbers, dtype=torch.float64, generator=generator, device="cpu")


class _Scalars:
    def __init__(self, tables: Tables) -> None:
        log_probs = tables.log_probs
        self.log_num_ops = _and_choices(log_probs, tables.log_choices).tolist()
        self.log_keep, self.log_drop = log_probs.keep.tolist(), log_probs.drop.tolist()
        self.log_magnitude = log_probs.magnitude.tolist()
        self.log_ops = None if log_probs.ops is None else log_probs.ops.tolist()
        self.num_ops_cdf = tables.num_ops_cdf.tolist()
        self.keep = tables.keep.tolist()
        self.magnitude_cdf = tables.magnitude_cdf.tolist()
        self.ops_cdf = None if tables.ops_cdf is None else tables.ops_cdf.tolist()
        self.signed = tables.signed.tolist()
        self.replacement, self.once = tables.replacement, tables.once
        single = log_probs.keep.dtype == torch.float32
        self.dtype: type[np.floating[Any]] = np.float32 if single else np.float64

    def log_prob(self, op: int, kept: bool, again: bool, k: int) -> np.floating[Any]:
        """Of one slot, rounded as torch rounds it; one that is drawn ``again`` is dropped."""
        dtype = self.dtype
        value = dtype(0.0 if again else self.log_drop[op])
        if kept:
            value = dtype(self.log_keep[op]) + dtype(self.log_magnitude[op][k])
        return value if self.log_ops is None else value + dtype(self.log_ops[op])


def log_prob(actions: Actions, log_probs: LogProbs, log_choices: Tensor, once: bool) -> Tensor:
    """Log-probability of actions, (B,), differentiable in the tables.

    Args:
        actions: on the device of the tables.
        log_probs: the tables.
        log_choices: (S,), log of the number of ordered choices of 1 .. S operations.
        once: whether an operation that is drawn again after it was kept is dropped.
    """
    ops = actions.ops.clamp(min=0)
    kept = log_probs.keep[ops] + log_probs.magnitude[ops, actions.magnitude_bins]
    slots = torch.where(actions.keep, kept, log_probs.drop[ops])
    if once:
        slots = torch.where(repeats(ops, actions.keep), torch.zeros_like(slots), slots)
    if log_probs.ops is not None:
        slots = slots + log_probs.ops[ops]
    slots = torch.where(actions.ops >= 0, slots, torch.zeros_like(slots))
    return _and_choices(log_probs, log_choices)[actions.num_ops - 1] + slots.sum(1)


def repeats(ops: Tensor, keep: Tensor) -> Tensor:
    """Which slots draw an operation again that was kept before, (B, S) bool."""
    same = (ops[:, :, None] == ops[:, None, :]) & keep[:, None, :]
    return same.tril(-1).any(2)


def _and_choices(log_probs: LogProbs, log_choices: Tensor) -> Tensor:
    """(S,), of 1 .. S operations, and where all are drawn alike of one ordered choice of them."""
    return log_probs.num_ops - log_choices if log_probs.ops is None else log_probs.num_ops


def draw_batch(uniforms: NDArray[np.float64], tables: Tables) -> tuple[NDArray[np.generic], ...]:
    """Algorithm 2 from uniform numbers (n, 1 + 6 S): all fields of Actions but log_prob."""
    n, slots, size = len(uniforms), len(tables.num_ops_cdf), len(tables.keep)
    num_ops = 1 + np.searchsorted(tables.num_ops_cdf, uniforms[:, 0], side="right")
    u = uniforms[:, 1:].reshape(n, slots, 6)
    # Without replacement, the operations drawn before lie at the front of an image's urn.
    first = np.zeros(slots, np.int64) if tables.replacement else np.arange(slots)
    if tables.ops_cdf is not None:
        ops = np.searchsorted(tables.ops_cdf, u[:, :, 0], side="right")
    else:
        ops = first + (u[:, :, 0] * (size - first)).astype(np.int64)
    if not tables.replacement:
        urns, row = np.tile(np.arange(size), n), size * np.arange(n)
        for s in range(slots):
            at = row + ops[:, s]
            ops[:, s] = urns[at]
            urns[at] = urns[row + s]
    used = np.arange(slots) < num_ops[:, None]
    keep = used & (u[:, :, 1] < tables.keep[ops])
    if tables.once:
        for s in range(1, slots):
            keep[:, s] &= ~(keep[:, :s] & (ops[:, :s] == ops[:, s, None])).any(1)
    bins = np.zeros((n, slots), np.int64)
    bins[keep] = _search_rows(tables.magnitude_cdf, ops[keep], u[:, :, 2][keep])
    negative = keep & tables.signed[ops] & (u[:, :, 3] < 0.5)
    # Rounding down to float32 keeps a centre below 1.
    centers = (np.floor(u[:, :, 4:] * 2**24) * (keep[:, :, None] / 2**24)).astype(np.float32)
    signs = np.where(negative, np.int8(-1), np.int8(1))
    return num_ops, np.where(used, ops, -1), keep, bins, signs, centers


class Draw(NamedTuple):
    """What was drawn for one image, as plain numbers; tensors only when somebody wants them.

    Attributes:
        num_ops: how many operations.
        slots: each one's index, whether it is kept, its bin, sign -1 or +1, and centre (y, x).
        tables: what they were drawn from.
    """

    num_ops: int
    slots: list[tuple[int, bool, int, int, tuple[float, float]]]
    tables: _Scalars

    def actions(self) -> Actions:
        """The same as :class:`Actions` without a batch dimension, with its log-probability."""
        tables = self.tables
        dtype, unused = tables.dtype, len(tables.num_ops_cdf) - self.num_ops
        slots = self.slots + [(-1, False, 0, 1, (0.0, 0.0))] * unused
        ops, keep, bins, signs, centers = zip(*slots, strict=True)
        log_probs, applied = [], set[int]()
        for op, kept, k, _, _ in self.slots:
            again = tables.once and op in applied
            log_probs.append(tables.log_prob(op, kept, again, k))
            if kept:
                applied.add(op)
        if len(slots) > 2:
            # torch adds them up, in the order in which it adds up those of a batch: the same bits.
            row = np.array([log_probs + [0.0] * unused], dtype)
            total = torch.from_numpy(row).sum(1).numpy()[0]
        else:
            total = sum(log_probs, dtype(0.0))
        total = total + dtype(tables.log_num_ops[self.num_ops - 1])
        return Actions(
            torch.from_numpy(np.array(self.num_ops)),
            torch.from_numpy(np.array(ops)),
            torch.from_numpy(np.array(keep)),
            torch.from_numpy(np.array(bins)),
            torch.from_numpy(np.array(signs, np.int8)),
            torch.from_numpy(np.array(centers, np.float32)),
            torch.from_numpy(np.array(total, dtype)),
        )


def draw_one(uniforms: list[float], tables: _Scalars) -> Draw:
    """Algorithm 2 for one image, in plain Python: arrays of one cost more than they bring."""
    size, slots, applied = len(tables.keep), [], set[int]()
    num_ops = bisect_right(tables.num_ops_cdf, uniforms[0]) + 1
    urn = [] if tables.replacement else list(range(size))
    for s in range(num_ops):
        choice, kept, magnitude, sign, y, x = uniforms[1 + 6 * s : 7 + 6 * s]
        if tables.ops_cdf is not None:
            op = bisect_right(tables.ops_cdf, choice)
        elif tables.replacement:
            op = int(choice * size)
        else:
            pick = s + int(choice * (size - s))
            op, urn[pick] = urn[pick], urn[s]
        if kept >= tables.keep[op] or (tables.once and op in applied):
            slots.append((op, False, 0, 1, (0.0, 0.0)))
            continue
        applied.add(op)
        k = bisect_right(tables.magnitude_cdf[op], magnitude)
        negative = sign < 0.5 and tables.signed[op]
        center = int(y * 2**24) / 2**24, int(x * 2**24) / 2**24
        slots.append((op, True, k, -1 if negative else 1, center))
    return Draw(num_ops, slots, tables)


def _cumulative(log_probs: Tensor) -> NDArray[np.float64]:
    """Cumulative probabilities in float64 that reach exactly 1 at the last possible outcome."""
    cumulative = log_probs.double().exp().cumsum(-1)
    return (cumulative / cumulative[..., -1:]).numpy()


def _search_rows(
    cdf: NDArray[np.float64], rows: NDArray[np.int64], values: NDArray[np.float64]
) -> NDArray[np.int64]:
    """``np.searchsorted(cdf[row], value, side="right")`` for every row and value, all below K."""
    last = cdf.shape[1] - 1
    base = rows * cdf.shape[1]
    found = np.zeros(len(rows), np.int64)
    for power in range(last.bit_length() - 1, -1, -1):
        probe = np.minimum(found + 2**power, last)
        found = np.where(cdf.ravel()[base + probe - 1] <= values, probe, found)
    return found
