"""Recording, during a capture, what each use of a parameter will need to be aligned."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node as GraphNode

from ola_augment.alignment._torch import backpack_is_active, on_gradient
from ola_augment.alignment.calls.arguments import (
    Function,
    map_tensors,
    name_of,
    tensors_in,
    writes_in_place,
)
from ola_augment.alignment.calls.expressions import Node, Tangents
from ola_augment.alignment.calls.layout import Layout, candidates
from ola_augment.alignment.calls.registry import MakeTerm, Use, rule_of
from ola_augment.alignment.calls.watch import Step, Watch, leaves
from ola_augment.alignment.method.means import Means
from ola_augment.alignment.method.norms import ExampleNorms
from ola_augment.alignment.method.rules import differentiable
from ola_augment.alignment.method.storage import Storage, in_full_precision
from ola_augment.alignment.method.tape import Tape
from ola_augment.alignment.method.terms import Term
from ola_augment.alignment.proof import Decision, Examination, Located, Unrelated

# A node that a call reads, the shape of its tensor, and the term that the use gives.
_NodeUse = tuple[Node, torch.Size, MakeTerm]
_WeakTensor = Callable[[], Tensor | None]

#: The origin of what was computed from several forward passes.
SEVERAL = Tape(0)


class _Call(NamedTuple):
    """A call that meets parameters with data, and its rule's uses of them."""

    function: Function
    args: Any
    kwargs: Any
    names: frozenset[str]
    uses: list[_NodeUse] | None


