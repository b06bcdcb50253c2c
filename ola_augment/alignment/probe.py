"""Verifying where the examples lie: change some of them and see which rows follow."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ola_augment.alignment.expressions import Leaf, Node, writes_in_place
from ola_augment.alignment.layout import Layout, candidates
from ola_augment.alignment.rules import RULES
from ola_augment.alignment.snapshot import undisturbed
from ola_augment.alignment.watch import Function, Watch, outputs_of

_BATCH_NORM = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip

#: Paths and decisions that are remembered for one signature.
_MOST_DECISIONS = 20_000
#: Examples of which four runs tell any two apart: four choose two.
_TOLD_APART = 6


class Unrelated(Enum):
    """What changed examples say about a use whose examples do not lie along one dimension."""

    CONSTANT = "the values are the same whatever the examples are"
    UNCLEAR = "no layout, or more than one, agrees with what changed"


Decision = Layout | Unrelated
# A call, as the number of the path up to it, and which of its outputs.
Step = tuple[int, int]


@dataclass
class Verified:
    """What is known of the forward passes of one signature.

    Attributes:
        decisions: where the examples lie in each use, wherever a path led to it.
        paths: numbers of whole passes, and of the rows looked up, that were verified.
        passes: how many there were.
    """

    decisions: OrderedDict[Step, Decision] = field(default_factory=OrderedDict)
    paths: set[tuple[int, int]] = field(default_factory=set)
    passes: int = 0


class _Fingerprints(Watch[bool]):
    """Records, per use of parameters, a projection of its subject along each dimension."""

    def __init__(
        self,
        nodes: Mapping[int, tuple[Tensor, Node]],
        batch: int,
        constants: set[Step],
        statistics: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        super().__init__(nodes)
        # Batch statistics of the run on the batch itself: BatchNorm's share of the other examples
        # is documented, and must not hide what else mixes them.
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self._given = statistics
        self.batch = batch
        self.constants = constants
        self.seen: OrderedDict[Step, dict[int, Tensor]] = OrderedDict()
        self.shapes: dict[Step, tuple[torch.Size, int]] = {}

    def use(self, function: Function, args: Any, kwargs: Any, origin: bool | None) -> Any:
        inputs = args[:1]
        rule = RULES.get(function)
        on_input = rule is not None and rule.subject is not None and inputs
        subject = inputs[0].detach() if on_input and origin else None
        if subject is not None and writes_in_place(function):
            subject = subject.clone()
        path, read = self.path, self.read(args, kwargs)
        result = self._call(function, args, kwargs)
        constant = {}
        for index, output in enumerate(outputs_of(function, args, result)):
            if origin is None or (path, index) in self.constants:
                constant[index] = output
                continue
            if writes_in_place(function):
                self.forget(output)
            leading = output.dim() if rule is None else rule.leading(*args, output=output, **kwargs)
            self.record((path, index), output, output if subject is None else subject, leading)
        if not isinstance(self.node(args[0]), Leaf) or not writes_in_place(function):
            self.follow(function, read, constant)
        return result

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        return self._call(function, args, kwargs)

    def record(self, step: Step, output: Tensor, subject: Tensor, leading: int) -> None:
        """Keep what a later run is compared with."""
        self.shapes[step] = output.shape, leading
        self.seen[step] = self._project(subject, leading)

    def follows(self, step: Step, layout: Layout, rolled: _Fingerprints) -> bool:
        """Whether a use's rows are rolled by one example in the run of the rolled batch."""
        other = rolled.seen.get(step, {}).get(layout.dim)
        return other is not None and _follows(layout, self.seen[step][layout.dim], other)

    def _call(self, function: Function, args: Any, kwargs: Any) -> Any:
        if function is not F.batch_norm:
            return function(*args, **kwargs)
        given = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
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
        return function(**given)

    def _project(self, tensor: Tensor, leading: int) -> dict[int, Tensor]:
        """Dimension -> (its size,) random projection of the others; -1: of everything, (1,)."""
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if tensor.numel() and not max(map(abs, map(float, tensor.aminmax()))) < 1e30:
            tensor = tensor.nan_to_num().abs().log1p() * tensor.sign()  # masks
        dims = [d for d in range(min(leading, tensor.dim())) if tensor.shape[d] % self.batch == 0]
        if not dims:
            return {-1: _random_sum(tensor.reshape(1, -1))}
        return {d: _random_sum(tensor.movedim(d, 0).reshape(tensor.shape[d], -1)) for d in dims}


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
) -> Decision:
    """Where the examples of one use lie, judged by the runs in which some were changed.

    Args:
        shape: of its output.
        leading: how many dimensions may hold the examples.
        plain: dimension -> projection, of the batch itself.
        changed: the same for each run in which some examples were changed.
        sets: which they were, (batch,) bool, for each run.
    """
    batch = len(sets[0])
    moves = [{dim: (run[dim] - plain[dim]).abs() for dim in plain} for run in changed]
    # The same rows go through the same sums: what does not follow differs by rounding at most.
    rounding = {dim: 1e-6 * float(plain[dim].abs().max()) for dim in plain}
    if all(bool((move[dim] <= rounding[dim]).all()) for move in moves for dim in move):
        return Unrelated.CONSTANT
    agreeing = []
    for layout in candidates(shape, range(min(leading, len(shape))), batch):
        fits = layout.dim in plain
        for own, move in zip(sets, moves, strict=True):
            if not fits:
                break
            rows = own.repeat_interleave(layout.inner).repeat(layout.outer)
            moved = move[layout.dim]
            limit = 1e-5 * float(moved[rows].max()) + rounding[layout.dim]
            fits = float(moved[~rows].max()) <= limit
        if fits:
            agreeing.append(layout)
    return agreeing[0] if len(agreeing) == 1 else Unrelated.UNCLEAR


