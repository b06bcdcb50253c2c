"""The self-check: the alignments of a parameter sum to <the gradient it received, g>."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


class SumCheck:
    """Compares sums of alignments with the gradients that the parameters received.

    Args:
        rounding: relative error of the terms beside that of their arithmetic.
        direction: the reference gradient, where it is known before the backward: then only two
            numbers a parameter are kept of what it receives, otherwise a copy.
    """

    def __init__(self, rounding: float, direction: Mapping[str, Tensor] | None = None) -> None:
        self.received: dict[str, Tensor] = {}
        # Per parameter: the coarsest arithmetic that its gradient went through.
        self._eps: dict[str, float] = {}
        # And by how many roundings an entry of its gradient may be off.
        self._roundings: dict[str, float] = {}
        self._rounding = rounding
        self._direction = direction
        self._along: dict[str, tuple[Tensor, Tensor]] = {}

    def receive(self, name: str, gradient: Tensor) -> None:
        """A parameter received a gradient in the captured backward."""
        self.computed((name,), gradient.dtype)
        gradient = gradient.detach()
        if self._direction is None:
            known = self.received.get(name)
            self.received[name] = gradient.clone() if known is None else known + gradient
            return
        if name in self._direction:
            along, scale = self._along.get(name, (0.0, 0.0))
            more = _along(gradient, self._direction[name])
            self._along[name] = (along + more[0], scale + more[1])

    def computed(self, names: Iterable[str], dtype: torch.dtype, roundings: float = 0.0) -> None:
        """Parameters were used in a call whose output has this precision.

        Args:
            names: of the parameters.
            dtype: of the output.
            roundings: that an entry of their gradient may be off by, in units of the precision.
        """
        eps = torch.finfo(dtype).eps
        for name in names:
            self._eps[name] = max(self._eps.get(name, 0.0), eps)
            self._roundings[name] = max(self._roundings.get(name, 0.0), roundings)

    def compare(
        self, found: list[tuple[frozenset[str], Tensor]], direction: Mapping[str, Tensor]
    ) -> None:
        """Compare, for each group of parameters that share terms.

        Args:
            found: contracted terms, (batch,) each, with their parameters.
            direction: what they were contracted with.

        Raises:
            RuntimeError: naming the parameters whose sums differ.
        """
        received = dict(self._along)
        for name, gradient in self.received.items():
            if name in direction:
                received[name] = _along(gradient, direction[name])
        names = sorted({*received, *(name for group, _ in found for name in group)})
        if not names:
            return
        group_of = _groups(names, [group for group, _ in found])
        # One transfer each: two numbers a term, two a parameter.
        predicted = _sums_and_norms([values for _, values in found])
        flat = [number.double() for pair in received.values() for number in pair]
        along = torch.stack(flat).view(-1, 2).tolist() if flat else []
        total = {group: [0.0, 0.0] for group in set(group_of.values())}
        for (group, _), (value, size) in zip(found, predicted, strict=True):
            own = total[group_of[next(iter(group))]]
            own[0] += value
            own[1] += size
        for name, (value, size) in zip(received, along, strict=True):
            own = total[group_of[name]]
            own[0] -= value
            own[1] += size
        eps = dict.fromkeys(total, 0.0)
        for name in names:
            eps[group_of[name]] = max(eps[group_of[name]], self._eps.get(name, 0.0))
        roundings = dict.fromkeys(total, 0.0)
        for name in names:
            owner = group_of[name]
            roundings[owner] = max(roundings[owner], self._roundings.get(name, 0.0))
        largest = max(size for _, size in total.values())
        wrong = {
            group
            for group, (difference, size) in total.items()
            if math.isfinite(difference)
            and abs(difference) > self._tolerance(eps[group], size, largest, roundings[group])
        }
        if wrong:
            raise RuntimeError(unexplained(name for name in names if group_of[name] in wrong))

    def _tolerance(self, eps: float, size: float, largest: float, roundings: float) -> float:
        # Rounding errors add up like random numbers: sizes are norms, of the examples' alignments
        # and of the products that make up <gradient, g>. The last part is for gradients that are
        # rounding noise beside the others'. Observed at most: a fifth of this.
        factor = max(_FACTOR, roundings) if eps < 1e-5 else 2
        return (factor * eps + self._rounding) * size + min(factor, _FACTOR) / 10 * eps * largest


#: Single and double precision sum up more terms before they round.
_FACTOR = 100


class RandomDirection(Mapping[str, Tensor]):
    """A random tensor for each parameter, drawn again whenever it is read: nothing is kept."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _sums_and_norms(terms: list[Tensor]) -> list[tuple[float, float]]:
    """Sum and norm of each term, those of equally many examples together."""
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(terms)
    for length in {len(term) for term in terms}:
        same = [index for index, term in enumerate(terms) if len(term) == length]
        matrix = torch.stack([terms[index].double() for index in same])
        numbers = torch.stack((matrix.sum(1), torch.linalg.vector_norm(matrix, dim=1)), 1)
        for index, (value, size) in zip(same, numbers.tolist(), strict=True):
            found[index] = value, size
    return found


def _along(gradient: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """<gradient, direction>, and the norm of the products it is the sum of."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    products = gradient.conj().to(wide) * direction.to(wide)
    products = products.real if products.is_complex() else products
    return products.sum(dtype=torch.float64), torch.linalg.vector_norm(products)


def _groups(names: list[str], joint: list[frozenset[str]]) -> dict[str, str]:
    """For each name, one that stands for all that it shares terms with."""
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for group in joint:
        first, *rest = group
        for name in rest:
            parent[root(name)] = root(first)
    return {name: root(name) for name in names}


def unexplained(names: Iterable[str]) -> str:
    """The message for parameters with a gradient from elsewhere."""
    first, *rest = sorted(names)
    listed = ", ".join(map(repr, (first, *rest[:4])))
    listed += f" and {len(rest) - 4} others" if len(rest) > 4 else ""
    return (
        f"parameter {listed} received a gradient that its recorded "
        "uses do not explain: it is also used where the engine cannot see it (a custom "
        "autograd.Function, compiled or scripted code, torch.func transforms, checkpoint with "
        "use_reentrant=True, or a method of the model that was called on a batch of its own). Use "
        "plain torch functions and call the model itself, or freeze the parameter"
    )
