"""Running a model without a trace: random states, tensors, attributes and caches come back."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import (
    BuiltinMethodType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ola_augment.alignment._fsdp import is_machinery, left_alone
from ola_augment.alignment._torch import parametrization_cache, set_version

Restore = Callable[[], object]


def random_states(device: torch.device) -> Restore:
    """A function that sets Python's, numpy's and torch's random states back to what they are."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    host = torch.get_rng_state()
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        torch.set_rng_state(host)
        if accelerator is not None:
            torch.cuda.set_rng_state(accelerator, device)

    return restore


class Counters:
    """A model's numbers and small buffers, by which its path may change from pass to pass."""

    def __init__(self, model: nn.Module) -> None:
        modules = [vars(module) for module in model.modules()]
        self._numbers = [
            (own, {name: one for name, one in own.items() if type(one) in _NUMBERS})
            for own in modules
        ]
        self._buffers = [
            (buffer, buffer.detach().clone())
            for own in modules
            for buffer in own["_buffers"].values()
            if buffer is not None and buffer.numel() <= _SMALL and not buffer.is_inference()
        ]

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """For a while the model has those that it had when this was made."""
        now = [
            (own, {name: own[name] for name in old if name in own}) for own, old in self._numbers
        ]
        data = [(buffer, buffer.data, buffer._version) for buffer, _ in self._buffers]
        try:
            for own, old in self._numbers:
                own.update(old)
            for buffer, value in self._buffers:
                buffer.data = value.clone()
            yield
        finally:
            for own, new in now:
                own.update(new)
            for buffer, value, version in data:
                buffer.data = value
                set_version(buffer, version)


#: Elements of a buffer up to which it may be a counter.
_SMALL = 16


class Undisturbed:
    """Leaves a model as it is now, bit for bit, whatever its forward passes do to it.

    Each ``with`` block on it starts from the model's present state, and ends in it.

    Covered: random states; values, versions and gradients of parameters and buffers; attributes of
    its modules and of the objects in them, lists, dicts, sets, arrays and random generators
    included; what its hooks and forward methods reach through closures, partials and global
    names; caches of ``parametrize.cached()``. Files, sockets, class attributes and Python modules
    are not.

    Args:
        model: with all that hangs on it.
    """

    def __init__(self, model: nn.Module) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._restores: list[Restore] = [random_states(device)]
        self._of_tensors: list[Restore] = []
        self._seen: dict[int, object] = left_alone(model)
        self._tensors: list[Tensor] = []
        self._visit(model)
        self._visit(parametrization_cache())

    def __enter__(self) -> None:
        try:
            self._detach_tensors()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        for restore in reversed((*self._restores, *self._of_tensors)):
            restore()
        self._of_tensors.clear()

    def _detach_tensors(self) -> None:
        """Give every tensor met a storage of its own for the while; the old one stays untouched."""
        for tensor in self._tensors:
            if tensor.is_inference() or tensor.layout != torch.strided:
                continue
            data, gradient = tensor.data, tensor.grad if tensor.is_leaf else None
            if tensor.grad_fn is None and not tensor._is_view():
                tensor.data = data.clone()
                self._of_tensors.append(functools.partial(set_version, tensor, tensor._version))
                self._of_tensors.append(functools.partial(setattr, tensor, "data", data))
            if gradient is not None:
                value = gradient.data
                gradient.data = value.clone()

                def restore(
                    tensor: Tensor = tensor, gradient: Tensor = gradient, value: Tensor = value
                ) -> None:
                    gradient.data = value
                    tensor.grad = gradient

                self._of_tensors.append(restore)
            elif tensor.is_leaf and tensor.requires_grad:
                self._of_tensors.append(functools.partial(setattr, tensor, "grad", None))

    def _visit(self, value: object) -> None:
        """Remember one object and, through it, what it holds."""
        pending = [value]
        while pending and len(self._seen) < _MOST_OBJECTS:
            one = pending.pop()
            if id(one) in self._seen or issubclass(type(one), _PLAIN) or is_machinery(one):
                continue
            self._seen[id(one)] = one
            pending.extend(self._remember(one))

    def _remember(self, value: Any) -> list[Any]:
        """Note how to restore one object; returns what it holds."""
        own = type(value)  # isinstance would ask the object, which may answer or warn as it likes
        if issubclass(own, Tensor):
            self._tensors.append(value)
            return []
        if issubclass(own, (dict, list, set, deque)):
            content = _content(value)
            self._restores.append(lambda: _refill(value, content))
            return list(value.values()) if issubclass(own, dict) else content
        if issubclass(own, (tuple, frozenset)):
            return list(value)
        if issubclass(own, random.SystemRandom):  # the machine's own, without a state
            return []
        for kind, read, write in _STATES:
            if issubclass(own, kind):
                self._restores.append(functools.partial(write, value, read(value)))
                return []
        if issubclass(own, MethodType):
            return [value.__self__, value.__func__]
        if issubclass(own, BuiltinMethodType):
            return [value.__self__]
        if issubclass(own, functools.partial):
            return [value.func, value.args, value.keywords]
        if issubclass(own, FunctionType):
            return self._reached_by(value)
        held = self._in_slots(value)
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return held
        held.append(attributes)
        if issubclass(own, nn.Module):
            for base in own.__mro__:
                held += [one for one in vars(base).values() if isinstance(one, FunctionType)]
        return held

    def _in_slots(self, value: Any) -> list[Any]:
        """Attributes of an object whose class has no room for others."""
        held: list[Any] = []
        for base in type(value).__mro__:
            for slot in vars(base).values() if "__slots__" in vars(base) else ():
                if isinstance(slot, MemberDescriptorType):
                    with contextlib.suppress(AttributeError):  # an empty slot
                        content = slot.__get__(value)
                        self._restores.append(functools.partial(slot.__set__, value, content))
                        held.append(content)
        return held

    def _reached_by(self, function: FunctionType) -> list[Any]:
        """Cells of a closure, and the global names that the code reads and may rebind."""
        if (function.__module__ or "").partition(".")[0] in ("torch", "torchvision", "numpy"):
            return []
        held = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                content = cell.cell_contents
                self._restores.append(functools.partial(setattr, cell, "cell_contents", content))
                held.append(content)
        space = function.__globals__
        for name in function.__code__.co_names:
            if name in space and isinstance(space[name], (*_CONTAINERS, *_NUMBERS, Tensor)):
                content = space[name]
                self._restores.append(functools.partial(space.__setitem__, name, content))
                held.append(content)
        return held


def _content(container: Any) -> list[Any]:
    """Of a dictionary its keys, then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _refill(container: Any, content: list[Any]) -> None:
    """Put the content back where it differs: untouched containers stay untouched."""
    now = _content(container)
    if len(now) == len(content) and all(map(operator.is_, now, content)):
        return
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        container.update(zip(content[:half], content[half:], strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


#: What holds no other object: its type, how its state is read, and how it is written back.
_STATES: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], object]], ...] = (
    (np.ndarray, lambda array: array.copy(), np.copyto),
    (bytearray, bytes, lambda array, state: array.__setitem__(slice(None), state)),
    (torch.Generator, lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    (random.Random, lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    (np.random.RandomState, lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    (
        np.random.Generator,
        lambda g: g.bit_generator.state,
        lambda g, state: setattr(g.bit_generator, "state", state),
    ),
)

#: A model that holds more than this (its trainer, a data set) is walked that far.
_MOST_OBJECTS = 100_000

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, np.ndarray)
_PLAIN = (*_NUMBERS, type, ModuleType, torch.dtype, torch.device, torch.Size)
