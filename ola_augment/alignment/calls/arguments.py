"""Arguments and results of torch calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Function = Callable[..., Any]

#: Types of arguments that hold no tensor, and that stand for themselves in a path.
PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype))


def name_of(function: Function) -> str:
    """How a function is called in messages."""
    return getattr(function, "__name__", repr(function))


@functools.lru_cache(maxsize=4096)
def spelled(function: Function) -> str:
    """A function's name, the same for ``torch.f``, ``Tensor.f``, ``Tensor.f_`` and ``aten.f``."""
    name = name_of(function).partition(".")[0]
    return name if name.startswith("__") else name.rstrip("_")


class Names(NamedTuple):
    """The names of a function's arguments, in one of its overloads."""

    positional: tuple[str, ...]
    by_name: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def parameters_of(function: Function) -> tuple[Names, ...]:
    """The names of a function's arguments, once for each of its overloads."""
    if isinstance(function, FunctionType):
        return (Names(tuple(inspect.signature(function).parameters), ()),)
    if name_of(function).startswith("__"):
        return ()
    schema = getattr(function, "_schema", None)  # a custom operator's, or one of torch.ops.aten
    schemas = (
        torch._C._jit_get_schemas_for_operator(f"aten::{name_of(function)}")
        if schema is None
        else [schema]
    )
    return tuple(
        Names(
            tuple(one.name for one in schema.arguments if not one.kwarg_only),
            tuple(one.name for one in schema.arguments if one.kwarg_only),
        )
        for schema in schemas
    )


#: Other names of arguments, and what the functions themselves call them.
_ALIASES = {"input": "self", "x": "self", "x1": "self", "x2": "other", "axis": "dim"}


def _own_name(name: str, names: Names) -> str:
    known = name in names.positional or name in names.by_name
    return name if known else _ALIASES.get(name, name)


def positional(function: Function, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same call with tensors in their places where it names them: ``linear(input=x, ...)``."""
    if isinstance(function, FunctionType) or not any(map(_holds_tensors, kwargs.values())):
        return args, kwargs
    for names in parameters_of(function):
        left = {_own_name(name, names): name for name in kwargs}
        if not left.keys() <= {*names.positional, *names.by_name}:
            continue
        placed = list(args)
        while len(placed) < len(names.positional) and names.positional[len(placed)] in left:
            placed.append(kwargs[left.pop(names.positional[len(placed)])])
        return tuple(placed), {name: kwargs[name] for name in left.values()}
    return args, kwargs


def _holds_tensors(value: Any) -> bool:
    return type(value) not in PLAIN and any(True for _ in tensors_in((value,)))


def named(function: Function, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the function has for them; by number where it has none."""
    for names in parameters_of(function):
        own = {_own_name(name, names): value for name, value in kwargs.items()}
        if len(args) <= len(names.positional) and own.keys() <= {*names.positional, *names.by_name}:
            return dict(zip(names.positional, args, strict=False)) | own
    return {str(number): value for number, value in enumerate(args)} | kwargs


def outputs_of(function: Function, args: Any, result: Any) -> list[Tensor]:
    """The tensors that a call gives: its results, or what it wrote."""
    if writes_in_place(function) and args and isinstance(args[0], Tensor):
        return [args[0]]
    if isinstance(result, Tensor):
        return [result]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def apart(results: Any) -> Any:
    """Several outputs of a call, none of which is computed from another (an LSTM cell's h from c).

    What flows back to one then comes from outside of the call alone.
    """
    return map_tensors(lambda t: t.clone() if t.requires_grad else t, results)


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists and tuples of them."""
    for argument in arguments:
        if type(argument) in PLAIN:
            continue
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Arguments with their tensors changed, as tree_map does, in a tenth of the time."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if isinstance(value, Tensor):
        return change(value)
    if kind is tuple or kind is list:
        return kind([map_tensors(change, one) for one in value])
    if kind is dict:
        return {name: map_tensors(change, one) for name, one in value.items()}
    return tree_map_only(Tensor, change, value) if isinstance(value, (tuple, list, dict)) else value


def functional(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without writing: of a function that writes its first argument, what it writes."""
    if not writes_in_place(function):
        return function

    def written(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = target.clone()
        function(copy, *args, **kwargs)
        return copy

    return written


@functools.lru_cache(maxsize=4096)
def writes_in_place(function: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(function, "__name__", "").partition(".")[0]
    return name in _IN_PLACE_OPERATORS if name.startswith("__") else name.endswith("_")


_IN_PLACE_OPERATORS = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


# Functions of their first argument; the second gives its shape or type.
READS_SHAPE_ONLY = {
    Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to,
}  # fmt: skip

# Results that take shape and type from their arguments, and no value.
OF_SHAPE = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like,
    torch.randn_like, torch.randint_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
    Tensor.new_empty, Tensor.new_tensor,
}  # fmt: skip

# What a tensor says of itself, which is no computation.
ABOUT = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_contiguous, *(
        vars(torch._C.TensorBase)[name].__get__
        for name in (
            "shape", "dtype", "device", "layout", "ndim", "is_nested", "requires_grad", "_version",
        )
    ),
}  # fmt: skip

# Python methods of Tensor that compute nothing.
LEAVE_ALONE = (
    Tensor.backward, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook,
    Tensor.__repr__, Tensor.__len__, Tensor.__iter__, Tensor.__format__, Tensor.__contains__,
    Tensor.is_shared, Tensor.share_memory_, Tensor.__deepcopy__, Tensor.__reduce_ex__,
    torch.autograd.grad,
)  # fmt: skip
