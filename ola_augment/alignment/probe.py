"""Verifying where the examples lie: change some of them and see which rows follow."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ola_augment.alignment.expressions import Node
from ola_augment.alignment.fingerprints import (
    Decision,
    Disturbance,
    Fingerprints,
    Step,
    Unrelated,
    compare,
    judged_again,
)
from ola_augment.alignment.layout import Layout
from ola_augment.alignment.snapshot import Undisturbed

#: Arguments of a run, each way to change them in turn.
Ways = Callable[[], Iterator[Any]]
#: Paths and decisions that are remembered for one signature.
_MOST_DECISIONS = 20_000
#: Up to this many examples all sets are looked at from the start: they are four at most.
_TOLD_APART = 6


@dataclass
class Verified:
    """What is known of the forward passes of one signature.

    Attributes:
        decisions: where the examples lie in each use, wherever a path led to it.
        paths: numbers of whole passes, and of the rows looked up, that were verified.
        endings: what lies between the last uses of parameters and losses that keep examples apart.
        passes: how many there were.
    """

    decisions: OrderedDict[Step, Decision] = field(default_factory=OrderedDict)
    paths: set[tuple[int, int]] = field(default_factory=set)
    endings: set[tuple[str, ...]] = field(default_factory=set)
    passes: int = 0


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
    speak for all; where they are not (dropout), all sets are changed. In the last run the rows of
    a set are moved in what comes out of each use too, lest mixing hides behind equal values.

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
    sets = sets_of(batch, known.passes)
    rolled = torch.arange(batch, device="cpu").roll(-1)
    undisturbed = Undisturbed(model)
    first = 1 if batch > _TOLD_APART else len(sets)
    disturbed = sets[-1:] if batch > _TOLD_APART else sets
    inputs: list[Ways] = [
        lambda: iter([(args, kwargs)]),
        lambda: iter([_reordered(args, kwargs, rolled)]),
    ]
    inputs += [functools.partial(_changes, args, kwargs, chosen) for chosen in sets[:first]]
    constants: set[Step] = set()
    while True:
        plain, moved, *changed = _run(model, undisturbed, nodes, inputs, batch, constants)
        decisions = compare(plain, changed, sets[: len(changed)])
        others = decisions
        while others:  # what is known of more uses tells of those behind them
            runs = [
                _run(
                    model,
                    undisturbed,
                    nodes,
                    [functools.partial(_changes, args, kwargs, chosen)],
                    batch,
                    constants,
                    plain,
                    (chosen, decisions),
                )[0]
                for chosen in disturbed
            ]
            others = judged_again(plain, runs, disturbed, decisions)
            decisions |= others
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
        inputs += [functools.partial(_changes, args, kwargs, chosen) for chosen in sets[first:]]
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
    undisturbed: Undisturbed,
    nodes: Mapping[int, tuple[Tensor, Node]],
    inputs: list[Ways],
    batch: int,
    constants: set[Step],
    plain: Fingerprints | None = None,
    disturbed: Disturbance | None = None,
) -> list[Fingerprints]:
    """The forward pass on each of the inputs, every time from the model's present state.

    Of several ways to change a batch the first one counts with which the pass takes the path of
    ``plain``, by default the first of the runs: masks and routes may depend on the examples.
    """
    runs: list[Fingerprints] = []
    saving = False
    for ways in inputs:
        for args, kwargs in ways():
            run: Fingerprints | None = None
            while run is None:
                run = Fingerprints(
                    nodes, batch, constants, plain.statistics if plain else None, disturbed
                )
                try:
                    with undisturbed, _graph(saving), run:
                        _forward(model, args, kwargs, run)
                except _SavedTensorNeeded:
                    saving, run = True, None
            plain = plain or run
            if run.path == plain.path:
                break
        assert run is not None
        runs.append(run)
    torch.clear_autocast_cache()
    return runs


def _forward(model: nn.Module, args: Any, kwargs: Any, run: Fingerprints) -> None:
    run.mark(_tensors((args, kwargs)), True)
    run.start_path()
    output = model(*args, **kwargs)
    run.end_path()
    for index, tensor in enumerate(_tensors(output)):
        if tensor.requires_grad and run.origin(tensor) is not None:
            run.record((-1, index), tensor, tensor, tensor.dim())


class _SavedTensorNeeded(RuntimeError):
    """The forward pass runs a backward of its own."""


def _graph(saving: bool) -> contextlib.AbstractContextManager[object]:
    """A graph that keeps no activations, as long as no backward goes through it."""

    def needed(_: object) -> Tensor:
        raise _SavedTensorNeeded("a backward inside forward()")

    if saving:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, needed)


def sets_of(batch: int, seed: int = 0) -> list[Tensor]:
    """Which examples to change in each run, (batch,) bool.

    Every example is changed in half of the runs, up to six in an order of their own, more in one
    drawn from the seed. Up to 70 examples any two differ, so that a run changes the one and not
    the other, both ways; of more, two are the same with probability 1/70, and others when the
    verification is repeated. No shift of the batch maps the first set to itself: what treats all
    examples alike, and mixes each with another, is seen in it.
    """
    runs = next((n for n in range(2, 8) if math.comb(n, n // 2) >= batch), 8)
    codes = [code for code in range(2**runs) if code.bit_count() == runs // 2]
    if batch <= _TOLD_APART:
        chosen = codes[:batch]
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = [0]
        while _repeats([code & 1 for code in chosen]):
            order = torch.randperm(
                -(-batch // len(codes)) * len(codes), generator=generator, device="cpu"
            )
            chosen = [codes[i % len(codes)] for i in order[:batch].tolist()]
    return [
        torch.tensor([bool(code >> run & 1) for code in chosen], device="cpu")
        for run in range(runs)
    ]


def _repeats(values: list[int]) -> bool:
    """Whether a shift by less than their number maps the values to themselves, or all are equal."""
    return len(set(values)) < 2 or any(
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


def _changes(args: Any, kwargs: Any, chosen: Tensor) -> Iterator[Any]:
    """Ways to replace the chosen examples: by one other, which moves means far, or by the next.

    The last resort, where that removes the only ones that need a mask, say: by each other.
    """
    batch = len(chosen)
    others = (~chosen).nonzero().flatten().tolist()
    for other in (others[0], others[-1]):
        yield _change(
            args, kwargs, chosen, torch.where(chosen, other, torch.arange(batch, device="cpu"))
        )
    flat = [t for t in _tensors((args, kwargs)) if t.shape[:1] == (batch,)]
    following = torch.arange(batch, device="cpu")
    for example in chosen.nonzero().flatten().tolist():
        following[example] = next(
            (
                other % batch
                for other in range(example + 1, example + batch)
                if not all(torch.equal(t[other % batch], t[example]) for t in flat)
            ),
            example,
        )
    yield _change(args, kwargs, chosen, following)
    among = torch.arange(batch, device="cpu")
    among[chosen] = among[chosen].roll(1)
    yield _change(args, kwargs, chosen, among)


def _change(args: Any, kwargs: Any, chosen: Tensor, order: Tensor) -> Any:
    """The arguments with each chosen example replaced by that at ``order``.

    Examples that are equal to it are changed in another way.
    """
    batch = len(chosen)
    alike = chosen.clone()
    for tensor in _tensors((args, kwargs)):
        if tensor.shape[:1] == (batch,):
            same = tensor == tensor[order.to(tensor.device)]
            alike &= same.reshape(batch, tensor[0].numel()).all(1).to(alike.device)

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