def _follows(layout: Layout, plain: Tensor, rolled: Tensor) -> bool:
    """Whether each example's rows are what the next one's were, in the run of the rolled batch."""
    shape = (layout.outer, layout.batch, layout.inner)
    expected = plain.view(shape).roll(-1, 1)
    rounding = 1e-4 * float((plain.max() - plain.min()).abs())
    return bool(((rolled.view(shape) - expected).abs() <= rounding).all())


def verify(
    known: Verified,
    model: nn.Module,
    nodes: Mapping[int, tuple[Tensor, Node]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
) -> tuple[int, int]:
    """Learn where the examples lie in each use of parameters during ``model(*args, **kwargs)``.

    The forward pass runs on the batch, and again with some examples changed, each time from the
    same random states and without a trace in the model. A layout is accepted where it is the only
    one in which no row but those of the changed examples follows. One run has the batch rolled by
    one: where the rows are rolled with it, all examples are treated alike, so that those of one set
    speak for all; where they are not (dropout), more sets are changed.

    Args:
        known: added to.
        model: called as it is about to be, or just was.
        nodes: the parameters, and what was computed from them already.
        args: of the call.
        kwargs: of the call.
        batch: number of examples.

    Returns:
        The numbers of the path that the pass on the batch itself took.

    Raises:
        RuntimeError: an output mixes the examples.
    """
    if batch == 1:
        return 0, 0
    sets = _sets(batch, known.passes)
    rolled = torch.arange(batch).roll(-1)
    first = 1 if batch > _TOLD_APART else len(sets)
    inputs = [(args, kwargs), _reordered(args, kwargs, rolled)]
    inputs += [_change(args, kwargs, chosen) for chosen in sets[:first]]
    constants: set[Step] = set()
    while True:
        plain, moved, *changed = _run(model, nodes, inputs, batch, constants)
        decisions = _compare(plain, changed, sets[: len(changed)])
        # What follows from a new constant was not looked at: look again.
        found = {
            step for step, one in decisions.items() if one is Unrelated.CONSTANT and step[0] != -1
        }
        if not found <= constants:
            constants |= found
            continue
        if len(changed) == len(sets) or all(
            not isinstance(one, Layout) or plain.follows(step, one, moved)
            for step, one in decisions.items()
        ):
            break
        inputs += [_change(args, kwargs, chosen) for chosen in sets[first:]]
    decisions |= dict.fromkeys(constants, Unrelated.CONSTANT)
    unclear = {step for step, decision in decisions.items() if decision is Unrelated.UNCLEAR}
    # A use that mixes them says more than what comes out.
    outputs = set() if any(step[0] != -1 for step in unclear) else unclear
    for step in outputs:
        shape, _ = plain.shapes[step]
        if any(size and size % batch == 0 for size in shape):
            raise RuntimeError(
                f"output {step[1]} of the model, of shape {tuple(shape)}, mixes the {batch} "
                "examples of the batch: changing one of them changes others' rows. Examples that "
                "influence each other cannot be aligned (but through BatchNorm's statistics)"
            )
    known.decisions.update({s: d for s, d in decisions.items() if s[0] != -1})
    path = plain.end_path()
    while len(known.decisions) > _MOST_DECISIONS:
        known.decisions.popitem(last=False)
        known.paths.clear()
    known.paths.add(path)
    return path


def _run(
    model: nn.Module,
    nodes: Mapping[int, tuple[Tensor, Node]],
    inputs: list[Any],
    batch: int,
    constants: set[Step],
) -> list[_Fingerprints]:
    """The forward pass on each of the inputs, every time from the model's present state."""
    runs: list[_Fingerprints] = []
    saving = False
    for args, kwargs in inputs:
        statistics = runs[0].statistics if runs else None
        while True:
            run = _Fingerprints(nodes, batch, constants, statistics)
            try:
                with undisturbed(model), _graph(saving), run:
                    run.mark(_tensors((args, kwargs)), True)
                    run.start_path()
                    output = model(*args, **kwargs)
                    run.end_path()
                    for index, tensor in enumerate(_tensors(output)):
                        if tensor.requires_grad and run.origin(tensor) is not None:
                            run.record((-1, index), tensor, tensor, tensor.dim())
                del output
                break
            except _SavedTensorNeeded:
                saving = True
        runs.append(run)
    torch.clear_autocast_cache()
    return runs


class _SavedTensorNeeded(RuntimeError):
    """The forward pass runs a backward of its own."""


def _graph(saving: bool) -> contextlib.AbstractContextManager[object]:
    """A graph that keeps no activations, as long as no backward goes through it."""

    def needed(_: object) -> Tensor:
        raise _SavedTensorNeeded("a backward inside forward()")

    if saving:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, needed)


