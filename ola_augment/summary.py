"""Policies and magnitudes as text for people."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ola_augment.kernels.table import TABLE
from ola_augment.operation import Operation
from ola_augment.space import SearchSpace


def magnitude_text(operation: Operation, magnitude: float) -> str:
    """A magnitude with its unit; empty for an operation that takes none.

    Example:
        >>> magnitude_text(Operation("rotate", 0, 135, signed=True), -38.2)
        '-38°'
        >>> magnitude_text(Operation("color", 0.1, 1.9), 1.2345)
        '1.23'
    """
    if operation.low is None:
        return ""
    own = operation.kernel is not None or operation.matrix is not None
    unit = ("px" if operation.side else "") if own else TABLE[operation.name].unit
    if unit == "degrees":
        return f"{magnitude:.0f}°"
    return f"{magnitude:.3g} {unit}".rstrip()


class Favour(NamedTuple):
    """What of its operations a policy prefers.

    Attributes:
        verb: ``"drawn"`` where it draws some more often than others, else ``"kept"``.
        probs: (A,) probability of that.
        start: of each before anything is learned.
    """

    verb: str
    probs: Tensor
    start: float


def favour(keep: Tensor, ops: Tensor | None) -> Favour:
    """Find out what a policy prefers.

    Args:
        keep: (A,) log-probabilities of keeping a drawn operation.
        ops: (A,) log-probabilities of drawing each; None where all are drawn alike.
    """
    if ops is None:
        return Favour("kept", keep.detach().exp(), 0.5)
    return Favour("drawn", ops.detach().exp(), 1 / len(ops))


def table_of_operations(
    space: SearchSpace, favoured: Favour, magnitude: Tensor, height: int, width: int
) -> list[str]:
    """One line an operation, the favourites first.

    Args:
        space: of A operations and K bins.
        favoured: what is preferred among them.
        magnitude: (A, K) probabilities.
        height: of the images that magnitudes in pixels are for.
        width: of the images in pixels.

    Example:
        >>> space = SearchSpace((Operation("rotate", 0, 30, signed=True),), num_magnitude_bins=2)
        >>> favoured = Favour("kept", torch.tensor([0.91]), 0.5)
        >>> table_of_operations(space, favoured, torch.tensor([[0.5, 0.5]]), 32, 32)
        ['rotate: kept 0.91, mean ±15°']
    """
    means = (magnitude.double().cpu() * space.magnitudes(height, width)).sum(1).tolist()
    lines = []
    for index in torch.argsort(favoured.probs, descending=True, stable=True).tolist():
        operation = space.operations[index]
        line = f"{operation.name}: {favoured.verb} {float(favoured.probs[index]):.2f}"
        if text := magnitude_text(operation, means[index]):
            line += f", mean {'±' * operation.signed}{text}"
        lines.append(line)
    return lines
