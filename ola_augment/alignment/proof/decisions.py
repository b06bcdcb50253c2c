"""What several runs of a forward pass say together: where the examples lie in each use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ola_augment.alignment.calls.layout import Assumed, Layout, candidates
from ola_augment.alignment.calls.watch import Step


class Unrelated(Enum):
    """What changed examples say about a use whose examples do not lie along one dimension."""

    CONSTANT = "the values are the same whatever the examples are"
    UNCLEAR = "no layout, or more than one, agrees with what changed"


Decision = Layout | Unrelated


class Run(Protocol):
    """What a run of the pass showed: see `Fingerprints`."""

    seen: OrderedDict[Step, dict[int, Tensor]]
    shapes: dict[Step, tuple[torch.Size, int]]
    rounding: dict[Step, float]
    attached: set[Step]

    def walked(self, layouts: Mapping[Step, object]) -> tuple[int, int]:
        """Numbers of its path."""
        ...


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


def follows(layout: Layout, plain: Tensor, rolled: Tensor) -> bool:
    """Whether each example's rows are what the next one's were, in the run of the rolled batch."""
    shape = (layout.outer, layout.batch, layout.inner)
    expected = plain.view(shape).roll(-1, 1)
    rounding = 1e-4 * float((plain.max() - plain.min()).abs())
    return bool(((rolled.view(shape) - expected).abs() <= rounding).all())


def _comparable(before: dict[int, Tensor], after: dict[int, Tensor] | None) -> bool:
    """Whether there are as many rows as before: a mixture of experts has others."""
    return (
        after is not None
        and after.keys() == before.keys()
        and all(after[dim].shape == before[dim].shape for dim in before)
    )


def compare(plain: Run, changed: Sequence[Run], sets: list[Tensor]) -> dict[Step, Decision]:
    """Where the examples lie in each use, by the runs in which the examples of each set changed."""
    decisions: dict[Step, Decision] = {}
    for step, before in plain.seen.items():
        after = [run.seen.get(step) for run in changed]
        shape, leading = plain.shapes[step]
        if not all(_comparable(before, one) for one in after):
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
        if decisions[step] is Unrelated.CONSTANT and step in plain.attached:
            decisions[step] = _assumed(shape, leading, len(sets[0]))
    return decisions


def _assumed(shape: torch.Size, leading: int, batch: int) -> Decision:
    """Of values that are alike for all examples, though derivatives flow back to them."""
    possible = list(candidates(shape, range(min(leading, len(shape))), batch))
    first = Assumed(0, 1, batch, 1)
    return first if possible == [Layout(0, 1, batch, 1)] else Unrelated.CONSTANT


def judged_again(
    plain: Run,
    runs: Sequence[Run],
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
            if (after := run.seen.get(step)) is not None and _comparable(before, after)
        ]
        shape, leading = plain.shapes[step]
        precision = plain.rounding[step]
        if isinstance(decision, Layout) and not isinstance(decision, Assumed):
            if not all(_alone(decision, before, *one, precision) for one in moves):
                others[step] = Unrelated.UNCLEAR
        elif any(bool(one.any()) for move, _ in moves for one in move.values()):
            # Its examples had come to be equal.
            others[step] = _layout(shape, leading, before, moves, precision)
    return others
