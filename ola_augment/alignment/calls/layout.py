"""Which rows of a tensor belong to which example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Examples lie along dimension ``dim``, whose size is ``outer * batch * inner``.

    The index along ``dim`` is ``(o * batch + example) * inner + i``: (B, T, E) activations have
    ``outer = inner = 1`` and ``dim = 0``; a (T, B, E) sequence has ``dim = 1``; (B windows, N, C)
    has ``inner = windows``; a flattened (T B, E) has ``outer = T``.
    """

    dim: int
    outer: int
    batch: int
    inner: int

    def rows(self, tensor: Tensor) -> Tensor:
        """Move the examples to the front.

        Args:
            tensor: (d_0, ..., d_k) with d_dim = outer * batch * inner.

        Returns:
            (batch, d_0, ..., outer * inner, ..., d_k): one dimension more than ``tensor``; a view
            where the strides permit.
        """
        if self.batch == 1:
            return tensor.unsqueeze(0)
        if self.outer == 1 and self.dim == 0:
            return torch.unflatten(tensor, 0, (self.batch, self.inner))
        split = torch.unflatten(tensor, self.dim, (self.outer, self.batch, self.inner))
        return split.movedim(self.dim + 1, 0).flatten(self.dim + 1, self.dim + 2)

    def each(self, tensor: Tensor) -> Iterator[Tensor]:
        """For each example the tensor with all rows but its own at zero."""
        if self.batch == 1:  # it may lack the examples' dimension
            yield tensor
            return
        for example in range(self.batch):
            own = torch.zeros_like(tensor)
            for start in range(self.outer):
                first = (start * self.batch + example) * self.inner
                own.narrow(self.dim, first, self.inner).copy_(
                    tensor.narrow(self.dim, first, self.inner)
                )
            yield own

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of each example's rows, (batch,), in at least single precision."""
        rows = self.rows(tensor.unsqueeze(-1)).flatten(1)
        return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))


class Assumed(Layout):
    """A layout that no value tells: the only one that is possible, which derivatives must bear out.

    Of rows that happen to be alike whatever the examples are, and of calls outside of ``forward``.
    """


def candidates(shape: torch.Size, dims: range, batch: int) -> Iterator[Layout]:
    """Every layout of ``batch`` examples along one of ``dims`` that ``shape`` permits."""
    for dim in dims:
        if shape[dim] == 0 or shape[dim] % batch:
            continue
        rest = shape[dim] // batch
        for outer in range(1, rest + 1):
            if rest % outer == 0:
                yield Layout(dim, outer, batch, rest // outer)


def sum_rows_to(rows: Tensor, shape: torch.Size) -> Tensor:
    """Sum (B, ...) down to (B, *shape) by undoing a broadcast of ``shape``."""
    extra = rows.dim() - 1 - len(shape)
    if extra:
        rows = rows.sum(tuple(range(1, 1 + extra)))
    kept = [1 + i for i, size in enumerate(shape) if size == 1 and rows.shape[1 + i] != 1]
    return rows.sum(kept, keepdim=True) if kept else rows
