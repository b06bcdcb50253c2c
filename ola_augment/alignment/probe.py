"""Verifying where the examples lie: change one of them and see which rows follow."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ola_augment.alignment.expressions import Leaf, writes_in_place
from ola_augment.alignment.layout import Layout, candidates
from ola_augment.alignment.rules import RULES
from ola_augment.alignment.tracking import Function, Tracker, outputs_of

_BATCH_NORM = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip

# One use of parameters: the function, the parameters it reads, the shape of its output.
Key = tuple[Function, frozenset[str], torch.Size]


class Unrelated(Enum):
    """What changed examples say about a use whose examples do not lie along one dimension."""

    CONSTANT = "the values are the same whatever the examples are"
    UNCLEAR = "no layout, or more than one, agrees with what changed"


Decision = Layout | Unrelated


class _Fingerprints(Tracker):
    """Records, per use of parameters, a projection of its subject along each dimension."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buffers: list[Tensor],
        batch: int,
        constants: set[Key],
        statistics: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        super().__init__(parameters, buffers)
        # Batch statistics of the run on the batch itself: BatchNorm's share of the other examples
        # is documented, and must not hide what else mixes them.
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self._given = statistics
        self.batch = batch
        self.constants = constants
        self.seen: dict[Key, list[dict[int, Tensor]]] = defaultdict(list)
        self.leading: dict[Key, int] = {}

    def use(self, function: Function, args: Any, kwargs: Any, from_data: bool) -> Any:
        inputs = args[:1]
        rule = RULES.get(function)
        on_input = rule is not None and rule.subject is not None and inputs
        # An in-place function overwrites its input: look at it before.
        subject = inputs[0].detach().clone() if on_input and from_data else None
        names = self.names(args, kwargs)
        read = self.read(args, kwargs)
        result = self._call(function, args, kwargs)
        constant = {}
        for index, output in enumerate(outputs_of(function, args, result)):
            key = (function, names, output.shape)
            if not from_data or key in self.constants:
                constant[index] = output
                continue
            if writes_in_place(function):
                self.forget(output)
            leading = output.dim() if rule is None else rule.leading(*args, output=output, **kwargs)
            self.leading[key] = leading
            self.seen[key].append(self._project(output if subject is None else subject, leading))
        if not isinstance(self.node(args[0]), Leaf) or not writes_in_place(function):
            self.follow(function, read, constant)
        return result

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        return self._call(function, args, kwargs)

    def _call(self, function: Function, args: Any, kwargs: Any) -> Any:
        if function is not F.batch_norm:
            return function(*args, **kwargs)
        given = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
        if given.get("training", False):
            x, seen = given["input"].detach(), len(self.statistics)
            if self._given is not None and seen < len(self._given):
                mean, variance = self._given[seen]
            else:
                dims = [d for d in range(x.dim()) if d != 1]
                wide = x.double() if x.dtype == torch.float64 else x.float()
                variance, mean = torch.var_mean(wide, dims, correction=0)
            self.statistics.append((mean, variance))
            given |= {"running_mean": mean, "running_var": variance, "training": False}
        return function(**given)

    def _project(self, tensor: Tensor, leading: int) -> dict[int, Tensor]:
        """Dimension -> (its size,) random projection of the others; -1: of everything, (1,)."""
        tensor = tensor.detach()
        tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if tensor.numel() and not float(tensor.abs().max()) < 1e30:
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
    key: Key,
    leading: int,
    plain: dict[int, Tensor],
    changed: list[dict[int, Tensor]],
    examples: list[int],
    batch: int,
) -> Decision | None:
    """Where the examples of one use lie; None where its values are not finite.

    Args:
        key: the use.
        leading: how many dimensions may hold the examples.
        plain: dimension -> projection, of the batch itself.
        changed: the same for each run in which one example was changed.
        examples: which one it was, for each run.
        batch: number of examples.
    """
    runs = [plain, *changed]
    if not all(bool(torch.isfinite(values).all()) for run in runs for values in run.values()):
        return None
    moves = [{dim: (run[dim] - plain[dim]).abs() for dim in plain} for run in changed]
    # The same rows go through the same sums: what does not follow differs by rounding at most.
    if all(
        bool((move[dim] <= 1e-6 * plain[dim].abs().max()).all()) for move in moves for dim in move
    ):
        return Unrelated.CONSTANT
    agreeing = []
    for layout in candidates(key[2], range(min(leading, len(key[2]))), batch):
        fits = True
        for example, move in zip(examples, moves, strict=True):
            owners = torch.arange(batch).repeat_interleave(layout.inner).repeat(layout.outer)
            own = owners == example
            moved = move[layout.dim]
            fits &= float(moved[~own].max()) <= 1e-3 * float(moved[own].max())
        if fits:
            agreeing.append(layout)
    return agreeing[0] if len(agreeing) == 1 else Unrelated.UNCLEAR


