"""Watching every torch call: which read parameters, which examples' data they meet, in what order.

A tensor is a *node* (a parameter, or computed from parameters only), *data* (it came from the
batch of a forward pass) or a constant (everything else: buffers, frozen parameters, `arange`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ola_augment.alignment._torch import (
    SET_GRAD,
    base_of,
    body_of,
    checkpoints_selectively,
    in_backward,
    transforming,
)
from ola_augment.alignment.calls.arguments import (
    ABOUT,
    LEAVE_ALONE,
    OF_SHAPE,
    READS_SHAPE_ONLY,
    Function,
    apart,
    name_of,
    outputs_of,
    positional,
    tensors_in,
    writes_in_place,
)
from ola_augment.alignment.calls.expressions import Leaf, Node, RandomState
from ola_augment.alignment.calls.mode import Mode
from ola_augment.alignment.calls.nodes import Nodes
from ola_augment.alignment.calls.paths import LookUp, gates, kinds, look_up, setting
from ola_augment.alignment.calls.registry import COMPOSITES, rule_of

OriginT = TypeVar("OriginT")
# A call on the path of a forward pass, as the number of the path up to it, and which output.
Step = tuple[int, int]

#: Calls that compute nothing from what they are given.
SPECIAL = {Tensor.backward, torch.autograd.grad, SET_GRAD}


class Watch(Nodes, Mode, Generic[OriginT]):
    """Hands each call that reads a parameter to `use`, all others to `other`.

    Args:
        nodes: the tensors to follow, by identity, each with its node.
    """

    def __init__(self, nodes: Mapping[int, tuple[Tensor, Node]]) -> None:
        super().__init__(nodes)
        # Weakly: data must go when the model drops it.
        self._origins: dict[int, tuple[weakref.ref[Tensor], OriginT]] = {}
        self._inside: set[Function] = set()
        #: A number for the calls since `start_path`: equal where they were the same.
        self.path = 0
        self._look_ups: list[LookUp] = []
        # Whether what gates other values is open: branches that are no control flow.
        self._gates: list[Tensor] = []
        self._batch = 1
        self._on_path = False
        self._transformed = False
        #: Whether a part of the graph permits a single backward.
        self.once = False

    def start_path(self, batch: int) -> None:
        """A forward pass begins: the calls from here on are its path."""
        self.path, self._batch, self._on_path = 0, batch, True
        self._look_ups.clear()
        self._gates.clear()

    def end_path(self) -> None:
        """It ends: the calls from here on belong to no path."""
        self._on_path = False

    def walked(self, layouts: Mapping[Step, object]) -> tuple[int, int]:
        """Numbers of the path between `start_path` and `end_path`, and of what it let meet whom.

        Args:
            layouts: of examples, where they are known.
        """
        rows = hash(tuple(one.moves(layouts) for one in self._look_ups))
        if self._gates:  # one transfer for all
            device = self._gates[0].device
            gates = torch.stack([gate.to(device) for gate in self._gates]).tolist()
            rows = hash((rows, *gates))
        return self.path, rows

    def origin(self, tensor: Tensor) -> OriginT | None:
        """Where data came from; None for nodes and constants."""
        known = self._origins.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def mark(self, tensors: Iterable[Tensor], origin: OriginT) -> None:
        """Remember tensors as data."""
        for tensor in tensors:
            self._origins[id(tensor)] = (weakref.ref(tensor), origin)

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ABOUT or self.paused or in_backward():
            return func(*args, **kwargs)
        if not self.defers or func in SPECIAL:
            return self._watched(func, args, kwargs)
        try:
            return self._watched(func, args, kwargs)
        except RuntimeError as error:
            result = func(*args, **kwargs)  # unless it is the call's own error
            self.refuse(error)
            return result

    def _watched(self, func: Function, args: Any, kwargs: Any) -> Any:
        if not self._on_path and not self._origins and self._no_concern(func, args, kwargs):
            return func(*args, **kwargs)
        if kwargs:
            args, kwargs = positional(func, args, kwargs)
        nodes, origins = self._nodes, self._origins
        reads, origin = False, None
        looked_at = args[:1] if func in READS_SHAPE_ONLY else (*args, *kwargs.values())
        for tensor in tensors_in(looked_at):
            key = id(tensor)
            if key in nodes:
                reads = True
            elif (known := origins.get(key)) is not None and known[0]() is tensor:
                origin = known[1] if origin is None else self.merged(origin, known[1])
            elif self._transformed and tensor.grad_fn is not None:  # it came out of a transform
                origin = self.current() if origin is None else origin
        self.once = self.once or checkpoints_selectively()
        if transforming():
            return self._transform(func, args, kwargs)
        looks = self._on_path and self._walk(func, args, kwargs, origin is not None)
        reads = reads and torch.is_grad_enabled()  # otherwise no gradient flows
        if not reads:
            result = self.other(func, args, kwargs)
        elif (body := self._body(func)) is not None:
            self._inside.add(func)
            try:
                with self:
                    return body(*args, **kwargs)
            finally:
                self._inside.discard(func)
        else:
            self._check_overwritten(looked_at)
            result = self.use(func, args, kwargs, origin)
        if looks:
            self.path = hash((self.path, *(one.shape for one in tensors_in((result,)))))
        if origin is not None and func not in OF_SHAPE:
            self.mark(tensors_in((result,)), origin)
            if args and isinstance(args[0], Tensor) and writes_in_place(func):
                self.mark((args[0], base_of(args[0])), origin)
        return result

    def _no_concern(self, function: Function, args: Any, kwargs: Any) -> bool:
        """Whether a call before any forward pass reads no parameter (augmentation makes many)."""
        return function not in SPECIAL and not any(
            id(tensor) in self._nodes for tensor in tensors_in((*args, *kwargs.values()))
        )

    def _transform(self, function: Function, args: Any, kwargs: Any) -> Any:
        """A call inside ``torch.func.grad``, ``vmap`` and their kin, on tensors of their own."""
        self._transformed = True
        if torch.is_grad_enabled() and (names := self.names(args, kwargs)):
            raise RuntimeError(
                f"{name_of(function)} reads parameter {', '.join(map(repr, sorted(names)))} inside "
                "a torch.func transform (grad, vmap, jvp), where its uses cannot be seen: call it "
                "outside of the transform, or freeze the parameter"
            )
        return self.run(function, args, kwargs)

    def _body(self, function: Function) -> Function | None:
        """What to run and watch instead of a call; None for one to take as it is.

        Some bodies dispatch a second time under the same name (``Tensor.unflatten``, the pooling
        functions): then the inner one is taken as it is.
        """
        if function in self._inside or rule_of(function) is not None:
            return None
        if function in COMPOSITES:
            return COMPOSITES[function]
        if isinstance(function, FunctionType) and function not in LEAVE_ALONE:
            return body_of(function)
        return None

    def _walk(self, function: Function, args: Any, kwargs: Any, data: bool) -> bool:
        """Add one call to the path, and say whether it looks up rows of data."""
        found = look_up(self.path, function, args, kwargs, self._is_data) if data else None
        if found is not None:
            self.looks_up(found, function, args, kwargs)
            self._look_ups.append(found)
            self.path = hash((self.path, function, found.dim, kinds(found.index)))
            return True
        self.path = hash((self.path, function, *map(setting, args), *map(setting, kwargs.values())))
        if data:
            self._gates += gates(function, args, kwargs, self._batch, self._is_node)
        return False

    def _is_data(self, value: object) -> bool:
        return isinstance(value, Tensor) and self.origin(value) is not None

    def _is_node(self, tensor: Tensor) -> bool:
        return id(tensor) in self._nodes

    def looks_up(self, found: LookUp, function: Function, args: Any, kwargs: Any) -> None:
        """A call on the path looks up rows of data."""

    def current(self) -> OriginT | None:
        """The origin of the data of the forward pass under way."""
        return None

    def merged(self, one: OriginT, other: OriginT) -> OriginT:
        """The origin of what is computed from two."""
        return one

    def use(self, function: Function, args: Any, kwargs: Any, origin: OriginT | None) -> Any:
        """Run a call that reads a parameter; ``origin``: of the data that it reads too, if any."""
        writes = writes_in_place(function)
        if function in SPECIAL or (writes and isinstance(self.node(args[0]), Leaf)):
            return self.other(function, args, kwargs)
        path = self.path
        about = None if origin is None else self.before(function, args, kwargs, origin)
        draws = None if origin else RandomState(next(tensors_in(args)).device)
        read: Any = None
        copied = writes and origin is not None and self.node(args[0]) is None
        if copied and self.perhaps_constant((path, 0)):
            read = self._read((args[0].detach().clone(), *args[1:]), kwargs)  # about to be written
        elif writes or origin is None:
            read = self._read(args, kwargs)
        result = self.run(function, args, kwargs)
        if origin is not None and not isinstance(result, Tensor) and rule_of(function) is None:
            result = apart(result)
        constant = {}
        for index, output in enumerate(outputs_of(function, args, result)):
            if not output.requires_grad:  # nothing flows back through it
                continue
            if origin is None or not self.met(about, (path, index), output, origin):
                constant[index] = output
            elif writes:
                self.forget(output)
        if constant:
            names = self.names(args, kwargs)
            self.computed(names, constant.values())
            read = read or self._read(args, kwargs)
            self._follow(function, read, constant, draws if draws and draws.moved() else None)
        return result if origin is None or writes else self.after(result, (path, 0))

    def before(self, function: Function, args: Any, kwargs: Any, origin: OriginT) -> Any:
        """A call is about to read parameters and data; what is returned is handed to `met`."""

    def met(self, about: Any, step: Step, output: Tensor, origin: OriginT) -> bool:
        """An output of parameters and data; False where the examples do not matter to it."""
        raise NotImplementedError

    def perhaps_constant(self, step: Step) -> bool:
        """Whether an output may turn out to be the same whatever the examples are."""
        return True

    def computed(self, names: frozenset[str], outputs: Iterable[Tensor]) -> None:
        """Outputs that are made of parameters only."""

    def after(self, result: Any, step: Step) -> Any:
        """What a call that met parameters and data is taken to give."""
        return result

    def run(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Run a call."""
        return function(*args, **kwargs)

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Run a call that reads no parameter, or tells nothing of what it does with it."""
        return self.run(function, args, kwargs)
