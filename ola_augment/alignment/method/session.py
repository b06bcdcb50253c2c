"""One capture under way: hooks on the model, and their removal."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.alignment._torch import eagerly
from ola_augment.alignment.method.captured import Content
from ola_augment.alignment.method.freshness import Freshness
from ola_augment.alignment.method.means import Means
from ola_augment.alignment.method.recorder import Recorder
from ola_augment.alignment.method.storage import Storage
from ola_augment.alignment.proof import Examination, Proof


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
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._direction = direction
        self._examination = Examination(proof, model, parameters, storage.rounding, direction)
        self._recorder = Recorder(
            parameters,
            storage,
            fallback,
            direction,
            norms,
            self._examination,
            Means() if mean else None,
        )
        self._depth = 0
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
            self._model.register_forward_hook(self._after_forward, with_kwargs=True)
        )
        self._ids = [handle.id for handle in self._handles]
        self._model.__dict__["__deepcopy__"] = self._copied
        for name, parameter in self._parameters.items():
            self._handles.append(
                parameter.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad, name=name: self._receive(name, grad)
                )
            )
        self._stack.enter_context(eagerly())
        self._recorder.activate()
        self._stack.callback(self._recorder.deactivate)

    def __exit__(self, kind: object, *error: object) -> None:
        self._stack.close()
        if kind is not None:
            self._examination.failed()

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
        if self._recorder.paused or not torch.is_grad_enabled():
            return
        self._depth += 1
        if self._depth == 1:  # or the model calls itself
            self._recorder.start_pass(args, kwargs)

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._recorder.paused or not torch.is_grad_enabled() or not self._depth:
            return
        self._depth -= 1
        if not self._depth:
            self._recorder.end_pass(args, kwargs, output)

    def _receive(self, name: str, gradient: Tensor) -> None:
        if not self._recorder.paused:
            self._examination.receive(name, gradient)

    def finish(self, loss_scale: float) -> Content:
        """Check what was recorded and hand it out.

        Raises:
            RuntimeError: no backward, or a gradient that the terms do not explain.
        """
        recorder, tapes = self._recorder, self._recorder.tapes
        try:
            if not tapes:
                raise RuntimeError("the model was not called inside capture()")
            explained = {name for tape in tapes for name in tape.explained()}
            if self._direction is not None:
                explained |= self._parameters.keys() - self._direction.keys()
            received = self._examination.conclude(explained, recorder.constant)
            means = recorder.means
            factors = [
                (1.0 if means is None else means.of(number)) / loss_scale
                for number in range(len(tapes))
            ]
        except RuntimeError:
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
            self._examination.sums,
            self._direction,
            like,
            torch.cat(norms).to(like) if norms else None,
        )
