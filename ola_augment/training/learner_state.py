"""A learner's state: what is saved, and how one that does not fit is refused before any change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ola_augment.files import describe_policy
from ola_augment.training.given import are_counts
from ola_augment.training.rejoin import check_state
from ola_augment.training.stepping import Stepping

_VERSION = 4


def saved(learner: Stepping) -> dict[str, Any]:
    """See :meth:`OLALearner.state_dict`."""
    refuse_under_way(learner, "saved", "save")
    generator = learner.transform.generator
    parts = {**_parts(learner), "rejoin_half": learner._rejoin_half}
    state = {
        "version": _VERSION,
        "policy_kind": describe_policy(learner.policy),
        "policy": dict(learner.policy.state_dict()),
        "updater": learner.updater.state_dict(),
        "generator": None if generator is None else generator.get_state(),
        "pairs": learner.pairs,
        "epoch": learner.epoch.state_dict(),
        "flat": learner._flats.state_dict(),
        "skipped": dict(learner.skipped),
        "half": learner._pair.half,
        "lost": learner._pair.lost,
        **{name: None if part is None else part.state_dict() for name, part in parts.items()},
    }
    return {**state, "entries": _entries(state)}


def _parts(learner: Stepping) -> dict[str, Any]:
    """Those that a learner has or has not, by their names in the state."""
    return {
        "held_out": learner._held_out,
        "thermostat": learner.thermostat,
        "trial": learner.trial,
        "rejoin": learner._rejoin,
    }


def refuse_under_way(learner: Stepping, done: str, do: str) -> None:
    """Refuse to do something between the halves of a pair that awaits its reward.

    Raises:
        RuntimeError: one is under way.
    """
    waits = learner.learns and learner._held_out is None
    if learner._pair.half and (waits or not learner._pair.ended):
        when = "after its second step"
        if not waits:
            when = "after optimizer.step(), with accumulated gradients after the last micro-batch"
        raise RuntimeError(
            f"a pair is under way and its capture cannot be {done}: {do} {when}, or call drop() "
            "first and lose its reward"
        )


def load(learner: Stepping, state: Mapping[str, Any]) -> None:
    """See :meth:`OLALearner.load_state_dict`."""
    restore = _checked(learner, state)
    generator = learner.transform.generator
    before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    try:
        if generator is not None:
            torch.Generator().set_state(state["generator"])
        learner.policy.load_state_dict(state["policy"])
        learner.updater.load_state_dict(state["updater"])
        if learner.thermostat is not None:
            learner.thermostat.load_state_dict(state["thermostat"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        learner.policy.load_state_dict(before)
        raise ValueError(f"state does not fit this learner: {error}") from error
    if generator is not None:
        generator.set_state(state["generator"])
    for part in restore:
        part()
    if learner._rejoin is not None:
        learner._rejoin.load_state_dict(state["rejoin"])
        learner._rejoin_half = None
        if state["rejoin_half"] is not None:
            learner._half_of_held_out().load_state_dict(state["rejoin_half"])
    learner._forget()
    learner._flats.load_state_dict(state["flat"])
    learner.epoch.load_state_dict(state["epoch"])
    learner.pairs, pair = state["pairs"], learner._pair
    pair.skipped = Counter(state["skipped"])
    pair.lost = bool(state.get("lost", False))
    pair.half, pair.ended, pair.settled = state.get("half", ""), True, True


def _checked(learner: Stepping, state: Any) -> list[Callable[[], None]]:
    """Functions that restore what can be checked without a change."""
    if not isinstance(state, Mapping) or state.get("version") != _VERSION:
        raise ValueError(f"not a state of OLALearner of version {_VERSION}")
    kind = describe_policy(learner.policy)
    if state.get("policy_kind") != kind:
        raise ValueError(
            f"state is of another policy or space: {state.get('policy_kind')!r}, this learner "
            f"has {kind!r}"
        )
    parts = {"generator": learner.transform.generator, **_parts(learner)}
    for name, part in parts.items():
        if (part is None) != (state.get(name) is None):
            raise ValueError(f"state is of a learner with another {name}, or without one")
    half = state.get("half", "")
    if half not in ("", "plain" if learner.plain_first else "augmented"):
        raise ValueError(f"state is of a learner with another order of halves: {half!r}")
    pairs, skipped = state.get("pairs"), state.get("skipped")
    flat, epoch = state.get("flat"), state.get("epoch")
    counts = [pairs]
    for some in (skipped, flat, epoch):
        counts += some.values() if isinstance(some, Mapping) else [None]
    if not are_counts(*counts):
        raise ValueError(f"state is damaged: counts {pairs}, {epoch}, {skipped} and {flat}")
    for name in ("rejoin", "rejoin_half"):
        if state.get(name) is not None:
            check_state(state[name])
    restore = []
    if learner._held_out is not None:
        restore.append(learner._held_out.checked(state["held_out"], learner._model))
    if learner.trial is not None:
        restore.append(learner.trial.checked(state["trial"], learner._model))
    found = _entries({name: value for name, value in state.items() if name != "entries"})
    if found != state.get("entries"):
        raise ValueError(
            f"state is damaged: {found} entries of {state.get('entries')}. "
            "torch.distributed.checkpoint loads only the keys that a new learner has already: "
            "store the state as bytes (torch.save into an io.BytesIO), in a single entry"
        )
    return restore


def _entries(state: Any) -> int:
    """How many numbers, texts and tensors a nested state holds."""
    if isinstance(state, Mapping):
        return sum(map(_entries, state.values()))
    return sum(map(_entries, state)) if isinstance(state, (list, tuple)) else 1
