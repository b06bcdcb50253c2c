"""One capture under way: hooks on the model, and their removal."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.alignment._fsdp import Along, Sharded
from ola_augment.alignment._torch import eagerly, in_backward
from ola_augment.alignment.calls.expressions import Leaf
from ola_augment.alignment.calls.handed import carry, innermost
from ola_augment.alignment.method.captured import Content
from ola_augment.alignment.method.freshness import Freshness
from ola_augment.alignment.method.means import Means
from ola_augment.alignment.method.recorder import Recorder
from ola_augment.alignment.method.storage import Storage
from ola_augment.alignment.proof import Examination, Proof

#: Parameters that a call of FSDP's leaves whole, by name.
Whole = Callable[[], Mapping[str, nn.Parameter]]


class Session:
    """Attaches the recorder to the model for the length of a capture.

    Args:
        model: the module whose calls are forward passes.
        parameters: those of its parameters that are trained, by name.
        storage: format of the pairs.
        fallback: differentiate functions without a rule.
        proof: what earlier captures verified; added to.
        direction: the reference gradient, if it is known.
        norms: of which parameters to gather the norms of the examples' gradients.
        mean: the losses are means, of which each example's own is wanted.
        sharded: of a model whose parameters processes share; ``direction`` is then `Along` them.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        storage: Storage,
        fallback: bool,
        proof: Proof,
        direction: Mapping[str, Tensor] | None,
        norms: Set[str],
        mean: bool,
        sharded: Sharded | None,
    ) -> None:
        self._model = model
        self._sharded = sharded
        self._parameters = parameters
        self._direction = direction
        self._examination = Examination(
            proof, model, parameters, storage.rounding, direction, sharded
        )
        #: As modules read them; those that processes share come to be with their first use.
        self._uses = dict(parameters) if sharded is None else sharded.whole()
        self._recorder = Recorder(
            self._uses,
            storage,
            fallback,
            direction,
            norms,
            self._examination,
            Means() if mean else None,
        )
        self._recorder.defers = sharded is not None
        self._thread = threading.get_ident()
        self._depth = 0
        self._passes = 0  # that were complete when the last one began
        self._along = False
        self._handles: list[Any] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._stack.callback(self._detach)
        self._handles.append(
            self._model.register_forward_pre_hook(
                self._before_forward, with_kwargs=True, prepend=True
            )
        )
        self._handles.append(
            self._model.register_forward_hook(
                self._after_forward, with_kwargs=True, always_call=True
            )
        )
        self._ids = [handle.id for handle in self._handles]
        self._model.__dict__["__deepcopy__"] = self._copied
        for name, parameter in self._uses.items():
            self._hook(name, parameter)
        if self._sharded is not None:
            assert isinstance(self._direction, Along)
            self._stack.enter_context(self._sharded.followed(self._follow, self._direction))
        self._stack.enter_context(eagerly())
        self._recorder.activate()
        self._stack.callback(self._recorder.deactivate)

    def __exit__(self, kind: object, *error: object) -> None:
        self._stack.close()
        if kind is not None:
            self._examination.failed()

    def _hook(self, name: str, parameter: Tensor) -> None:
        self._handles.append(
            parameter.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._receive(name, gradient)
            )
        )

    def _follow(self, call: Callable[[], Any], given: Any, whole: Whole) -> Any:
        """Of FSDP's hooks nothing is recorded but what they make of what they are given."""
        watch = innermost()
        if watch is None:
            return call()
        with watch.resting():
            result = call()
        for name, parameter in whole().items():
            watch.stands_for(parameter, Leaf(name))
            if name not in self._uses:
                self._uses[name] = parameter
                self._hook(name, parameter)
        with watch.refusing():
            carry(watch, given, result)
        return result

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of the model (a moving average, a teacher) is none of the capture."""
        with self._recorder.resting():
            hooks = self._model._forward_pre_hooks, self._model._forward_hooks
            own = [(one, {i: one.pop(i) for i in self._ids if i in one}) for one in hooks]
            del self._model.__dict__["__deepcopy__"]
            try:
                return copy.deepcopy(self._model, memo)
            finally:
                self._model.__dict__["__deepcopy__"] = self._copied
                for hooks_of_kind, removed in own:
                    hooks_of_kind.update(removed)

    def _detach(self) -> None:
        self._model.__dict__.pop("__deepcopy__", None)
        # A graph that outlives the capture may be run backward again: that is none of it.
        self._recorder.release()
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._rests() or not torch.is_grad_enabled():
            return
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "the model was called in another thread than capture(), which sees its own alone: "
                "enter capture() in the thread that calls the model"
            )
        self._depth += 1
        if self._depth == 1:  # or the model calls itself
            self._passes = len(self._recorder.tapes)
            self._at_ends(args, kwargs, lambda: self._recorder.start_pass(args, kwargs))

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._rests() or not torch.is_grad_enabled() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        if output is None and sys.exc_info()[0] is not None:
            self._drop()
        else:
            self._at_ends(args, kwargs, lambda: self._recorder.end_pass(args, kwargs, output))

    def _drop(self) -> None:
        """The forward pass failed: whoever called it may go on, with fewer examples at once."""
        del self._recorder.tapes[self._passes :]
        self._recorder.end_path()
        self._examination.failed()

    def _rests(self) -> bool:
        """Whether a forward pass is none of the capture's; checkpoints repeat those that are."""
        if in_backward():
            return True
        return self._along if self._recorder.refused else self._recorder.paused

    def _at_ends(self, args: Any, kwargs: Any, examine: Callable[[], None]) -> None:
        """At the beginning or the end of a pass; after a refusal in step with the others."""
        if self._recorder.refused is None:
            with self._recorder.refusing():
                examine()
            return
        self._along = True
        try:
            self._examination.along(args, kwargs)
        finally:
            self._along = False

    def _receive(self, name: str, gradient: Tensor) -> None:
        if not self._recorder.paused:
            with self._recorder.refusing():
                self._examination.receive(name, gradient)

    def finish(self, loss_scale: float) -> Content:
        """Check what was recorded and hand it out.

        Raises:
            RuntimeError: no backward, or a gradient that the terms do not explain.
        """
        recorder, tapes = self._recorder, self._recorder.tapes
        try:
            with self._examination.agreed():
                if recorder.refused is not None:
                    raise recorder.refused
                if not tapes:
                    raise RuntimeError(
                        "the model was not called inside capture(): call it itself, not its parts "
                        "or methods, or give the engine a module whose forward() calls them; "
                        "under a checkpoint, take use_reentrant=False"
                    )
                explained = {name for tape in tapes for name in tape.explained()}
                if self._direction is not None:
                    explained |= self._parameters.keys() - self._direction.keys()
                received = self._examination.conclude(explained, recorder.constant)
                means = recorder.means
                factors = [
                    (1.0 if means is None else means.of(number)) / loss_scale
                    for number in range(len(tapes))
                ]
                if self._sharded is not None:
                    found = [one for tape in tapes for one in tape.contracted]
                    self._examination.sums.compare(found, self._direction or {})
        except (RuntimeError, ValueError):
            self._examination.failed()
            raise
        parameters = self._parameters.values()
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        like = torch.empty(
            0,
            dtype=torch.float64 if double else torch.float32,
            device=next(iter(parameters)).device,
        )
        norms = [
            tape.norms.total(tape.values, like.new_empty(tape.batch)) * factor
            for tape, factor in zip(tapes, factors, strict=True)
            if tape.norms is not None
        ]
        return Content(
            tapes,
            factors,
            # A capture that has its reference gradient waits for no other.
            Freshness(self._parameters, received if self._direction is None else ()),
            self._examination.sums if self._sharded is None else None,
            self._direction,
            like,
            torch.cat(norms).to(like) if norms else None,
        )
