"""Watching every torch call that reads a parameter, or a tensor computed from parameters only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from ola_augment.alignment.expressions import Expression, Leaf, Node
from ola_augment.alignment.rules import RULES

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


def writes_in_place(function: Function) -> bool:
    """Whether a function changes its first argument."""
    name = name_of(function)
    special = name.startswith("__")
    return name in _IN_PLACE_OPERATORS if special else name.endswith("_")


_IN_PLACE_OPERATORS = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


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
        if func not in RULES and isinstance(func, FunctionType) and func not in _LEAVE_ALONE:
            with self:
                return body_of(func)(*args, **kwargs)
        from_data = func not in _READS_SHAPE_ONLY and any(
            id(tensor) not in nodes and id(tensor) not in constants for tensor in tensors
        )
        return self.use(func, args, kwargs, from_data)

    def use(self, function: Function, args: Any, kwargs: Any, from_data: bool) -> Any:
        """Run a call that reads a parameter; ``from_data``: and a tensor that is none."""
        raise NotImplementedError

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        """Run a call that reads no parameter."""
        return function(*args, **kwargs)

    def follow(self, function: Function, args: Any, kwargs: Any, result: Any) -> None:
        """Remember the results of a call as computed from parameters only."""
        args, kwargs = tree_map_only(Tensor, lambda t: self.node(t) or t, (args, kwargs))
        for index, output in enumerate(tree_flatten(result)[0]):
            if isinstance(output, Tensor) and output.is_floating_point():
                node = Expression(function, args, kwargs, index)
                self._nodes[id(output)] = (output, node)

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
