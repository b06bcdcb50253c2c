"""Random numbers for kornia's augmentations: each image's own, whatever else is in its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from numpy.typing import NDArray

Uniforms = Callable[[tuple[int, ...]], Tensor]

_STEP = np.array([0x9E3779B97F4A7C15], np.uint64)
_FIRST, _SECOND = np.array([[0xBF58476D1CE4E5B9], [0x94D049BB133111EB]], np.uint64)


@dataclass(frozen=True)
class Call:
    """One call of a random function of torch.

    Attributes:
        function: its name without namespace, such as ``"rand"``.
        shape: of the result.
        arguments: by name, as torch's schema has them.
    """

    function: str
    shape: tuple[int, ...]
    arguments: Mapping[str, Any]

    def sample(self, uniform: Tensor) -> Tensor:
        """The result, made of (*shape,) float64 numbers in [0, 1)."""
        given, tensors = self.arguments, self.tensors()
        function = self.function.rstrip("_").removesuffix("_like")
        values = _FUNCTIONS[function](uniform.reshape(self.shape), given)
        dtype = given.get("dtype")
        if not isinstance(dtype, torch.dtype):
            dtype = torch.get_default_dtype() if values.is_floating_point() else values.dtype
            dtype = torch.int64 if function == "randint" else dtype
            dtype = tensors[0].dtype if tensors else dtype
        device = given.get("device") or (tensors[0].device if tensors else "cpu")
        return values.to(dtype).to(device)

    def has_rows(self, n: int) -> bool:
        """Whether the result has a row for each of n images."""
        return self.shape[:1] == (n,) and self.function != "randperm"

    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors."""
        return [value for value in self.arguments.values() if isinstance(value, Tensor)]


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers torch's random functions from a seed for each image, in this thread alone.

    A result with a row for each image gets each row from that image's seed, so that it is the same
    in every batch. Any other result is shared by the batch: it has to be given.

    Args:
        seeds: (n,) uint64, one for each image of the batch.
        shared: by their number, calls whose result the batch shares: the first seed makes it, as
            the call for a single image does.

    Attributes:
        calls: what was called so far, in this order.

    Raises:
        NotImplementedError: from inside, a random function that is not known.
        LookupError: from inside, a result without a row for each image that is not shared.
    """

    def __init__(self, seeds: NDArray[np.uint64], shared: Mapping[int, Call] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seeds, self.shared = seeds, shared or {}
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        call = _called(func, args, kwargs)
        result = self._answer(call, len(self.calls))
        self.calls.append(call)
        if not call.function.endswith("_"):
            return result
        return call.arguments["self"].copy_(result)

    def _answer(self, call: Call, number: int) -> Tensor:
        shape, n = call.shape, len(self.seeds)
        if n > 1 and number in self.shared:
            return self._answer_alone(self.shared[number], number)
        if n > 1 and not call.has_rows(n):
            raise LookupError(f"call {number} of {call.function} is shared by {n} images")
        return call.sample(numbers(self.seeds, number, math.prod(shape) // n))

    def _answer_alone(self, call: Call, number: int) -> Tensor:
        return call.sample(numbers(self.seeds[:1], number, math.prod(call.shape)))


def numbers(seeds: NDArray[np.uint64], number: int, count: int) -> Tensor:
    """(n, count) float64 in [0, 1): what each seed gives in its call of a number (SplitMix64)."""
    start = _mixed(seeds + _STEP * np.array([number + 1], np.uint64))
    steps = _STEP * np.arange(1, count + 1, dtype=np.uint64)
    mixed: NDArray[np.uint64] = _mixed(start[:, None] + steps)
    # 24 bits: in single precision, too, they stay below 1.
    return torch.from_numpy((mixed >> np.uint64(40)) * 2.0**-24)


def _mixed(x: NDArray[Any]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _called(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    schema = func._schema
    function = schema.name.removeprefix("aten::")
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given.update(zip(given, args, strict=False))
    given.update(kwargs)
    known = function.rstrip("_").removesuffix("_like")
    if known not in _FUNCTIONS or "out" in given:
        raise NotImplementedError(f"it draws by torch's {schema.name}, which cannot be replayed")
    if "size" in given:
        shape = tuple(given["size"])
    elif known == "randperm":
        shape = (given["n"],)
    else:
        shape = np.broadcast_shapes(*(tuple(x.shape) for x in Call(function, (), given).tensors()))
    return Call(function, shape, given)


def _uniform(u: Tensor, given: Mapping[str, Any]) -> Tensor:
    low, high = float(given["from"]), float(given["to"])
    return low + u * (high - low)


def _normal(u: Tensor, given: Mapping[str, Any]) -> Tensor:
    standard: Tensor = torch.special.ndtri(u + 2.0**-25)
    mean, deviation = given.get("mean", 0.0), given.get("std", 1.0)
    return torch.add(standard.mul(deviation), mean)


def _bernoulli(u: Tensor, given: Mapping[str, Any]) -> Tensor:
    p: Tensor | float = given["self"] if given.get("p") is None else given["p"]
    return u < p


def _randint(u: Tensor, given: Mapping[str, Any]) -> Tensor:
    low, high = int(given.get("low", 0)), int(given["high"])
    return (low + u * (high - low)).floor()


_FUNCTIONS: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "rand": lambda u, _: u,
    "uniform": _uniform,
    "randn": lambda u, _: _normal(u, {}),
    "normal": _normal,
    "bernoulli": _bernoulli,
    "randint": _randint,
    "randperm": lambda u, _: u.argsort(),
}
