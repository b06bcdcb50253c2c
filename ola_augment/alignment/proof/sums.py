"""The self-check: the alignments of a parameter sum to <the gradient it received, g>."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class SumCheck:
    """Compares sums of alignments with the gradients that the parameters received.

    Args:
        rounding: relative error of the terms beside that of their arithmetic.
        direction: the reference gradient, where it is known before the backward: then only two
            numbers are kept of what a large parameter receives, otherwise a copy.
        passing: each part of the direction is there for its parameter's backward alone.
    """

    def __init__(
        self,
        rounding: float,
        direction: Mapping[str, Tensor] | None = None,
        passing: bool = False,
    ) -> None:
        self.received: dict[str, Tensor] = {}
        # Per parameter: the coarsest arithmetic that its gradient went through.
        self._eps: dict[str, float] = {}
        # And how far an entry of its gradient may be off, relatively, since torch adds it up so.
        self._off: dict[str, float] = {}
        self._rounding = rounding
        self._direction = direction
        self._passing = passing
        self._along: dict[str, tuple[Tensor, Tensor]] = {}

    def receive(self, name: str, gradient: Tensor) -> None:
        """A parameter received a gradient in the captured backward."""
        self.computed((name,), gradient.dtype)
        gradient = gradient.detach()
        if self._direction is None or (gradient.numel() <= _SMALL and not self._passing):
            known = self.received.get(name)
            self.received[name] = gradient.clone() if known is None else known + gradient
            return
        if name in self._direction:
            more = _along(gradient.flatten(), self._direction[name].flatten())
            known_along = self._along.get(name)
            if known_along is not None:
                more = known_along[0] + more[0], known_along[1] + more[1]
            self._along[name] = more

    def computed(self, names: Iterable[str], dtype: torch.dtype, roundings: float = 0.0) -> None:
        """Parameters were used in a call whose output has this precision.

        Args:
            names: of the parameters.
            dtype: of the output.
            roundings: that an entry of their gradient may be off by, in units of the precision.
        """
        eps = _EPS.get(dtype) or torch.finfo(dtype).eps
        for name in names:
            self._eps[name] = max(eps, self._eps.get(name, 0.0))
            self._off[name] = max(eps * roundings, self._off.get(name, 0.0))

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
        copies = {name: one for name, one in self.received.items() if name in direction}
        received = self._along_each(copies, direction)
        names = sorted({*received, *(name for group, _ in found for name in group)})
        if not names:
            return
        group_of = _groups(names, [group for group, _ in found])
        # One transfer each: two numbers a term, two a parameter.
        predicted = _sums_and_norms([values for _, values in found])
        total = {group: [0.0, 0.0] for group in set(group_of.values())}
        for (group, _), (value, size) in zip(found, predicted, strict=True):
            own = total[group_of[next(iter(group))]]
            own[0] += value
            own[1] += size
        for name, (value, size) in received.items():
            own = total[group_of[name]]
            own[0] -= value
            own[1] += size
        eps, off = dict.fromkeys(total, 0.0), dict.fromkeys(total, 0.0)
        for name in names:
            owner = group_of[name]
            eps[owner] = max(eps[owner], self._eps.get(name, 0.0))
            off[owner] = max(off[owner], self._off.get(name, 0.0))
        largest = max(size for _, size in total.values())
        wrong = {
            group
            for group, (difference, size) in total.items()
            if math.isfinite(difference)
            and abs(difference) > self._tolerance(eps[group], size, largest, off[group])
        }
        if wrong:
            said = unexplained(name for name in names if group_of[name] in wrong)
            raise RuntimeError(said + _IN_16_BITS * any(eps[group] > _COARSE for group in wrong))

    def _along_each(
        self, gradients: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, float]]:
        """<gradient, direction> and the norm of the products, by name; the small in one go."""
        names = list(self._along)
        found = [(value.view(1), size.view(1)) for value, size in self._along.values()]
        together: dict[object, dict[str, tuple[Tensor, Tensor]]] = {}
        for name, gradient in gradients.items():
            along = direction[name]
            one = gradient.flatten(), along.flatten()
            if gradient.numel() <= _SMALL:
                key = gradient.dtype, along.dtype, gradient.device
                together.setdefault(key, {})[name] = one
            else:
                names.append(name)
                found.append(_along(*(rows.view(1, -1) for rows in one)))
        for group in together.values():
            names += group
            padded = (pad_sequence(list(rows), True) for rows in zip(*group.values(), strict=True))
            found.append(_along(*padded))
        if not names:
            return {}
        # One transfer each.
        values, sizes = (torch.cat(one).tolist() for one in zip(*found, strict=True))
        return dict(zip(names, zip(values, sizes, strict=True), strict=True))

    def _tolerance(self, eps: float, size: float, largest: float, off: float) -> float:
        # Rounding errors add up like random numbers: sizes are norms, of the examples' alignments
        # and of the products that make up <gradient, g>. The last part is for gradients that are
        # rounding noise beside the others'. Observed at most: a fifth of this.
        own = (2 if eps > _COARSE else _FACTOR) * eps
        return (max(own, off) + self._rounding) * size + own / 10 * largest


_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64, torch.bfloat16)}

#: Precision of a call beyond which it is of 16 bits.
_COARSE = 1e-5

#: Elements of a parameter up to which it is compared together with others.
_SMALL = 4096

#: Single and double precision sum up more terms before they round.
_FACTOR = 100


class RandomDirection(Mapping[str, Tensor]):
    """A random tensor for each parameter, drawn again whenever it is read: nothing is kept."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(parameter.shape, generator=generator, device="cpu").to(
            parameter.device, parameter.dtype
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _sums_and_norms(terms: list[Tensor]) -> list[tuple[float, float]]:
    """Sum and norm of each term, those of equally many examples together."""
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(terms)
    for length in {len(term) for term in terms}:
        same = [index for index, term in enumerate(terms) if len(term) == length]
        matrix = torch.stack([terms[index] for index in same]).double()
        numbers = torch.stack((matrix.sum(1), torch.linalg.vector_norm(matrix, dim=1)), 1)
        for index, (value, size) in zip(same, numbers.tolist(), strict=True):
            found[index] = value, size
    return found


def _along(gradient: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """<gradient, direction> of each row, and the norm of the products it is the sum of."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.dtype != wide or direction.dtype != wide or wide.is_complex:
        gradient, direction = gradient.conj().to(wide), direction.to(wide)
    products = gradient * direction
    products = products.real if wide.is_complex else products
    return products.sum(-1, dtype=torch.float64), torch.linalg.vector_norm(products, dim=-1)


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
        "use_reentrant=True, a hook that changes its gradient, saved_tensors_hooks that round, a "
        "copy of it alone into a part of a tensor, data that left torch by numpy(), item() or "
        "tolist() and came back, or a method of the model that was called on a batch of its own). "
        "Use plain torch functions, out of place, and call the model itself, or freeze the "
        "parameter"
    )


_IN_16_BITS = (
    ". Or, in 16 bits, torch's own gradient is off: on a CPU it adds up rows that are looked up "
    "(by an index, embedding_bag, take) one by one, until they are lost in the sum. Then keep "
    "parameters in float32, under torch.autocast if you like"
)