def _sets(batch: int, seed: int) -> list[Tensor]:
    """Which examples to change in each run, (batch,) bool.

    Up to six examples each is told from each other, both ways, by two to four runs. Of more, four
    runs tell any two apart with probability 15/16, and others when the verification is repeated.
    No shift of the batch maps the first set to itself: what treats all examples alike, and mixes
    each with another, is seen in it.
    """
    runs = next((n for n in (2, 3, 4) if math.comb(n, n // 2) >= batch), 4)
    if batch <= _TOLD_APART:
        codes = [c for c in range(2**runs) if c.bit_count() == runs // 2][:batch]
    else:
        generator = torch.Generator().manual_seed(seed)
        codes = (torch.randperm(batch, generator=generator) % 2**runs).tolist()
        while _repeats([code & 1 for code in codes]):
            codes = (torch.randperm(batch, generator=generator) % 2**runs).tolist()
    return [torch.tensor([bool(code >> run & 1) for code in codes]) for run in range(runs)]


def _repeats(values: list[int]) -> bool:
    """Whether a shift by less than their number maps the values to themselves."""
    return any(
        values == values[shift:] + values[:shift]
        for shift in range(1, len(values) // 2 + 1)
        if len(values) % shift == 0
    )


def _tensors(arguments: Any) -> list[Tensor]:
    return [value for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)]


def _reordered(args: Any, kwargs: Any, order: Tensor) -> Any:
    """The arguments with their examples in another order."""

    def reorder(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != order.shape:
            return tensor
        return tensor.detach()[order.to(tensor.device)].requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, reorder, (args, kwargs))


def _change(args: Any, kwargs: Any, chosen: Tensor) -> Any:
    """The arguments with the chosen examples replaced by one other: means move far.

    Examples that are equal to it are changed in another way.
    """
    batch = len(chosen)
    flat = [t for t in _tensors((args, kwargs)) if t.shape[:1] == (batch,)]
    source = int((~chosen).nonzero()[0])
    order = torch.where(chosen, source, torch.arange(batch))
    alike = chosen.clone()
    for tensor in flat:
        alike &= (
            (tensor == tensor[source]).reshape(batch, tensor[0].numel()).all(1).to(alike.device)
        )

    def change(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != (batch,):
            return tensor
        changed = tensor.detach()[order.to(tensor.device)].clone()
        rows = alike.to(tensor.device)
        if alike.any() and (tensor.is_floating_point() or tensor.is_complex()):
            changed[rows] = changed[rows] * 0.5 + 0.25
        elif alike.any():
            changed[rows] = torch.stack([_other_indices(row) for row in changed[rows]])
        return changed.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, change, (args, kwargs))


def _other_indices(row: Tensor) -> Tensor:
    """Other integers, that lie where the row's own do."""
    if row.dtype == torch.bool:
        return ~row
    rolled = row.flatten().roll(1).view_as(row)
    return rolled if not torch.equal(rolled, row) else torch.where(row == 0, 1, row - 1)


def _compare(
    plain: _Fingerprints, changed: list[_Fingerprints], sets: list[Tensor]
) -> dict[Step, Decision]:
    decisions: dict[Step, Decision] = {}
    for step, before in plain.seen.items():
        after = [run.seen.get(step) for run in changed]
        shape, leading = plain.shapes[step]
        if any(one is None or one.keys() != before.keys() for one in after):
            decisions[step] = Unrelated.UNCLEAR
            continue
        decisions[step] = _decide(
            shape, leading, before, [one for one in after if one is not None], sets
        )
    return decisions
