"""Watching every torch call: which read parameters, which examples' data they meet, in what order.

A tensor is a *node* (a parameter, or computed from parameters only), *data* (it came from the
batch of a forward pass) or a constant (everything else: buffers, frozen parameters, `arange`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ola_augment.alignment._torch import body_of, in_backward
from ola_augment.alignment.expressions import (
    Expression,
    Leaf,
    Node,
    RandomState,
    writes_in_place,
)
from ola_augment.alignment.rules import COMPOSITES, RULES

Function = Callable[..., Any]
OriginT = TypeVar("OriginT")


#: Types of arguments that hold no tensor, and that stand for themselves in a path.
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype))


def name_of(function: Function) -> str:
    """How a function is called in messages."""
    return getattr(function, "__name__", repr(function))


def outputs_of(function: Function, args: Any, result: Any) -> list[Tensor]:
    """The tensors that a call gives: its results, or what it wrote."""
    if writes_in_place(function) and args and isinstance(args[0], Tensor):
        return [args[0]]
    if isinstance(result, Tensor):
        return [result]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists and tuples of them."""
    for argument in arguments:
        if type(argument) in _PLAIN:
            continue
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Arguments with their tensors changed, as tree_map does, in a tenth of the time."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return change(value)
    if kind is tuple or kind is list:
        return kind([map_tensors(change, one) for one in value])
    if kind is dict:
        return {name: map_tensors(change, one) for name, one in value.items()}
    return tree_map_only(Tensor, change, value) if isinstance(value, (tuple, list, dict)) else value


