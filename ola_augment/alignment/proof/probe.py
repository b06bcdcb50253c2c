"""Verifying where the examples lie: change some of them and see which rows follow."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.alignment.calls.expressions import Node
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.watch import Step
from ola_augment.alignment.proof.changes import (
    TOLD_APART,
    changes,
    reordered,
    sets_of,
    tensors_of,
)
from ola_augment.alignment.proof.decisions import Unrelated, compare, judged_again
from ola_augment.alignment.proof.fingerprints import Disturbance, Fingerprints
from ola_augment.alignment.proof.known import Verified
from ola_augment.alignment.proof.ranks import Ranks
from ola_augment.alignment.proof.snapshot import Undisturbed

#: Arguments of a run, each way to change them in turn.
Ways = Callable[[], Iterator[Any]]
#: Stands for a call, for what the model returns.
_OUTPUT = -1
#: Paths and decisions that are remembered for one signature.
_MOST_DECISIONS = 20_000


def verify(
    known: Verified,
    model: nn.Module,
    nodes: Mapping[int, tuple[Tensor, Node]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
    ranks: Ranks,
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
        ranks: told before every pass.

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
    first = 1 if batch > TOLD_APART else len(sets)
    disturbed = sets[-1:] if batch > TOLD_APART else sets
    inputs: list[Ways] = [
        lambda: iter([(args, kwargs)]),
        lambda: iter([reordered(args, kwargs, rolled)]),
    ]
    inputs += [functools.partial(changes, args, kwargs, chosen) for chosen in sets[:first]]
    constants: set[Step] = set()
    while True:
        plain, moved, *changed = _run(model, undisturbed, nodes, inputs, batch, constants, ranks)
        decisions = compare(plain, changed, sets[: len(changed)])
        others = decisions
        while others:  # what is known of more uses tells of those behind them
            runs = [
                _run(
                    model,
                    undisturbed,
                    nodes,
                    [functools.partial(changes, args, kwargs, chosen)],
                    batch,
                    constants,
                    ranks,
                    plain,
                    (chosen, decisions),
                )[0]
                for chosen in disturbed
            ]
            others = judged_again(plain, runs, disturbed, decisions)
            decisions |= others
        # What follows from a new constant was not looked at: look again.
        found = {
            step for step, one in decisions.items() if one is Unrelated.CONSTANT and _is_use(step)
        }
        if not found <= constants:
            constants |= found
            continue
        if len(changed) == len(sets) or all(
            not isinstance(one, Layout) or step[1] < 0 or plain.follows(step, one, moved)
            for step, one in decisions.items()
        ):
            break
        inputs += [functools.partial(changes, args, kwargs, chosen) for chosen in sets[first:]]
    decisions |= dict.fromkeys(constants, Unrelated.CONSTANT)
    unclear = {step for step, decision in decisions.items() if decision is Unrelated.UNCLEAR}
    # A use that mixes them says more than what comes out.
    outputs = () if any(map(_is_use, unclear)) else [s for s in unclear if s[0] == _OUTPUT]
    for step in outputs:
        shape, _ = plain.shapes[step]
        if any(size and size % batch == 0 for size in shape):
            raise RuntimeError(
                f"output {step[1]} of the model, of shape {tuple(shape)}, mixes the {batch} "
                "examples of the batch: changing one of them changes others' rows. Examples that "
                "influence each other cannot be aligned (but through BatchNorm's statistics). "
                "An argument with as many rows is taken for theirs: make a table that only happens "
                "to have as many a buffer"
            )
    known.decisions.update({s: d for s, d in decisions.items() if s[0] != _OUTPUT})
    path = plain.walked(known.decisions)
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
    ranks: Ranks,
    plain: Fingerprints | None = None,
    disturbed: Disturbance | None = None,
) -> list[Fingerprints]:
    """The forward pass on each of the inputs, every time from the model's present state.

    Of several ways to change a batch the first one counts with which the pass takes the path of
    ``plain``, by default the first of the runs: masks and routes may depend on the examples.
    """
    runs: list[Fingerprints] = []
    saving = ranks.together  # no pass may end halfway
    for ways in inputs:
        for args, kwargs in ways():
            run: Fingerprints | None = None
            while run is None:
                run = Fingerprints(
                    nodes, batch, constants, plain.statistics if plain else None, disturbed
                )
                run.defers = ranks.together  # no pass may end halfway
                ranks.another()
                calls = ranks.calls()
                try:
                    with undisturbed, _graph(saving), run:
                        _forward(model, args, kwargs, run)
                except RuntimeError as error:
                    if saving or not _needs_savedtensors_of(error):
                        raise
                    saving, run = True, None
            if run.refused is not None:
                raise run.refused
            ranks.together = ranks.together or ranks.calls() > calls
            plain = plain or run
            if run.path == plain.path:
                break
        assert run is not None
        runs.append(run)
    torch.clear_autocast_cache()
    return runs


def repeat(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Run the forward pass again for what it does to other processes."""
    with Undisturbed(model):
        model(*args, **kwargs)


def _forward(model: nn.Module, args: Any, kwargs: Any, run: Fingerprints) -> None:
    run.mark(tensors_of((args, kwargs)), True)
    run.start_path(run.batch)
    output = model(*args, **kwargs)
    run.end_path()
    for index, tensor in enumerate(tensors_of(output)):
        if tensor.requires_grad and run.origin(tensor) is not None:
            run.record((_OUTPUT, index), tensor, tensor, tensor.dim())


def _is_use(step: Step) -> bool:
    """Whether it is one of parameters, not what is looked up in or returned."""
    return step[0] != _OUTPUT and step[1] >= 0


class _SavedTensorNeeded(RuntimeError):
    """The forward pass runs a backward of its own."""


def _needs_savedtensors_of(error: RuntimeError) -> bool:
    """Whether a pass failed for want of them; torch.func refuses hooks on saved tensors."""
    return isinstance(error, _SavedTensorNeeded) or "saved tensor hooks" in str(error)


@contextlib.contextmanager
def _graph(saving: bool) -> Iterator[None]:
    """A graph that keeps no activations, as long as no backward goes through it."""

    def needed(_: object) -> Tensor:
        raise _SavedTensorNeeded("a backward inside forward()")

    if saving:
        yield
        return
    with (
        warnings.catch_warnings(),
        torch.autograd.graph.saved_tensors_hooks(lambda _: None, needed),
    ):
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        yield
