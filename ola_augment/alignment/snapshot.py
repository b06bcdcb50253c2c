"""Running a model without a trace: random states, tensors, attributes and caches come back."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was, bit for bit, whatever its forward pass does to it.

    Covered: random states; values, versions and gradients of parameters and buffers; attributes of
    its modules and of the objects in them, lists, dicts, sets, arrays and random generators
    included; what its hooks and forward methods reach through closures and global names; caches of
    ``parametrize.cached()``. Files, sockets and class attributes are not.
    """
    snapshot = _Snapshot()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    snapshot.restores.append(random_states(device))
    snapshot.visit(model)
    snapshot.visit(parametrization_cache())
    try:
        snapshot.detach_tensors()
        yield
    finally:
        for restore in reversed(snapshot.restores):
            restore()


class _Snapshot:
    """Walks what hangs on an object and remembers how to put it back."""

    def __init__(self) -> None:
        self.restores: list[Restore] = []
        self._seen: dict[int, object] = {}
        self._tensors: list[Tensor] = []

    def detach_tensors(self) -> None:
        """Give every tensor met a storage of its own for the while; the old one stays untouched."""
        for tensor in self._tensors:
            if tensor.is_inference() or tensor.layout != torch.strided:
                continue
            data, gradient = tensor.data, tensor.grad if tensor.is_leaf else None
            if tensor.grad_fn is None and not tensor._is_view():
                tensor.data = data.clone()
                self.restores.append(functools.partial(set_version, tensor, tensor._version))
                self.restores.append(functools.partial(setattr, tensor, "data", data))
            if gradient is not None:
                value = gradient.data
                gradient.data = value.clone()

                def restore(
                    tensor: Tensor = tensor, gradient: Tensor = gradient, value: Tensor = value
                ) -> None:
                    gradient.data = value
                    tensor.grad = gradient

                self.restores.append(restore)
            elif tensor.is_leaf and tensor.requires_grad:
                self.restores.append(functools.partial(setattr, tensor, "grad", None))

    def visit(self, value: object) -> None:
        """Remember one object and, through it, what it holds."""
        pending = [value]
        while pending and len(self._seen) < _MOST_OBJECTS:
            one = pending.pop()
            if id(one) in self._seen or isinstance(one, _PLAIN):
                continue
            self._seen[id(one)] = one
            pending.extend(self._remember(one))

    def _remember(self, value: Any) -> list[Any]:
        """Note how to restore one object; returns what it holds."""
        if isinstance(value, Tensor):
            self._tensors.append(value)
            return []
        if isinstance(value, (dict, list, set, deque)):
            content = list(value.items()) if isinstance(value, dict) else list(value)
            self.restores.append(lambda: _refill(value, content))
            return [v for _, v in content] if isinstance(value, dict) else content
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        if isinstance(value, np.ndarray):
            array = value.copy()
            self.restores.append(lambda: np.copyto(value, array))
            return []
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self.restores.append(lambda: value.set_state(state))
            return []
        if isinstance(value, random.Random):
            python = value.getstate()
            self.restores.append(lambda: value.setstate(python))
            return []
        if isinstance(value, np.random.Generator):
            bits = value.bit_generator.state
            self.restores.append(lambda: setattr(value.bit_generator, "state", bits))
            return []
        if isinstance(value, MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, FunctionType):
            return self._reached_by(value)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return []
        held: list[Any] = [attributes]
        if isinstance(value, nn.Module):
            for base in type(value).__mro__:
                held += [own for own in vars(base).values() if isinstance(own, FunctionType)]
        return held

    def _reached_by(self, function: FunctionType) -> list[Any]:
        """Cells of a closure, and the global names that the code reads and may rebind."""
        if function.__module__.partition(".")[0] in ("torch", "torchvision", "numpy"):
            return []
        held = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                content = cell.cell_contents
                self.restores.append(functools.partial(setattr, cell, "cell_contents", content))
                held.append(content)
        space = function.__globals__
        for name in function.__code__.co_names:
            if name in space and isinstance(space[name], (*_CONTAINERS, *_NUMBERS, Tensor)):
                content = space[name]
                self.restores.append(functools.partial(space.__setitem__, name, content))
                held.append(content)
        return held


def _refill(container: Any, content: list[Any]) -> None:
    """Put the content back where it differs: untouched containers stay untouched."""
    now = list(container.items()) if isinstance(container, dict) else list(container)
    if len(now) == len(content) and all(
        (a[0] is b[0] and a[1] is b[1]) if isinstance(container, dict) else a is b
        for a, b in zip(now, content, strict=True)
    ):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


#: A model that holds more than this (its trainer, a data set) is walked that far.
_MOST_OBJECTS = 100_000

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, np.ndarray)
_PLAIN = (*_NUMBERS, type, torch.dtype, torch.device, torch.Size)