class _Use(Located):
    """One output of a call that reads parameters and data.

    ``constant``: the same whatever the examples are.
    """

    def __init__(
        self, function: Function, names: frozenset[str], output: Tensor, tape: Tape
    ) -> None:
        super().__init__(output, name_of(function), tape)
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
        parameters: the trainable parameters by name.
        storage: format of the pairs.
        fallback: differentiate functions without a rule instead of refusing them.
        direction: the reference gradient, if it is known: terms are contracted with it at once.
        norms: of which parameters to gather the norms of the examples' gradients.
        examination: of this capture.
        means: learns what mean losses divide by, where that is asked for.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        storage: Storage,
        fallback: bool,
        direction: Mapping[str, Tensor] | None,
        norms: Set[str],
        examination: Examination,
        means: Means | None,
    ) -> None:
        super().__init__(leaves(parameters))
        self.tapes: list[Tape] = []
        self.values: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self.means = means
        # Unknown for a torch.autograd.backward, which cannot be watched.
        self._retain_graph = True
        self._parameters = parameters
        self._norms = norms
        self._examination = examination
        self._storage = storage
        self._fallback = fallback
        self._direction = direction
        self._along: tuple[Mapping[str, Tensor], Tangents] | None = None
        # Uses of the forward pass under way, and their outputs in the graph.
        self._uses_of_pass: dict[Step, _Use] = {}
        self._located: dict[tuple[GraphNode, int], _Use] = {}
        # Weak on both sides: what autograd frees during backward must go.
        self._detached: dict[int, tuple[_WeakTensor, _WeakTensor]] = {}

    def start_pass(self, args: Any, kwargs: Any) -> None:
        """A forward pass begins."""
        batch, data = self._examination.begin(self, args, kwargs)
        if any(self._parameters[name]._version != v for name, v in self._versions.items()):
            self.values, self._versions = {}, {}  # the optimizer stepped inside the capture
        norms = ExampleNorms(self._norms) if self._norms else None
        self.tapes.append(Tape(batch, self.values, norms=norms))
        self.mark(data, self.tapes[-1])
        self._uses_of_pass = {}
        self.start_path(batch)

    def end_pass(self, args: Any, kwargs: Any, output: Any) -> None:
        """It ends, perhaps on a path that was not known when it began.

        Raises:
            RuntimeError: examples cannot be told apart in a use.
        """
        batch = self.tapes[-1].batch
        if not self._examination.end(self, args, kwargs, output):
            return
        for step, use in self._uses_of_pass.items():
            decision = self._examination.where(step) or Unrelated.UNCLEAR
            if (decision is Unrelated.CONSTANT) != use.constant:
                raise RuntimeError(
                    f"{use.name} reads parameter {_listed(use.names)} on a path "
                    "through the model that was not met before, with values that are the same "
                    "whatever the examples are; it is known now: run the step again"
                )
            if not use.constant:
                use.settle(decision, batch)

    def release(self) -> None:
        """The capture is over. The graph's hooks lead here, and from here no longer to the graph.

        Such a cycle goes through autograd, where the garbage collector does not look.
        """
        self.paused = True
        for use in self._located.values():
            del use.edge
        self._located.clear()
        self._examination.release()
        if self.means is not None:
            self.means.clear()

    def current(self) -> Tape | None:
        """The tape of the forward pass under way."""
        return self.tapes[-1] if self.tapes else None

    def perhaps_constant(self, step: Step) -> bool:
        """Not where a layout of examples was found before."""
        return not isinstance(self._examination.where(step), Layout)

    def merged(self, one: Tape, other: Tape) -> Tape:
        """Of no single pass."""
        return one if one is other else SEVERAL

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Watch for backward passes and losses."""
        if function is Tensor.backward or function is torch.autograd.grad:
            return self._differentiate(function, args, kwargs)
        self._examination.asked(function, args)
        result = function(*args, **kwargs)
        if self.means is not None:
            self.means.note(function, args, kwargs, result)
        return result

    def before(self, function: Function, args: Any, kwargs: Any, origin: Tape) -> _Call:
        """The rule's uses: before the call, which may overwrite its input."""
        names = self.names(args, kwargs)
        rule = rule_of(function)
        if rule is None and writes_in_place(function):
            raise RuntimeError(
                f"{name_of(function)} writes in place, reads parameter {_listed(names)} and has no "
                "alignment rule; use an out-of-place function"
            )
        uses = self._uses(rule.uses, args, kwargs) if rule else None
        return _Call(function, args, kwargs, names, uses)

    def met(self, about: _Call, step: Step, output: Tensor, origin: Tape) -> bool:
        """Hook an output that depends on the examples."""
        use = _Use(about.function, about.names, output, origin)
        if not self._locate(use, about, step, origin, output):
            return False
        uses = about.uses
        if uses is None:
            uses = self._linearise(about, step[1])
        self._watch(output, uses, use, origin)
        return True

    def computed(self, names: frozenset[str], outputs: Iterable[Tensor]) -> None:
        """They are differentiated at today's parameters, which the optimizer overwrites."""
        for name in names:
            if name not in self.values:
                self.values[name] = self._parameters[name].detach().clone()
                self._versions[name] = self._parameters[name]._version
        for output in outputs:
            self._examination.computed(names, output.dtype)  # casts round gradients, too

    def _locate(self, use: _Use, about: _Call, step: Step, origin: Tape, output: Tensor) -> bool:
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
            decision = self._examination.where(step)
            use.constant = decision is Unrelated.CONSTANT
            if decision is not None and not use.constant:
                use.settle(decision, origin.batch)
            return not use.constant
        # Outside of the forward pass (a head, the loss): by contract, where that is clear.
        use.outside = True
        rule = rule_of(about.function)
        leading = output.dim()
        if rule is not None:
            leading = rule.leading(*about.args, output=output, **about.kwargs)
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

    def _linearise(self, about: _Call, index: int) -> list[_NodeUse]:
        """Without a rule: the derivative of this one function at theta_t, when asked for."""
        if not self._fallback:
            raise RuntimeError(
                f"{name_of(about.function)} reads parameter {_listed(about.names)} and has "
                "no alignment rule; freeze the parameter (requires_grad=False), register a rule "
                "(register_rule) or pass fallback=True, which differentiates that function twice "
                "more"
            )
        return self._uses(differentiable(about.function, index), about.args, about.kwargs)

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
                    self._examination.computed(node.names, delta.dtype, off)
                    self._keep(tape, node, make_term(delta, use.layout), shape)
            if not self._retain_graph:
                uses.clear()  # this hook lives as long as the graph, its inputs need not

        on_gradient(output, receive)

    def _keep(self, tape: Tape, node: Node, term: Term, shape: torch.Size) -> None:
        if self._examination.verifying:
            tangent = Tangents(self._examination.random, tape.values)(node)
            if tangent is not None:
                self._examination.term(node.names, term.contract(tangent))
        if tape.norms is not None:
            tape.norms.add(node, term, shape, last=not self._retain_graph)
        if self._direction is None:
            tape.terms.append((node, term.pack(self._storage, shape)))
            return
        tangent = self._tangents(tape)(node)
        if tangent is not None:
            tape.contracted.append((node.names, term.contract(tangent)))

    def _tangents(self, tape: Tape) -> Tangents:
        """Of the reference gradient, at the parameters of a pass."""
        assert self._direction is not None
        if self._along is None or self._along[0] is not tape.values:
            self._along = tape.values, Tangents(self._direction, tape.values)
        return self._along[1]

    def _differentiate(self, function: Function, args: Any, kwargs: Any) -> Any:
        if kwargs.get("create_graph"):
            raise RuntimeError(_NO_SECOND_ORDER)
        if backpack_is_active():
            raise RuntimeError(_WITH_BACKPACK)
        inputs = kwargs.get("inputs") if function is Tensor.backward else (*args, None, None)[1]
        if function is Tensor.backward and inputs is not None:
            raise RuntimeError(
                "backward(inputs=...) inside capture() cannot be aligned; use "
                "torch.autograd.grad for gradients that are not the training step's"
            )
        asked = {id(tensor) for tensor in tensors_in((inputs or kwargs.get("inputs"),))}
        step = function is Tensor.backward or asked >= set(map(id, self._parameters.values()))
        if not step:
            with self.resting():
                return function(*args, **kwargs)
        losses = list(tensors_in((args[0] if args else kwargs["outputs"],)))
        given = kwargs.get("grad_outputs", kwargs.get("gradient"))
        if given is None:
            given = (*args, None, None)[1 if function is Tensor.backward else 2]
        weights = [None] * len(losses) if given is None else list(tensors_in((given,)))
        for loss, weight in zip(losses, weights, strict=True):
            if not self._on_path and loss.grad_fn is not None:
                with self.resting():
                    self._examination.loss(loss, weight, self._located, self.once)
                    if self.means is not None:
                        self.means.settle(loss, self.tapes, self._located)
        self._retain_graph = bool(kwargs.get("retain_graph"))
        try:
            return function(*args, **kwargs)
        finally:
            self._retain_graph = True

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

_WITH_BACKPACK = (
    "a backward with BackPACK's extensions inside capture(): its hooks and the engine's change "
    "what each other sees; run them one after the other, or use BackPACKAlignment"
)

_RELEASED = (
    "a second backward inside capture() went through a graph that the first one freed; pass "
    "retain_graph=True to the first"
)


def _gone() -> None:
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


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
