"""One capture under way: hooks on the model, their removal, and the checks at its end."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ola_augment.alignment._torch import eagerly, unwatched, without
from ola_augment.alignment.probe import Verified, verify
from ola_augment.alignment.recorder import Recorder
from ola_augment.alignment.snapshot import Restore, random_states
from ola_augment.alignment.storage import Storage
from ola_augment.alignment.sums import SumCheck, unexplained
from ola_augment.alignment.tape import Content, Freshness

#: Shapes whose layouts are remembered; the one used longest ago is forgotten first.
_SIGNATURES = 64


class Layouts:
    """What earlier captures verified, by the signature of the forward pass."""

    def __init__(self) -> None:
        self._known: OrderedDict[object, Verified] = OrderedDict()
        self._random = random.Random(0)

    def of(self, signature: object) -> Verified:
        """What is known of a signature, nothing at first."""
        known = self._known.pop(signature, None) or Verified()
        self._known[signature] = known
        if len(self._known) > _SIGNATURES:
            self._known.popitem(last=False)
        return known

    def due(self, known: Verified) -> bool:
        """Whether to verify before the pass.

        The first two times, as long as most passes take new paths, and ever more rarely at random.
        """
        known.passes += 1
        restless = 2 * len(known.paths) > known.passes
        return known.passes <= 2 or restless or self._random.random() < 2 / known.passes

    def forget(self, signature: object) -> None:
        """It belongs to a capture that failed."""
        self._known.pop(signature, None)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


class Session:
    """Attaches the recorder to the model for the length of a capture.

    Args:
        model: the module whose calls are forward passes.
        parameters: those of its parameters that are trained, by name.
        storage: format of the pairs.
        fallback: differentiate functions without a rule.
        layouts: what earlier captures verified; added to.
        direction: the reference gradient, if it is known.
        norms: gather the norms of the examples' gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        storage: Storage,
        fallback: bool,
        layouts: Layouts,
        direction: Mapping[str, Tensor] | None,
        norms: bool,
    ) -> None:
        self._model = model
        self._layouts = layouts
        self.parameters = parameters
        self.check = SumCheck(storage.rounding if direction is None else 0.0, direction)
        self.recorder = Recorder(
            model, self.parameters, storage, fallback, direction, norms, self.check
        )
        self.received: set[str] = set()
        self._depth = 0
        self._restore_random: Restore | None = None
        self._pass: tuple[object, Verified] | None = None
        self._signatures: list[object] = []
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
        for name, parameter in self.parameters.items():
            self._handles.append(
                parameter.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad, name=name: self._receive(name, grad)
                )
            )
        self._stack.enter_context(eagerly())
        self._stack.enter_context(self.recorder)

    def __exit__(self, kind: object, *error: object) -> None:
        self._stack.close()
        if kind is not None:
            self.forget()

    def forget(self) -> None:
        """The capture failed: nothing of it counts as verified."""
        for signature in self._signatures:
            self._layouts.forget(signature)

    def _detach(self) -> None:
        # A graph that outlives the capture may be run backward again: that is none of it.
        self.recorder.release()
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pass begins: learn its batch and, when it is due, verify it."""
        if self.recorder.paused or not torch.is_grad_enabled():
            return
        self._depth += 1
        if self._depth > 1:  # the model calls itself
            return
        with unwatched():
            tensors = _tensors(args, kwargs)
            signature = self._signature(tensors)
            batch, device = tensors[0].shape[0], tensors[0].device
        known = self._layouts.of(signature)
        if self._layouts.due(known):
            self._signatures.append(signature)
            self.recorder.verifying = True
            self._verify(known, args, kwargs, batch)
        self._pass = (signature, known)
        self._restore_random = random_states(device) if batch > 1 else None
        self.recorder.start_pass(batch, tensors, known)

    def _signature(self, tensors: list[Tensor]) -> object:
        """What two forward passes must have in common for what was verified to hold for both.

        Raises:
            ValueError: there is no batch among the tensors of a call, or an empty one.
        """
        if not tensors:
            raise ValueError("the model was called without a tensor: no batch to align")
        if not tensors[0].shape[0]:
            raise ValueError(f"the batch is empty: an input has shape {tuple(tensors[0].shape)}")
        return (
            tuple((t.shape, t.dtype) for t in tensors),
            tuple(module.training for module in self._model.modules()),
            frozenset(self.parameters),
            torch.is_autocast_enabled(tensors[0].device.type),
        )

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The pass ends: verify its path if it is a new one."""
        if self.recorder.paused or not torch.is_grad_enabled() or not self._depth:
            return
        self._depth -= 1
        if self._depth or self._pass is None:
            return
        path = self.recorder.end_path()
        signature, known = self._pass
        batch = self.recorder.tapes[-1].batch
        if self._restore_random is not None and path not in known.paths:
            self._signatures.append(signature)
            self.recorder.verifying = True
            after = random_states(next(iter(self.parameters.values())).device)
            self._restore_random()
            try:
                found = self._verify(known, args, kwargs, batch)
            finally:
                after()
            if found != path:
                raise RuntimeError(
                    "the model's forward pass took another path when it was repeated on the same "
                    "batch from the same random state (a step counter, a random state of its own?):"
                    " it cannot be verified"
                )
            self.recorder.settle(known.decisions)

    def _verify(self, known: Verified, args: Any, kwargs: Any, batch: int) -> tuple[int, int]:
        before, self.recorder.paused = self.recorder.paused, True
        try:
            with without(self.recorder):
                return verify(known, self._model, self.recorder.nodes, args, kwargs, batch)
        finally:
            self.recorder.paused = before

    def _receive(self, name: str, gradient: Tensor) -> None:
        if self.recorder.paused:
            return
        self.received.add(name)
        self.check.receive(name, gradient)
        if self.recorder.verifying:
            self.recorder.exact.receive(name, gradient)

    def finish(self, reduction: str, loss_scale: float) -> Content:
        """Check what was recorded and hand it out.

        Raises:
            RuntimeError: no backward, or a gradient that the terms do not explain.
        """
        try:
            self._check(reduction)
        except RuntimeError:
            self.forget()
            raise
        tapes = self.recorder.tapes
        parameters = self.parameters.values()
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        like = torch.empty(
            0,
            dtype=torch.float64 if double else torch.float32,
            device=next(iter(parameters)).device,
        )
        factors = [(tape.batch if reduction == "mean" else 1) / loss_scale for tape in tapes]
        norms = [
            tape.norms.total(self.recorder.values, like.new_empty(tape.batch)) * factor
            for tape, factor in zip(tapes, factors, strict=True)
            if tape.norms is not None
        ]
        return Content(
            tapes,
            factors,
            self.recorder.values,
            # A capture that has its reference gradient waits for no other.
            Freshness(self.parameters, self.received if self.recorder.direction is None else ()),
            self.check,
            self.recorder.direction,
            like,
            torch.cat(norms) if norms else None,
        )

    def _check(self, reduction: str) -> None:
        recorder = self.recorder
        if not recorder.tapes:
            raise RuntimeError("the model was not called inside capture()")
        if not self.received:
            raise RuntimeError(
                "no gradient reached the model's parameters inside capture(): run the backward of "
                "a loss that depends on the model inside it, without set_to_none in between"
            )
        missed = self.received - {name for tape in recorder.tapes for name in tape.explained()}
        if recorder.direction is not None and recorder.tapes[0].norms is None:
            missed &= recorder.direction.keys()
        if missed:
            raise RuntimeError(unexplained(missed))
        if reduction == "mean" and "sum" in recorder.loss_reductions:
            raise RuntimeError(
                'reduction="mean" was declared, but the loss inside capture() has reduction="sum"'
            )
        if recorder.verifying:
            recorder.exact.compare(recorder.along_random, recorder.random)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    plain = not kwargs and all(isinstance(value, Tensor) for value in args)
    flat = args if plain else tree_flatten((args, kwargs))[0]
    return [value for value in flat if isinstance(value, Tensor) and value.dim()]
