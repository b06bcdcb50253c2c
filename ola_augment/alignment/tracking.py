"""Watching every torch call that reads a parameter, or a tensor computed from parameters only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ola_augment.alignment.expressions import (
    Expression,
    Leaf,
    Node,
    RandomState,
    writes_in_place,
)
from ola_augment.alignment.rules import COMPOSITES, RULES

Function = Callable[..., Any]


def _never(*_: object) -> bool:
    return False


_NO_DISPATCH = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never
)


def body_of(function: FunctionType) -> FunctionType:
    """A copy of a composite torch function that skips its own dispatch to modes.

    A torch function written in Python hands itself over to the active mode before it does anything
    else. With this copy a mode can run it and watch the calls inside it.
    """
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **_NO_DISPATCH},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def name_of(function: Function) -> str:
    """How a function is called in messages."""
    return getattr(function, "__name__", repr(function))


def outputs_of(function: Function, args: Any, result: Any) -> list[Tensor]:
    """The tensors that a call gives: its results, or what it wrote."""
    if writes_in_place(function) and args and isinstance(args[0], Tensor):
        return [args[0]]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists and tuples of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


class Tracker(TorchFunctionMode):
    """Hands each call that reads a parameter to `use`, all others to `other`.

    Args:
        parameters: the parameters to follow, by name.
        buffers: the model's buffers, which no example changes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], buffers: Iterable[Tensor]) -> None:
        super().__init__()
        # By identity, each with the tensor itself, so that no other can take its place.
        self._nodes: dict[int, tuple[Tensor, Node]] = {
            id(parameter): (parameter, Leaf(name)) for name, parameter in parameters.items()
        }
        self._constants = {id(buffer): buffer for buffer in buffers}
        self._overwritten: dict[int, Tensor] = {}
        self._inside: set[Function] = set()

    def node(self, tensor: object) -> Node | None:
        """The node of a parameter or a tensor computed from parameters only."""
        known = self._nodes.get(id(tensor))
        return None if known is None else known[1]

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        nodes, constants = self._nodes, self._constants
        tensors = list(tensors_in((*args, *kwargs.values())))
        if not any(id(tensor) in nodes for tensor in tensors):
            result = self.other(func, args, kwargs)
            if tensors and all(id(tensor) in constants for tensor in tensors):
                self.remember_constant(result)
            return result
        if (body := self._body(func)) is not None:
            self._inside.add(func)
            try:
                with self:
                    return body(*args, **kwargs)
            finally:
                self._inside.discard(func)
        self._check_overwritten(tensors)
        from_data = func not in _READS_SHAPE_ONLY and any(
            id(tensor) not in nodes and id(tensor) not in constants for tensor in tensors
        )
        return self.use(func, args, kwargs, from_data)

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

    def use(self, function: Function, args: Any, kwargs: Any, from_data: bool) -> Any:
        """Run a call that reads a parameter; ``from_data``: and a tensor that is none."""
        raise NotImplementedError

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Run a call that reads no parameter."""
        return function(*args, **kwargs)

    def read(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call, nodes in the place of their tensors."""
        nodes: tuple[Any, Any] = tree_map_only(Tensor, lambda t: self.node(t) or t, (args, kwargs))
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

    def _check_overwritten(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self._overwritten and (node := self.node(tensor)) is not None:
                raise RuntimeError(
                    f"a tensor computed from parameter {', '.join(map(repr, sorted(node.names)))} "
                    "is read after another view of its memory was written in place; use an "
                    "out-of-place function there"
                )

    def remember_constant(self, result: Any) -> None:
        """The results of a call depend on buffers only, or on parameters without gradient."""
        for tensor in tensors_in((result,)):
            self._constants[id(tensor)] = tensor

    def names(self, args: Any, kwargs: Any) -> frozenset[str]:
        """The parameters that a call reads, directly or through expressions."""
        tensors = tensors_in((*args, *kwargs.values()))
        return frozenset(
            name for t in tensors if (node := self.node(t)) is not None for name in node.names
        )


# Functions of their first argument; the second gives its shape or type.
_READS_SHAPE_ONLY = {
    Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to,
}  # fmt: skip

# Python methods of Tensor that compute nothing.
_LEAVE_ALONE = (
    Tensor.backward, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook,
    Tensor.__repr__, Tensor.__len__, Tensor.__iter__, Tensor.__format__, Tensor.__contains__,
    Tensor.is_shared, Tensor.share_memory_, Tensor.__deepcopy__, Tensor.__reduce_ex__,
    torch.autograd.grad,
)  # fmt: skip