class Watch(TorchFunctionMode, Generic[OriginT]):
    """Hands each call that reads a parameter to `use`, all others to `other`.

    Args:
        nodes: the tensors to follow, by identity, each with its node.
    """

    def __init__(self, nodes: Mapping[int, tuple[Tensor, Node]]) -> None:
        super().__init__()
        # By identity, each with the tensor itself, so that no other can take its place.
        self._nodes = dict(nodes)
        # Weakly: data must go when the model drops it.
        self._origins: dict[int, tuple[weakref.ref[Tensor], OriginT]] = {}
        self._overwritten: dict[int, Tensor] = {}
        self._inside: set[Function] = set()
        #: Numbers for the calls since `start_path`, and for the rows that they looked up: equal
        #: where they were the same.
        self.path = 0
        self.rows = 0
        # Whether what gates other values is open: branches that are no control flow.
        self._gates: list[Tensor] = []
        self._on_path = False

    def start_path(self) -> None:
        """A forward pass begins: the calls from here on are its path."""
        self.path, self.rows, self._on_path = 0, 0, True

    def end_path(self) -> tuple[int, int]:
        """The numbers of the path walked since `start_path`, and of the rows."""
        self._on_path = False
        if self._gates:  # one transfer for all
            device = self._gates[0].device
            gates = torch.stack([gate.to(device) for gate in self._gates]).tolist()
            self.rows = hash((self.rows, *gates))
            self._gates.clear()
        return self.path, self.rows

    def node(self, tensor: object) -> Node | None:
        """The node of a parameter or a tensor computed from parameters only."""
        known = self._nodes.get(id(tensor))
        return None if known is None else known[1]

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
        if in_backward():
            return func(*args, **kwargs)
        nodes, origins = self._nodes, self._origins
        reads, origin = False, None
        looked_at = args[:1] if func in _READS_SHAPE_ONLY else (*args, *kwargs.values())
        for tensor in tensors_in(looked_at):
            key = id(tensor)
            if key in nodes:
                reads = True
            elif (known := origins.get(key)) is not None and known[0]() is tensor:
                origin = known[1] if origin is None else self.merged(origin, known[1])
        if self._on_path:
            self._walk(func, args, kwargs, origin is not None)
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
        if origin is not None and func not in _OF_SHAPE:
            self.mark(tensors_in((result,)), origin)
            if args and isinstance(args[0], Tensor) and writes_in_place(func):
                written = args[0] if args[0]._base is None else args[0]._base
                self.mark((args[0], written), origin)
        elif self._on_path and func in _PERMUTATIONS:
            self.rows = hash((self.rows, _content(result)))
        return result

    def _body(self, function: Function) -> Function | None:
        """What to run and watch instead of a call; None for one to take as it is.

        Some bodies dispatch a second time under the same name (``Tensor.unflatten``, the pooling
        functions): then the inner one is taken as it is.
        """
        if function in self._inside or function in RULES:
            return None
        if function in COMPOSITES:
            return COMPOSITES[function]
        if isinstance(function, FunctionType) and function not in _LEAVE_ALONE:
            return body_of(function)
        return None

    def _walk(self, function: Function, args: Any, kwargs: Any, data: bool) -> None:
        """Add one call to the path: the function, its settings, and which rows it looks up."""
        self.path = hash(
            (self.path, function, *map(_setting, args), *map(_setting, kwargs.values()))
        )
        if data and function in _LOOK_UPS:
            for index in args[1:]:
                self.rows = hash((self.rows, _looked_up(index)))
        if data and (looks := _GATES.get(function)) is not None:
            for tensor in tensors_in((*args, *kwargs.values())):
                if id(tensor) not in self._nodes:
                    self._gates += looks(tensor.detach())

    def merged(self, one: OriginT, other: OriginT) -> OriginT:
        """The origin of what is computed from two."""
        return one

    def use(self, function: Function, args: Any, kwargs: Any, origin: OriginT | None) -> Any:
        """Run a call that reads a parameter; ``origin``: of the data that it reads too, if any."""
        raise NotImplementedError

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Run a call that reads no parameter."""
        return function(*args, **kwargs)

    def read(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call, nodes in place of their tensors."""
        nodes: tuple[Any, Any] = map_tensors(lambda t: self.node(t) or t, (args, kwargs))
        return nodes

    def follow(
        self,
        function: Function,
        read: tuple[Any, Any],
        outputs: Mapping[int, Tensor],
        draws: RandomState | None = None,
    ) -> None:
        """Remember outputs of a call, by their index, as computed from parameters only.

        Args:
            function: what was called.
            read: its arguments as `read` gave them before.
            outputs: index among the results -> tensor.
            draws: the random state before the call, where it drew from it.
        """
        written = writes_in_place(function)
        for index, output in outputs.items():
            if output.is_floating_point() or output.is_complex():
                if written:
                    self.forget(output)
                node = Expression(function, *read, index, draws)
                self._nodes[id(output)] = (output, node)

    def forget(self, written: Tensor) -> None:
        """A tensor was written: what was known of it, and of what shares its memory, is past."""
        self._nodes.pop(id(written), None)
        memory = written.untyped_storage().data_ptr()
        for key, (tensor, _) in self._nodes.items():
            if tensor.untyped_storage().data_ptr() == memory:
                self._overwritten[key] = tensor

    def _check_overwritten(self, arguments: Iterable[Any]) -> None:
        if not self._overwritten:
            return
        for tensor in tensors_in(arguments):
            if id(tensor) in self._overwritten and (node := self.node(tensor)) is not None:
                raise RuntimeError(
                    f"a tensor computed from parameter {', '.join(map(repr, sorted(node.names)))} "
                    "is read after another view of its memory was written in place; use an "
                    "out-of-place function there"
                )

    def names(self, args: Any, kwargs: Any) -> frozenset[str]:
        """The parameters that a call reads, directly or through expressions."""
        known = map(self._nodes.get, map(id, tensors_in((*args, *kwargs.values()))))
        return frozenset[str]().union(*(one[1].names for one in known if one is not None))

    @property
    def nodes(self) -> Mapping[int, tuple[Tensor, Node]]:
        """The tensors followed so far."""
        return self._nodes


def leaves(parameters: Mapping[str, nn.Parameter]) -> dict[int, tuple[Tensor, Node]]:
    """Parameters as the nodes to start with."""
    return {id(parameter): (parameter, Leaf(name)) for name, parameter in parameters.items()}


