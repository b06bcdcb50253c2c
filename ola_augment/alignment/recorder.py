"""Recording, during a capture, what each use of a parameter will need to be aligned."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node as GraphNode

from ola_augment.alignment._torch import SET_GRAD, on_gradient
from ola_augment.alignment.expressions import (
    Leaf,
    Node,
    RandomState,
    Tangents,
    writes_in_place,
)
from ola_augment.alignment.fingerprints import Decision, Unrelated
from ola_augment.alignment.layout import Layout, candidates
from ola_augment.alignment.norms import ExampleNorms
from ola_augment.alignment.probe import Verified, sets_of
from ola_augment.alignment.rules import RULES, MakeTerm, Use, differentiable
from ola_augment.alignment.separation import Located, Separation
from ola_augment.alignment.storage import Storage, in_full_precision
from ola_augment.alignment.sums import RandomDirection, SumCheck
from ola_augment.alignment.tape import Tape
from ola_augment.alignment.terms import Term
from ola_augment.alignment.watch import (
    Function,
    Watch,
    leaves,
    map_tensors,
    name_of,
    outputs_of,
    tensors_in,
)

# A node that a call reads, the shape of its tensor, and the term that the use gives.
_NodeUse = tuple[Node, torch.Size, MakeTerm]
_WeakTensor = Callable[[], Tensor | None]
# A call on the path of a forward pass, and which of its outputs.
Step = tuple[int, int]

#: The origin of what was computed from several forward passes.
SEVERAL = Tape(0)


class _Use(Located):
    """One output of a call that reads parameters and data.

    ``constant``: the same whatever the examples are.
    """

    def __init__(self, function: Function, names: frozenset[str], output: Tensor) -> None:
        super().__init__(output, name_of(function))
        self.names = names
        self.constant = False

    def settle(self, decision: Decision, batch: int) -> None:
        if not isinstance(decision, Layout):
            raise RuntimeError(
                f"{self.name} reads parameter {_listed(self.names)} and gives a "
                f"tensor of shape {tuple(self.shape)} in which the {batch} examples of the batch "
                "could not be told apart: changing one example does not change its own rows alone. "
                "Keep examples along one dimension, do not mix them, or freeze the parameter"
            )
        self.layout = decision


class Recorder(Watch[Tape]):
    """Hooks the output of every call that meets parameters with data.

    Args:
        model: whose forward passes are recorded.
        parameters: its trainable parameters by name.
        storage: format of the pairs.
        fallback: differentiate functions without a rule instead of refusing them.
        direction: the reference gradient, if it is known: terms are contracted with it at once.
        norms: gather the norms of the examples' gradients.
        check: of the sums along the reference gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        storage: Storage,
        fallback: bool,
        direction: Mapping[str, Tensor] | None,
        norms: bool,
        check: SumCheck,
    ) -> None:
        super().__init__(leaves(parameters))
        self.tapes: list[Tape] = []
        self.values: dict[str, Tensor] = {}
        self.loss_reductions: set[str] = set()
        # The self-check of a capture that is verified: what the terms come to along a direction.
        self.verifying = False
        self.random = RandomDirection(parameters)
        self.exact = SumCheck(0.0, self.random)
        self.along_random: list[tuple[frozenset[str], Tensor]] = []
        self.paused = False
        # Unknown for a torch.autograd.backward, which cannot be watched.
        self._retain_graph = True
        self._model = model
        self._parameters = parameters
        self._norms = norms
        self._check = check
        self._storage = storage
        self._fallback = fallback
        self.direction = direction
        self._tangents = None if direction is None else Tangents(direction, self.values)
        # Of the forward pass under way: what is known of its path, and uses off it.
        self._decisions: Mapping[Step, Decision] = {}
        self._uses_of_pass: dict[Step, _Use] = {}
        # Outputs in the graph, what ends with a loss was found to keep examples apart, and what
        # the user asked of tensors.
        self._located: dict[tuple[GraphNode, int], _Use] = {}
        self._endings: set[tuple[str, ...]] = set()
        self._hooks = False
        self._retaining: list[Tensor] = []
        # Weak on both sides: what autograd frees during backward must go.
        self._detached: dict[int, tuple[_WeakTensor, _WeakTensor]] = {}

    def start_pass(self, batch: int, data: Iterable[Tensor], known: Verified) -> None:
        """A forward pass begins, on a batch, with what is known of the paths it may take."""
        self.tapes.append(Tape(batch, norms=ExampleNorms() if self._norms else None))
        self.mark(data, self.tapes[-1])
        self._decisions, self._endings = known.decisions, known.endings
        self._uses_of_pass = {}
        self.start_path()

    def release(self) -> None:
        """The capture is over. The graph's hooks lead here, and from here no longer to the graph.

        Such a cycle goes through autograd, where the garbage collector does not look.
        """
        self.paused = True
        for use in self._located.values():
            del use.edge
        self._located.clear()
        self._retaining.clear()

    def settle(self, decisions: Mapping[Step, Decision]) -> None:
        """The pass ended on a path that was not known when it began.

        Raises:
            RuntimeError: examples cannot be told apart in a use.
        """
        for step, use in self._uses_of_pass.items():
            decision = decisions.get(step, Unrelated.UNCLEAR)
            if (decision is Unrelated.CONSTANT) != use.constant:
                raise RuntimeError(
                    f"{use.name} reads parameter {_listed(use.names)} on a path "
                    "through the model that was not met before, with values that are the same "
                    "whatever the examples are; it is known now: run the step again"
                )
            if not use.constant:
                use.settle(decision, self.tapes[-1].batch)

    def merged(self, one: Tape, other: Tape) -> Tape:
        """Of no single pass."""
        return one if one is other else SEVERAL

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Watch for backward passes and losses."""
        if function is Tensor.backward or function is torch.autograd.grad:
            return self._differentiate(function, args, kwargs)
        if function in _HOOKS:
            self._hooks = True
        elif function is Tensor.retain_grad:
            self._retaining.append(args[0])
        elif function in _LOSSES and kwargs.get("reduction") in ("mean", "sum"):
            self.loss_reductions.add(kwargs["reduction"])
        return function(*args, **kwargs)

    def use(self, function: Function, args: Any, kwargs: Any, origin: Tape | None) -> Any:
        """Hook the outputs, or follow them where they depend on parameters only."""
        if function is Tensor.backward or function is torch.autograd.grad:
            return self._differentiate(function, args, kwargs)
        if function == SET_GRAD:  # zero_grad()
            return function(*args, **kwargs)
        writes = writes_in_place(function)
        if writes and isinstance(self.node(args[0]), Leaf):
            return function(*args, **kwargs)
        names = self.names(args, kwargs)
        if writes and origin and function not in RULES:
            raise RuntimeError(
                f"{name_of(function)} writes in place, reads parameter {_listed(names)} and has no "
                "alignment rule; use an out-of-place function"
            )
        # Before the call: it may overwrite its input.
        rule = RULES.get(function) if origin else None
        uses = self._uses(rule.uses, args, kwargs) if rule else None
        draws = None if origin else RandomState(next(tensors_in(args)).device)
        path = self.path
        read = self.read(args, kwargs) if writes or not origin else None
        result = function(*args, **kwargs)
        outputs = outputs_of(function, args, result)
        if not any(tensor.requires_grad for tensor in outputs):
            return result
        constant = {}
        for index, output in enumerate(outputs):
            use = _Use(function, names, output)
            if not origin or not self._locate(
                use, function, (path, index), origin, args, kwargs, output
            ):
                constant[index] = output
            elif output.requires_grad:
                if writes:
                    self.forget(output)
                found = uses or self._linearise(function, args, kwargs, index)
                self._watch(output, found, use, origin)
        if constant:
            self._keep_values(names)
            for output in constant.values():
                if output.is_floating_point() or output.is_complex():
                    for check in (self._check, self.exact):  # casts round gradients, too
                        check.computed(names, output.dtype)
            read = read or self.read(args, kwargs)
            self.follow(function, read, constant, draws if draws and draws.moved() else None)
        return result

    def _locate(
        self,
        use: _Use,
        function: Function,
        step: Step,
        origin: Tape,
        args: Any,
        kwargs: Any,
        output: Tensor,
    ) -> bool:
        """Find out where the examples lie, now or at the end of the pass; False: nowhere."""
        if origin is SEVERAL:
            raise RuntimeError(
                f"{use.name} reads parameter {_listed(use.names)} and data of several "
                "forward passes: which examples they are cannot be told; call it for each of them"
            )
        if origin.batch == 1:
            use.layout = Layout(0, 1, 1, 1)
            return True
        if self._on_path and origin is self.tapes[-1]:
            self._uses_of_pass[step] = use
            decision = self._decisions.get(step)
            use.constant = decision is Unrelated.CONSTANT
            if decision is not None and not use.constant:
                use.settle(decision, origin.batch)
            return not use.constant
        # Outside of the forward pass (a head, the loss): by contract, where that is clear.
        use.outside = True
        rule = RULES.get(function)
        leading = output.dim() if rule is None else rule.leading(*args, output=output, **kwargs)
        possible = list(candidates(output.shape, range(leading), origin.batch))
        first = [Layout(0, 1, origin.batch, 1)]
        use.settle(first[0] if possible == first else Unrelated.UNCLEAR, origin.batch)
        return True

    def _uses(self, rule: Callable[..., Iterator[Use]], args: Any, kwargs: Any) -> list[_NodeUse]:
        """The rule's uses of parameters, over inputs without their graph."""
        args, kwargs = map_tensors(self._detach, (args, kwargs))
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

    def _watch(self, output: Tensor, uses: list[_NodeUse], use: _Use, tape: Tape) -> None:
        """Turn the output's gradient into terms of the pass that its data came from."""
        uses = list(uses)
        if tape.norms is not None:
            tape.norms.expect(node for node, _, _ in uses)
        self._located[use.place(output)] = use

        def receive(delta: Tensor) -> None:
            if self.paused:
                return
            if torch.is_grad_enabled():
                raise RuntimeError(_NO_SECOND_ORDER)
            if not uses:
                raise RuntimeError(_RELEASED)
            if use.layout is None:
                raise RuntimeError(
                    "backward() inside forward() reached parameters before the pass was verified; "
                    "run it after the model returned"
                )
            with in_full_precision(delta.device.type):
                for node, shape, make_term in uses:
                    off = _roundings(delta, shape)
                    self._check.computed(node.names, delta.dtype, off)
                    if self.verifying:
                        self.exact.computed(node.names, delta.dtype, off)
                    self._keep(tape, node, make_term(delta, use.layout), shape)
            if not self._retain_graph:
                uses.clear()  # this hook lives as long as the graph, its inputs need not

        on_gradient(output, receive)

    def _keep(self, tape: Tape, node: Node, term: Term, shape: torch.Size) -> None:
        if self.verifying:
            tangent = Tangents(self.random, self.values)(node)
            if tangent is not None:
                self.along_random.append((node.names, term.contract(tangent)))
        if tape.norms is not None:
            tape.norms.add(node, term, shape, last=not self._retain_graph)
        if self._tangents is None:
            tape.terms.append((node, term.pack(self._storage, shape)))
            return
        tangent = self._tangents(node)
        if tangent is not None:
            tape.contracted.append((node.names, term.contract(tangent)))

    def _differentiate(self, function: Function, args: Any, kwargs: Any) -> Any:
        if kwargs.get("create_graph"):
            raise RuntimeError(_NO_SECOND_ORDER)
        if function is Tensor.backward:
            if kwargs.get("inputs") is not None:
                raise RuntimeError(
                    "backward(inputs=...) inside capture() cannot be aligned; use "
                    "torch.autograd.grad for gradients that are not the training step's"
                )
            self._keeps_apart(*args[:2], kwargs.get("gradient"))
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

    def _keeps_apart(self, loss: Tensor, *gradient: Tensor | None) -> None:
        """Refuse a loss that mixes examples, where it ends in a way not met before."""
        if self._on_path or loss.grad_fn is None:
            return
        weight = next((one for one in gradient if one is not None), None)
        separation = Separation(loss, weight, self._located)
        if separation.ending in self._endings and not self.verifying:
            return
        sizes = {tape.batch for tape in self.tapes if tape.batch > 1}
        sets = [
            dict(zip(sizes, one, strict=True)) for one in zip(*map(sets_of, sizes), strict=False)
        ]
        retained = [(tensor, tensor.grad) for tensor in self._retaining]
        before, self.paused = self.paused, True
        try:
            separation.check(sets, self._model, self._hooks)
        finally:
            self.paused = before
            for tensor, known in retained:
                tensor.grad = known
        self._endings.add(separation.ending)

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


_HOOKS = {Tensor.register_hook, torch.autograd.graph.register_multi_grad_hook}

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


def _roundings(delta: Tensor, shape: torch.Size) -> float:
    """How many roundings torch's own gradient of a parameter may be off by.

    On a CPU a convolution adds up its bias's gradient one by one (off by 1e-3 at 224 pixels, a
    tenth of its summands' eps). A product's errors add up like random numbers, but where the
    summands cancel, as behind normalisations, they are those of larger numbers: seen in training
    was 1.2 times the root.
    """
    if not shape:
        return 0.0
    summands = delta.numel() / max(1, shape[0])
    return summands / 4 if len(shape) == 1 else min(8 * summands**0.5, _MOST_ROUNDINGS)


#: Of a product: a hidden use of 1e-3 is seen in single precision.
_MOST_ROUNDINGS = 4096.0
