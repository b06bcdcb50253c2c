"""Recording, during a capture, what each use of a parameter will need to be aligned."""

from __future__ import annotations

import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ola_augment.alignment.captured import Pass
from ola_augment.alignment.expressions import Leaf, Node, RandomState, Tangents, writes_in_place
from ola_augment.alignment.layout import Layout, candidates
from ola_augment.alignment.probe import Decision, Key, Unrelated
from ola_augment.alignment.rules import RULES, MakeTerm, Use, differentiable
from ola_augment.alignment.storage import Storage
from ola_augment.alignment.terms import Term
from ola_augment.alignment.tracking import Function, Tracker, name_of, outputs_of, tensors_in

# A node that a call reads, the shape of its tensor, and the term that the use gives.
_NodeUse = tuple[Node, torch.Size, MakeTerm]
_WeakTensor = Callable[[], Tensor | None]


class Recorder(Tracker):
    """Hooks the output of every call that meets parameters with data.

    Args:
        parameters: trainable parameters by name.
        buffers: the model's buffers.
        storage: format of the pairs.
        fallback: differentiate functions without a rule instead of refusing them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buffers: Iterable[Tensor],
        storage: Storage,
        fallback: bool,
    ) -> None:
        super().__init__(parameters, buffers)
        self.passes: list[Pass] = []
        self.values: dict[str, Tensor] = {}
        self.loss_reductions: set[str] = set()
        self.verifying = False
        self.predicted: dict[str, float] = defaultdict(float)
        self.magnitude: dict[str, float] = defaultdict(float)
        self.precision: dict[str, float] = defaultdict(float)
        self.paused = False
        # Unknown for a torch.autograd.backward, which cannot be watched.
        self._retain_graph = True
        self._parameters = parameters
        self._storage = storage
        self._fallback = fallback
        # Weak on both sides: what autograd frees during backward must go.
        self._detached: dict[int, tuple[_WeakTensor, _WeakTensor]] = {}

    def start_pass(self, batch: int, layouts: dict[Key, Decision]) -> None:
        """From here on uses belong to a new forward pass."""
        self.passes.append(Pass(batch, layouts))

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Inside a backward pass activation checkpointing repeats what was recorded already.
        if self.paused or torch._C._current_graph_task_id() != -1:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Watch for backward passes and losses."""
        if function is Tensor.backward or function is torch.autograd.grad:
            return self._differentiate(function, args, kwargs)
        if function in _LOSSES and kwargs.get("reduction") in ("mean", "sum"):
            self.loss_reductions.add(kwargs["reduction"])
        return function(*args, **kwargs)

    def use(self, function: Function, args: Any, kwargs: Any, from_data: bool) -> Any:
        """Hook the outputs, or follow them where they depend on parameters only."""
        if function is Tensor.backward or function is torch.autograd.grad:
            return self._differentiate(function, args, kwargs)
        if function == _SET_GRAD:  # zero_grad()
            return function(*args, **kwargs)
        writes = writes_in_place(function)
        if writes and (isinstance(self.node(args[0]), Leaf) or not torch.is_grad_enabled()):
            return function(*args, **kwargs)
        if writes and from_data and function not in RULES:
            raise RuntimeError(
                f"{name_of(function)} writes in place, reads parameter "
                f"{_listed(self.names(args, kwargs))} and has no alignment rule; use an "
                "out-of-place function"
            )
        # Before the call: it may overwrite its input.
        names = self.names(args, kwargs)
        rule = RULES.get(function) if from_data else None
        uses = self._uses(rule.uses, args, kwargs) if rule else None
        draws = None if from_data else RandomState(next(tensors_in(args)).device)
        read = self.read(args, kwargs)
        result = function(*args, **kwargs)
        outputs = outputs_of(function, args, result)
        if not any(tensor.requires_grad for tensor in outputs):
            if not from_data:
                self.remember_constant(result)
            return result
        constant = {}
        for index, output in enumerate(outputs):
            layout = None
            if from_data:
                layout = self._layout(function, names, args, kwargs, output)
            if layout is None:
                constant[index] = output
            elif output.requires_grad:
                if writes:
                    self.forget(output)
                found = uses or self._linearise(function, args, kwargs, index)
                self._watch(output, found, layout)
        if constant:
            self._keep_values(names)
            self.follow(function, read, constant, draws if draws and draws.moved() else None)
        return result

    def _uses(self, rule: Callable[..., Iterator[Use]], args: Any, kwargs: Any) -> list[_NodeUse]:
        """The rule's uses of parameters, over inputs without their graph."""
        args, kwargs = tree_map_only(Tensor, self._detach, (args, kwargs))
        return [
            (node, argument.shape, make_term)
            for argument, make_term in rule(*args, **kwargs)
            if isinstance(argument, Tensor) and (node := self.node(argument)) is not None
        ]

    def _linearise(self, function: Function, args: Any, kwargs: Any, index: int) -> list[_NodeUse]:
        """Without a rule: the derivative of this one function at theta_t, when asked for."""
        if not self._fallback:
            raise RuntimeError(
                f"{name_of(function)} reads parameter {_listed(self.names(args, kwargs))} and has "
                "no alignment rule; freeze the parameter (requires_grad=False), register a rule "
                "(register_rule) or pass fallback=True, which differentiates that function twice "
                "more"
            )
        return self._uses(differentiable(function, index), args, kwargs)

    def _layout(
        self, function: Function, names: frozenset[str], args: Any, kwargs: Any, output: Tensor
    ) -> Layout | None:
        """Where the examples lie in an output; None for a constant."""
        if not self.passes:
            raise RuntimeError(
                f"{name_of(function)} reads parameter {_listed(names)} before the model was "
                "called: call the model itself inside capture(), it tells the batch size"
            )
        current = self.passes[-1]
        if current.batch == 1:
            return Layout(0, 1, 1, 1)
        decision = current.layouts.get((function, names, output.shape))
        if decision is None:
            # Not met by the check (another branch, the loss): by contract, where that is clear.
            rule = RULES.get(function)
            leading = output.dim() if rule is None else rule.leading(*args, output=output, **kwargs)
            possible = list(candidates(output.shape, range(leading), current.batch))
            first = [Layout(0, 1, current.batch, 1)]
            decision = first[0] if possible == first else Unrelated.UNCLEAR
        if decision is Unrelated.UNCLEAR:
            raise RuntimeError(
                f"{name_of(function)} reads parameter {_listed(names)} and gives a tensor of shape "
                f"{tuple(output.shape)} in which the {current.batch} examples of the batch could "
                "not be told apart: changing one example does not change its own rows alone. "
                "Keep examples along one dimension, do not mix them, or freeze the parameter"
            )
        return decision if isinstance(decision, Layout) else None

    def _watch(self, output: Tensor, uses: list[_NodeUse], layout: Layout) -> None:
        """Turn the output's gradient into terms of the pass under way."""
        current, uses = self.passes[-1], list(uses)

        def receive(delta: Tensor) -> None:
            if self.paused:
                return
            if torch.is_grad_enabled():
                raise RuntimeError(_NO_SECOND_ORDER)
            if not uses:
                raise RuntimeError(_RELEASED)
            with torch.autocast(delta.device.type, enabled=False):
                for node, shape, make_term in uses:
                    term = make_term(delta, layout)
                    self._predict(node, term, delta.dtype)
                    current.terms.append((node, term.pack(self._storage, shape)))
            if not self._retain_graph:
                uses.clear()  # this hook lives as long as the graph, its inputs need not

        output.register_hook(receive)  # type: ignore[no-untyped-call]

    def _predict(self, node: Node, term: Term, dtype: torch.dtype) -> None:
        """Self-check: what each parameter's gradient should be along a random direction."""
        if not self.verifying:
            return
        for name in node.names:
            tangent = Tangents({name: self.direction(name)}, self.values)(node)
            if tangent is not None:
                contracted = term.contract(tangent).double()
                self.predicted[name] += float(contracted.sum())
                self.magnitude[name] += float(contracted.abs().sum())
                self.precision[name] = max(self.precision[name], torch.finfo(dtype).eps)

    def direction(self, name: str) -> Tensor:
        """The self-check's random direction for a parameter, drawn again whenever it is needed."""
        parameter = self._parameters[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    def _differentiate(self, function: Function, args: Any, kwargs: Any) -> Any:
        if kwargs.get("create_graph"):
            raise RuntimeError(_NO_SECOND_ORDER)
        if function is Tensor.backward:
            if kwargs.get("inputs") is not None:
                raise RuntimeError(
                    "backward(inputs=...) inside capture() cannot be aligned; use "
                    "torch.autograd.grad for gradients that are not the training step's"
                )
            self._retain_graph = bool(kwargs.get("retain_graph"))
            try:
                return function(*args, **kwargs)
            finally:
                self._retain_graph = True
        before, self.paused = self.paused, True
        try:
            return function(*args, **kwargs)
        finally:
            self.paused = before

    def _keep_values(self, names: Iterable[str]) -> None:
        """Expressions are differentiated at today's parameters, which the optimizer overwrites."""
        for name in names:
            if name not in self.values:
                self.values[name] = self._parameters[name].detach().clone()

    def _detach(self, tensor: Tensor) -> Tensor:
        """The same tensor without its graph; one object per tensor, so that it is packed once."""
        if self.node(tensor) is not None:
            return tensor
        source, kept = self._detached.get(id(tensor), (_gone, _gone))
        detached = kept()
        if source() is not tensor or detached is None or detached._version != tensor._version:
            detached = tensor.detach()
            self._detached[id(tensor)] = (weakref.ref(tensor), weakref.ref(detached))
        return detached


_SET_GRAD = vars(torch._C.TensorBase)["grad"].__set__

_NO_SECOND_ORDER = (
    "a differentiable backward (create_graph=True) inside capture() cannot be aligned; compute "
    "gradient penalties outside"
)

_RELEASED = (
    "a second backward inside capture() went through a graph that the first one freed; pass "
    "retain_graph=True to the first"
)


def _gone() -> None:
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


_LOSSES = {
    getattr(F, name)
    for name in (
        "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
        "multilabel_margin_loss", "multilabel_soft_margin_loss", "soft_margin_loss",
        "multi_margin_loss", "hinge_embedding_loss", "poisson_nll_loss", "gaussian_nll_loss",
        "cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss", "ctc_loss",
    )
}  # fmt: skip