def find_layouts(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
) -> dict[Key, Decision]:
    """Where the examples lie in each use of the parameters during ``model(*args, **kwargs)``.

    The forward pass runs without gradients on the batch, and again with its first and with its
    last example changed, each time from the same random states; these and the buffers are left as
    they were. A layout is accepted where it is the only one whose rows of the changed example are
    those that follow. Uses whose values are not finite are absent.
    """
    examples = [0, batch - 1]
    inputs = [(args, kwargs), *(_change(args, kwargs, batch, example) for example in examples)]
    buffers = list(model.buffers())
    constants: set[Key] = set()
    while True:
        runs: list[_Fingerprints] = []
        for arguments, named in inputs:
            statistics = runs[0].statistics if runs else None
            fingerprints = _Fingerprints(parameters, buffers, batch, constants, statistics)
            with torch.enable_grad(), _undisturbed(model, parameters), fingerprints:
                model(*arguments, **named)
            runs.append(fingerprints)
        decisions = _compare(runs[0], runs[1:], examples)
        # What follows from a new constant was not looked at: look again.
        found = {key for key, decision in decisions.items() if decision is Unrelated.CONSTANT}
        if not found:
            return {**decisions, **dict.fromkeys(constants, Unrelated.CONSTANT)}
        constants |= found


def _change(args: Any, kwargs: Any, batch: int, example: int) -> Any:
    """The arguments with one example replaced by another one of the batch that differs from it."""
    flat = [
        t for t in tree_flatten((args, kwargs))[0]
        if isinstance(t, Tensor) and t.shape[:1] == (batch,)
    ]  # fmt: skip
    differing = (
        other
        for other in (*range(example + 1, batch), *range(example))
        if any(not torch.equal(t[other], t[example]) for t in flat)
    )
    other = next(differing, None)

    def change(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != (batch,):
            return tensor
        changed = tensor.detach().clone()
        if other is not None:
            changed[example] = tensor[other]
        elif tensor.is_floating_point() or tensor.is_complex():
            changed[example] = tensor[example] * 0.5 + 0.25
        else:
            changed[example] = _other_indices(tensor[example])
        return changed

    return tree_map_only(Tensor, change, (args, kwargs))


def _other_indices(row: Tensor) -> Tensor:
    """Other integers, that lie where the row's own do."""
    if row.dtype == torch.bool:
        return ~row
    rolled = row.flatten().roll(1).view_as(row)
    return rolled if not torch.equal(rolled, row) else torch.where(row == 0, 1, row - 1)


def _compare(
    plain: _Fingerprints, changed: list[_Fingerprints], examples: list[int]
) -> dict[Key, Decision]:
    decisions: dict[Key, Decision] = {}
    for key, occurrences in plain.seen.items():
        others = [run.seen.get(key, []) for run in changed]
        if any(len(run) != len(occurrences) for run in others):
            decisions[key] = Unrelated.UNCLEAR
            continue
        found = {
            _decide(key, plain.leading[key], before, list(after), examples, plain.batch)
            for before, *after in zip(occurrences, *others, strict=True)
        }
        if len(found) > 1:
            decisions[key] = Unrelated.UNCLEAR
        elif (decision := found.pop()) is not None:
            decisions[key] = decision
    return decisions


@contextlib.contextmanager
def _undisturbed(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Leave random states and buffers as they are."""
    devices = {p.device for p in parameters.values() if p.device.type == "cuda"}
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=list(devices)):
        try:
            # New storage for the while: the old one, and its version, stay untouched.
            for buffer, data in buffers:
                buffer.data = data.clone()
            yield
        finally:
            for buffer, data in buffers:
                buffer.data = data
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
