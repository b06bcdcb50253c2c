"""What a run of a forward pass shows at each use of parameters, and what several say together."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.arguments import Function, named, writes_in_place
from ola_augment.alignment.calls.expressions import Node
from ola_augment.alignment.calls.layout import Layout, candidates
from ola_augment.alignment.calls.paths import LookUp
from ola_augment.alignment.calls.registry import rule_of
from ola_augment.alignment.calls.watch import Step, Watch

_STATISTICS, _AFFINE = ("running_mean", "running_var"), ("weight", "bias")
_REST = ("training", "momentum", "eps")
_BATCH_NORM: dict[Function, tuple[str, ...]] = {
    F.batch_norm: ("input", *_STATISTICS, *_AFFINE, *_REST),
    **dict.fromkeys(
        (torch.batch_norm, torch.ops.aten.batch_norm.default, torch.ops.aten.batch_norm),
        ("input", *_AFFINE, *_STATISTICS, *_REST, "cudnn_enabled"),
    ),
}


#: What masks add to scores is larger.
_MASK = 1e30


class Unrelated(Enum):
    """What changed examples say about a use whose examples do not lie along one dimension."""

    CONSTANT = "the values are the same whatever the examples are"
    UNCLEAR = "no layout, or more than one, agrees with what changed"


Decision = Layout | Unrelated
# Which examples' rows to move, (batch,) bool, at the uses whose layout is known.
Disturbance = tuple[Tensor, Mapping[Step, Decision]]


class Fingerprints(Watch[bool]):
    """Records, per use of parameters, a projection of its subject along each dimension."""

    def __init__(
        self,
        nodes: Mapping[int, tuple[Tensor, Node]],
        batch: int,
        constants: set[Step],
        statistics: list[tuple[Tensor, Tensor]] | None,
        disturbed: Disturbance | None,
    ) -> None:
        super().__init__(nodes)
        # Batch statistics of the run on the batch itself: BatchNorm's share of the other examples
        # is documented, and must not hide what else mixes them.
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self._given = statistics
        self.batch = batch
        self.constants = constants
        self._disturbed = disturbed
        self.seen: OrderedDict[Step, dict[int, Tensor]] = OrderedDict()
        self.shapes: dict[Step, tuple[torch.Size, int]] = {}
        self.rounding: dict[Step, float] = {}

    def before(
        self, function: Function, args: Any, kwargs: Any, origin: bool
    ) -> tuple[Callable[[Tensor], int], Tensor | None]:
        """What tells the examples of a call's outputs apart: one of its arguments, or they do."""
        rule = rule_of(function)
        if rule is None:
            return Tensor.dim, None
        subject = args[rule.subject].detach() if rule.subject is not None else None
        if subject is not None and writes_in_place(function):
            subject = subject.clone()
        return lambda output: rule.leading(*args, output=output, **kwargs), subject

    def current(self) -> bool:
        """All data are the batch's."""
        return True

    def looks_up(self, found: LookUp, function: Function, args: Any, kwargs: Any) -> None:
        """Record the rows of what is looked up in, so that its layout is found."""
        bound = list(named(function, args, kwargs).values())
        for number, _ in found.subjects:
            if number >= 0:
                subject = bound[number].detach()
                self.record((found.path, -1 - number), subject, subject, subject.dim())

    def met(self, about: Any, step: Step, output: Tensor, origin: bool) -> bool:
        """Record its rows."""
        if step in self.constants:
            return False
        leading, subject = about
        self.record(step, output, output if subject is None else subject, leading(output))
        return True

    def after(self, result: Any, step: Step) -> Any:
        """Move the chosen examples' rows, sign for sign."""
        chosen, decisions = self._disturbed or (None, {})
        layout = decisions.get(step)
        if (
            chosen is None
            or not isinstance(result, Tensor)
            or not isinstance(layout, Layout)
            or not result.is_floating_point()
        ):
            return result
        rows = chosen.repeat_interleave(layout.inner).repeat(layout.outer).to(result.device)
        if result.shape[layout.dim] != len(rows):  # what was moved before led to another path
            return result
        rows = rows.view(-1, *(1,) * (result.dim() - layout.dim - 1)).to(result.dtype)
        own = result.detach()
        size = float(own.abs().mean())
        if not size < _MASK:
            ordinary = own.abs()[own.abs() < _MASK]
            size = float(ordinary.mean()) if len(ordinary) else 0.0
        shift = torch.copysign(rows * (0.01 * size or 0.01), own)
        return torch.addcmul(shift, result, 1 + 0.1 * rows)

    def record(self, step: Step, output: Tensor, subject: Tensor, leading: int) -> None:
        """Keep what a later run is compared with."""
        self.shapes[step] = output.shape, leading
        double = subject.dtype in (torch.float64, torch.complex128)
        self.rounding[step] = 1e-11 if double else 1e-6
        self.seen[step] = self._project(subject, leading)

    def follows(self, step: Step, layout: Layout, rolled: Fingerprints) -> bool:
        """Whether a use's rows are rolled by one example in the run of the rolled batch."""
        other = rolled.seen.get(step, {}).get(layout.dim)
        return other is not None and _follows(layout, self.seen[step][layout.dim], other)

    def run(self, function: Function, args: Any, kwargs: Any) -> Any:
        """A BatchNorm takes the statistics of the run on the batch itself."""
        names = _BATCH_NORM.get(function)
        if names is None:
            return function(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("training", False):
            x, seen = given["input"], len(self.statistics)
            if self._given is not None and seen < len(self._given):
                mean, variance = self._given[seen]
            else:
                wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
                _, mean, scale = torch.native_batch_norm(wide, None, None, None, None, True, 0, 0)
                variance = scale**-2
            self.statistics.append((mean, variance))
            given |= {"running_mean": mean, "running_var": variance, "training": False}
        given.pop("cudnn_enabled", None)
        return F.batch_norm(**given)

    def _project(self, tensor: Tensor, leading: int) -> dict[int, Tensor]:
        """Dimension -> (its size,) random projection of the others; -1: of everything, (1,)."""
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if tensor.numel() and not max(map(abs, map(float, tensor.aminmax()))) < _MASK:
            small = tensor.nan_to_num().abs().log1p() * tensor.nan_to_num().sign()
            tensor = torch.where(tensor.abs() < _MASK, tensor, small)  # masks
        dims = [d for d in range(min(leading, tensor.dim())) if tensor.shape[d] % self.batch == 0]
        if not dims:
            return {-1: _random_sum(tensor.reshape(1, -1))}
        others = {d: math.prod(tensor.shape[:d]) * math.prod(tensor.shape[d + 1 :]) for d in dims}
        return {
            d: _random_sum(tensor.movedim(d, 0).reshape(tensor.shape[d], others[d])) for d in dims
        }


def _random_sum(matrix: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(matrix.shape[1])
    weights = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype)
    return (matrix @ weights.to(matrix.device)).double().cpu()


def _decide(
    shape: torch.Size,
    leading: int,
    plain: dict[int, Tensor],
    changed: list[dict[int, Tensor]],
    sets: list[Tensor],
    precision: float,
) -> Decision:
    """Where the examples of one use lie, judged by the runs in which some were changed.

    Args:
        shape: of its output.
        leading: how many dimensions may hold the examples.
        plain: dimension -> projection, of the batch itself.
        changed: the same for each run in which some examples were changed.
        sets: which they were, (batch,) bool, for each run.
        precision: relative, of what the same sums over the same rows may differ by.
    """
    moves = [{dim: (run[dim] - plain[dim]).abs() for dim in plain} for run in changed]
    if not any(bool(move[dim].any()) for move in moves for dim in move):
        return Unrelated.CONSTANT
    return _layout(shape, leading, plain, list(zip(moves, sets, strict=True)), precision)


def _layout(
    shape: torch.Size,
    leading: int,
    plain: dict[int, Tensor],
    moves: list[tuple[dict[int, Tensor], Tensor]],
    precision: float,
) -> Decision:
    """The only layout in which no row but those of the changed examples moved."""
    # The same rows go through the same sums: what does not follow is the same to the last bit, or
    # differs by rounding where memory lies otherwise.
    for relative in (0.0, precision):
        agreeing = [
            layout
            for layout in candidates(shape, range(min(leading, len(shape))), len(moves[0][1]))
            if all(_alone(layout, plain, *one, relative) for one in moves)
        ]
        if len(agreeing) == 1:
            return agreeing[0]
    return Unrelated.UNCLEAR


def _alone(
    layout: Layout,
    plain: dict[int, Tensor],
    move: dict[int, Tensor],
    own: Tensor,
    precision: float,
) -> bool:
    """Whether no row but those of a run's changed examples moved, up to rounding.

    That of the sums themselves, and of what is large in them after the change.
    """
    if layout.dim not in move:
        return False
    moved = move[layout.dim]
    rows = own.repeat_interleave(layout.inner).repeat(layout.outer)
    # Deep networks amplify rounding; a mixing of 1e-8 is seen in double precision.
    part = 10 if precision > 1e-8 else 500
    size = float(plain[layout.dim].abs().max()) + part * float(moved[rows].max())
    return float(moved[~rows].max()) <= precision * size


def _follows(layout: Layout, plain: Tensor, rolled: Tensor) -> bool:
    """Whether each example's rows are what the next one's were, in the run of the rolled batch."""
    shape = (layout.outer, layout.batch, layout.inner)
    expected = plain.view(shape).roll(-1, 1)
    rounding = 1e-4 * float((plain.max() - plain.min()).abs())
    return bool(((rolled.view(shape) - expected).abs() <= rounding).all())


def compare(
    plain: Fingerprints, changed: list[Fingerprints], sets: list[Tensor]
) -> dict[Step, Decision]:
    """Where the examples lie in each use, by the runs in which the examples of each set changed."""
    decisions: dict[Step, Decision] = {}
    for step, before in plain.seen.items():
        after = [run.seen.get(step) for run in changed]
        shape, leading = plain.shapes[step]
        if any(one is None or one.keys() != before.keys() for one in after):
            decisions[step] = Unrelated.UNCLEAR
            continue
        decisions[step] = _decide(
            shape,
            leading,
            before,
            [one for one in after if one is not None],
            sets,
            plain.rounding[step],
        )
    return decisions


def judged_again(
    plain: Fingerprints,
    runs: list[Fingerprints],
    sets: list[Tensor],
    decisions: Mapping[Step, Decision],
) -> dict[Step, Decision]:
    """Decisions that runs with the chosen examples' rows moved everywhere show to be others."""
    kept = [
        (run, chosen)
        for run, chosen in zip(runs, sets, strict=True)
        if run.walked(decisions) == plain.walked(decisions)
    ]
    others: dict[Step, Decision] = {}
    for step, decision in decisions.items():
        before = plain.seen.get(step)
        if before is None or decision is Unrelated.UNCLEAR:
            continue
        moves = [
            ({dim: (after[dim] - before[dim]).abs() for dim in before}, chosen)
            for run, chosen in kept
            if (after := run.seen.get(step)) is not None and after.keys() == before.keys()
        ]

        shape, leading = plain.shapes[step]
        precision = plain.rounding[step]
        if isinstance(decision, Layout):
            if not all(_alone(decision, before, *one, precision) for one in moves):
                others[step] = Unrelated.UNCLEAR
        elif any(bool(one.any()) for move, _ in moves for one in move.values()):
            # It only looked like a constant: its examples had come to be equal.
            others[step] = _layout(shape, leading, before, moves, precision)
    return others
