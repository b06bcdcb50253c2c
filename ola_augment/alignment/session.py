"""One capture under way: hooks on the model, their removal, and the checks at its end."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ola_augment.alignment.captured import Captured, Reference
from ola_augment.alignment.probe import Decision, Key, find_layouts
from ola_augment.alignment.recorder import Recorder
from ola_augment.alignment.storage import Storage
from ola_augment.alignment.validation import trainable_parameters


class Session:
    """Attaches the recorder to the model for the length of a capture.

    Args:
        model: the module whose calls are forward passes.
        storage: format of the pairs.
        fallback: differentiate functions without a rule.
        layouts: what earlier captures verified, by signature; added to when this one succeeds.
    """

    def __init__(
        self,
        model: nn.Module,
        storage: Storage,
        fallback: bool,
        layouts: dict[object, dict[Key, Decision]],
    ) -> None:
        self._model = model
        self._verified = layouts
        self._layouts = dict(layouts)
        self.parameters = trainable_parameters(model)
        self.recorder = Recorder(self.parameters, model.buffers(), storage, fallback)
        self.received: set[str] = set()
        self._projected: dict[str, float] = {}
        self._handles: list[Any] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._stack.callback(self._detach)
        self._handles.append(
            self._model.register_forward_pre_hook(
                self._before_forward, with_kwargs=True, prepend=True
            )
        )
        for name, parameter in self.parameters.items():
            self._handles.append(
                parameter.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad, name=name: self._receive(name, grad)
                )
            )
        self._stack.enter_context(self.recorder)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _detach(self) -> None:
        # A graph that outlives the capture may be run backward again: that is none of it.
        self.recorder.paused = True
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pass begins: learn its batch and, once per signature, its layouts."""
        if self.recorder.paused or not torch.is_grad_enabled():
            return
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            raise ValueError("the model was called without a tensor: no batch to align")
        batch = tensors[0].shape[0]
        if batch == 0:
            raise ValueError(f"the batch is empty: an input has shape {tuple(tensors[0].shape)}")
        signature = (
            tuple((t.shape, t.dtype) for t in tensors),
            tuple(module.training for module in model.modules()),
            frozenset(self.parameters),
            torch.is_autocast_enabled(tensors[0].device.type),
        )
        if signature not in self._layouts:
            self.recorder.paused = True
            try:
                found = (
                    find_layouts(model, self.parameters, args, kwargs, batch) if batch > 1 else {}
                )
            finally:
                self.recorder.paused = False
            # In the first pass: compare the pairs with the gradients that the parameters receive.
            self.recorder.verifying |= not self.recorder.passes
            self._layouts[signature] = found
        self.recorder.start_pass(batch, self._layouts[signature])

    def _receive(self, name: str, gradient: Tensor) -> None:
        if self.recorder.paused:
            return
        self.received.add(name)
        if self.recorder.verifying:
            direction = self.recorder.direction(name).flatten()
            value = float((gradient.flatten().conj() @ direction).real)
            self._projected[name] = self._projected.get(name, 0.0) + value

    def finish(self, reduction: str, loss_scale: float) -> Captured:
        """Check what was recorded.

        Raises:
            RuntimeError: no backward, or a gradient that the pairs do not explain.
        """
        recorder = self.recorder
        if not recorder.passes:
            raise RuntimeError("the model was not called inside capture()")
        explained = {n for p in recorder.passes for node, _ in p.terms for n in node.names}
        if not self.received:
            raise RuntimeError(
                "no gradient reached the model's parameters inside capture(): run the backward of "
                "a loss that depends on the model inside it, without set_to_none in between"
            )
        missed = self.received - explained
        if missed:
            raise RuntimeError(_unexplained(missed))
        if reduction == "mean" and "sum" in recorder.loss_reductions:
            raise RuntimeError(
                'reduction="mean" was declared, but the loss inside capture() has reduction="sum"'
            )
        self._compare()
        self._verified.update(self._layouts)
        reference = Reference(self.parameters, self.received)
        return Captured(
            self.parameters, recorder.passes, recorder.values, reference, reduction, loss_scale
        )

    def _compare(self) -> None:
        """The self-check: sum_i <d l_i / d p, v> = <received gradient of p, v> for a random v."""
        recorder = self.recorder
        if not recorder.verifying:
            return
        largest = max(recorder.magnitude.values(), default=0.0)
        wrong = set()
        for name in self.received:
            predicted, received = recorder.predicted[name], self._projected[name]
            eps, scale = recorder.precision[name], recorder.magnitude[name] + abs(received)
            # The second part: gradients that are rounding noise beside the others'.
            tolerance = math.sqrt(eps) * scale + 100 * eps * largest
            if math.isfinite(received) and not abs(predicted - received) <= tolerance:
                wrong.add(name)
        if wrong:
            raise RuntimeError(_unexplained(wrong))


def _unexplained(names: set[str]) -> str:
    return (
        f"parameter {', '.join(map(repr, sorted(names)))} received a gradient that its recorded "
        "uses do not explain: it is also used where the engine cannot see it (a custom "
        "autograd.Function, compiled or scripted code, torch.func transforms, or checkpoint with "
        "use_reentrant=True). Use plain torch functions there, or freeze it"
    )
