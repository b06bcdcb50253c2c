"""Recording, during a capture, what each use of a parameter will need to be aligned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node as GraphNode

from ola_augment.alignment._torch import backpack_is_active, on_gradient
from ola_augment.alignment.calls.arguments import (
    Function,
    map_tensors,
    name_of,
    writes_in_place,
)
from ola_augment.alignment.calls.expressions import Node, Tangents
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.nodes import leaves
from ola_augment.alignment.calls.registry import Use, rule_of
from ola_augment.alignment.calls.watch import Step, Watch
from ola_augment.alignment.method.means import Means
from ola_augment.alignment.method.norms import ExampleNorms
from ola_augment.alignment.method.rules import differentiable
from ola_augment.alignment.method.storage import Detached, Storage, in_full_precision
from ola_augment.alignment.method.tape import Tape
from ola_augment.alignment.method.terms import Term
from ola_augment.alignment.method.uses import (
    NO_SECOND_ORDER,
    RELEASED,
    TOO_EARLY,
    WITH_BACKPACK,
    Call,
    LocatedUse,
    NodeUse,
    differentiated,
    listed,
    roundings_of,
)
from ola_augment.alignment.proof import Examination, Unrelated

#: The origin of what was computed from several forward passes.
SEVERAL = Tape(0)


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
        self.constant: set[str] = set()  # parameters of uses that no example changes
        self.values: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self.means = means
        self._retain_graph = True  # or unknown: torch.autograd.backward cannot be watched
        self._parameters = parameters
        self._norms = norms
        self._examination = examination
        self._storage = storage
        self._fallback = fallback
        self._direction = direction
        self._along: tuple[Mapping[str, Tensor], Tangents] | None = None
        self._uses_of_pass: dict[Step, LocatedUse] = {}
        self._located: dict[tuple[GraphNode, int], LocatedUse] = {}
        self._detached = Detached()

    def start_pass(self, args: Any, kwargs: Any) -> None:
        """A forward pass begins."""
        batch, data = self._examination.begin(self, args, kwargs)
        # The optimizer stepped inside the capture; of parameters that come and go no version tells.
        versions = self._versions.items()
        if self.defers or any(self._parameters[name]._version != v for name, v in versions):
            self.values, self._versions = {}, {}
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
                    f"{use.name} reads parameter {listed(use.names)} on a path "
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
        args = self._examination.asked(function, args)
        result = function(*args, **kwargs)
        if self.means is not None:
            self.means.note(function, args, kwargs, result)
        return result

    def before(self, function: Function, args: Any, kwargs: Any, origin: Tape) -> Call:
        """The rule's uses: before the call, which may overwrite its input."""
        names = self.names(args, kwargs)
        rule = rule_of(function)
        if rule is None and writes_in_place(function):
            raise RuntimeError(
                f"{name_of(function)} writes in place, reads parameter {listed(names)} and has no "
                "alignment rule; use an out-of-place function"
            )
        uses = self._uses(rule.uses, args, kwargs) if rule else None
        return Call(function, args, kwargs, names, uses)

    def met(self, about: Call, step: Step, output: Tensor, origin: Tape) -> bool:
        """Hook an output that depends on the examples."""
        use = LocatedUse(about.function, about.names, output, origin)
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

    def _locate(
        self, use: LocatedUse, about: Call, step: Step, origin: Tape, output: Tensor
    ) -> bool:
        """Find out where the examples lie, now or at the end of the pass; False: nowhere."""
        if origin is SEVERAL:
            raise RuntimeError(
                f"{use.name} reads parameter {listed(use.names)} and data of several "
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
            self.constant |= use.names if use.constant else set()
            return not use.constant
        use.by_contract(about, output, origin.batch)
        return True

    def _uses(self, rule: Callable[..., Iterator[Use]], args: Any, kwargs: Any) -> list[NodeUse]:
        """The rule's uses of parameters, over inputs without their graph."""
        args, kwargs = map_tensors(
            lambda t: t if self.node(t) else self._detached(t), (args, kwargs)
        )
        return [
            (node, argument.shape, make_term)
            for argument, make_term in rule(*args, **kwargs)
            if isinstance(argument, Tensor) and (node := self.node(argument)) is not None
        ]

    def _linearise(self, about: Call, index: int) -> list[NodeUse]:
        """Without a rule: the derivative of this one function at theta_t, when asked for."""
        if not self._fallback:
            raise RuntimeError(about.without_rule())
        rule = differentiable(about.function, index, about.draws())
        return self._uses(rule, about.args, about.kwargs)

    def _watch(self, output: Tensor, uses: list[NodeUse], use: LocatedUse, tape: Tape) -> None:
        """Turn the output's gradient into terms of the pass that its data came from."""
        uses = list(uses)
        if tape.norms is not None:
            tape.norms.expect(node for node, _, _ in uses)
        self._located[use.place(output)] = use

        def receive(delta: Tensor) -> None:
            if self.paused:
                return
            if torch.is_grad_enabled():
                raise RuntimeError(NO_SECOND_ORDER)
            with self.refusing(), in_full_precision(delta.device.type):
                if not uses or use.layout is None:
                    raise RuntimeError(RELEASED if not uses else TOO_EARLY)
                for node, shape, make_term in uses:
                    off = roundings_of(use.name, delta, shape)
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
        if (tangent := self._tangents(tape)(node)) is not None:
            tape.contracted.append((node.names, term.contract(tangent)))

    def _tangents(self, tape: Tape) -> Tangents:
        """Of the reference gradient, at the parameters of a pass."""
        assert self._direction is not None
        if self._along is None or self._along[0] is not tape.values:
            self._along = tape.values, Tangents(self._direction, tape.values)
        return self._along[1]

    def _differentiate(self, function: Function, args: Any, kwargs: Any) -> Any:
        if kwargs.get("create_graph"):
            raise RuntimeError(NO_SECOND_ORDER)
        if backpack_is_active():
            raise RuntimeError(WITH_BACKPACK)
        losses, weights, inputs = differentiated(function, args, kwargs)
        if function is Tensor.backward and inputs:
            raise RuntimeError(
                "backward(inputs=...) inside capture() cannot be aligned; use "
                "torch.autograd.grad for gradients that are not the training step's"
            )
        all_parameters = {id(p) for p in self._parameters.values()} <= set(map(id, inputs))
        if function is not Tensor.backward and not all_parameters:  # not the training step's
            with self.resting():
                return function(*args, **kwargs)
        for loss, weight in zip(losses, weights, strict=True):
            if not self._on_path and loss.grad_fn is not None:
                with self.refusing(), self.resting():
                    self._examination.loss(loss, weight, self._located, self.once)
                    if self.means is not None:
                        self.means.settle(loss, self.tapes, self._located)
        self._retain_graph = bool(kwargs.get("retain_graph"))
        try:
            return function(*args, **kwargs)
        finally:
            self._retain_graph = True