def _setting(value: Any) -> Any:
    """What of an argument makes a call another call."""
    kind = type(value)
    if kind in _PLAIN:
        # Rates change from step to step; switched off or on they make another function.
        return 0.5 if kind is float and value not in (0.0, 1.0) else value
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(map(_setting, value))
    if isinstance(value, slice):
        return _setting((value.start, value.stop, value.step))
    return value if isinstance(value, (int, str)) else kind


def _looked_up(index: Any) -> Any:
    """Which rows an index names; own rows do not matter."""
    if isinstance(index, (list, tuple)):
        if index and isinstance(index[0], Tensor) and _counts_up(index[0]):
            return "own rows"
        return tuple(map(_looked_up, index))
    return _content(index)


def _content(tensor: object) -> Any:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
        return None
    return tensor.shape, tensor.detach().cpu().numpy().tobytes()


def _open(factor: Tensor) -> list[Tensor]:
    """Of a mask, whether some and whether all is let through; of a few factors, whether any is."""
    if factor.dtype == torch.bool:
        return [factor.any(), factor.all()]
    return [factor.any()] if factor.numel() <= _FEW and not factor.is_complex() else []


def _crosses(matrix: Tensor) -> list[Tensor]:
    """Whether a square matrix, the batch's size perhaps, mixes rows."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.requires_grad:
        return []
    return [matrix.triu(1).any() | matrix.tril(-1).any()]


def _counts_up(indices: Tensor) -> bool:
    """Whether an index along dimension 0 is `arange`: each example looks up its own row."""
    if indices.dtype == torch.bool or indices.dim() != 1:
        return False
    return torch.equal(indices, torch.arange(len(indices), device=indices.device))


# Functions of their first argument; the second gives its shape or type.
_READS_SHAPE_ONLY = {
    Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to,
}  # fmt: skip

# Results that take shape and type from their arguments, and no value.
_OF_SHAPE = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like,
    torch.randn_like, torch.randint_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
    Tensor.new_empty, Tensor.new_tensor, Tensor.size, Tensor.dim, Tensor.numel,
}  # fmt: skip

# Where indices move rows: other indices make another path.
_LOOK_UPS = {
    Tensor.__getitem__, Tensor.__setitem__, torch.index_select, Tensor.index_select, torch.gather,
    Tensor.gather, torch.take, Tensor.take, torch.take_along_dim, Tensor.take_along_dim,
    torch.index_add, Tensor.index_add, Tensor.index_add_, torch.index_copy, Tensor.index_copy,
    Tensor.index_copy_, torch.index_put, Tensor.index_put, Tensor.index_put_, torch.scatter,
    Tensor.scatter, Tensor.scatter_, torch.scatter_add, Tensor.scatter_add, Tensor.scatter_add_,
    torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_, F.embedding,
}  # fmt: skip

#: Up to how many factors are checked for being all zero.
_FEW = 1024
# Where a factor of zero, or a mask, shuts off what it meets: opened it makes another path.
_GATES: dict[Function, Callable[[Tensor], list[Tensor]]] = {
    **dict.fromkeys(
        (
            torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply, Tensor.__mul__,
            Tensor.__rmul__, Tensor.__imul__, torch.where, Tensor.where, torch.lerp, Tensor.lerp,
            Tensor.lerp_, torch.addcmul, Tensor.addcmul, Tensor.addcmul_, torch.masked_fill,
            Tensor.masked_fill, Tensor.masked_fill_, torch.masked_scatter, Tensor.masked_scatter,
            Tensor.masked_scatter_,
        ),
        _open,
    ),
    **dict.fromkeys(
        (
            torch.matmul, torch.mm, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.__matmul__,
            Tensor.__rmatmul__,
        ),
        _crosses,
    ),
}  # fmt: skip
_PERMUTATIONS = {torch.randperm, torch.multinomial, Tensor.multinomial}

# Python methods of Tensor that compute nothing.
_LEAVE_ALONE = (
    Tensor.backward, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook,
    Tensor.__repr__, Tensor.__len__, Tensor.__iter__, Tensor.__format__, Tensor.__contains__,
    Tensor.is_shared, Tensor.share_memory_, Tensor.__deepcopy__, Tensor.__reduce_ex__,
    torch.autograd.grad,
)  # fmt: skip
