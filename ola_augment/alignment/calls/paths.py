"""What of a call makes a forward pass another path: settings, rows looked up, gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.arguments import PLAIN, Function


def setting(value: Any) -> Any:
    """What of an argument makes a call another call."""
    kind = type(value)
    if kind in PLAIN:
        # Rates change from step to step; switched off or on they make another function.
        return 0.5 if kind is float and value not in (0.0, 1.0) else value
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(map(setting, value))
    if isinstance(value, slice):
        return setting((value.start, value.stop, value.step))
    return value if isinstance(value, (int, str)) else kind


def looked_up(index: Any) -> Any:
    """Which rows an index names; own rows are no matter."""
    if isinstance(index, (list, tuple)):
        if index and isinstance(index[0], Tensor) and _counts_up(index[0]):
            return "own rows"
        return tuple(map(looked_up, index))
    return content(index)


def content(tensor: object) -> Any:
    """What whole numbers a tensor holds."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
        return None
    return tensor.shape, tensor.detach().cpu().numpy().tobytes()


def _open(factor: Tensor) -> list[Tensor]:
    """Of a mask, whether some and whether all is let through; of a few factors, whether any is."""
    if factor.dtype == torch.bool:
        return [factor.any(), factor.all()]
    return [factor.any()] if factor.numel() <= _FEW and not factor.is_complex() else []


def _crosses(matrix: Tensor) -> list[Tensor]:
    """Whether a square matrix, the batch's size perhaps, mixes rows."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.requires_grad:
        return []
    return [matrix.triu(1).any() | matrix.tril(-1).any()]


def _counts_up(indices: Tensor) -> bool:
    """Whether an index along dimension 0 is `arange`: each example looks up its own row."""
    if indices.dtype == torch.bool or indices.dim() != 1:
        return False
    return torch.equal(indices, torch.arange(len(indices), device=indices.device))


# Where indices move rows: other indices make another path.
LOOK_UPS = {
    Tensor.__getitem__, Tensor.__setitem__, torch.index_select, Tensor.index_select, torch.gather,
    Tensor.gather, torch.take, Tensor.take, torch.take_along_dim, Tensor.take_along_dim,
    torch.index_add, Tensor.index_add, Tensor.index_add_, torch.index_copy, Tensor.index_copy,
    Tensor.index_copy_, torch.index_put, Tensor.index_put, Tensor.index_put_, torch.scatter,
    Tensor.scatter, Tensor.scatter_, torch.scatter_add, Tensor.scatter_add, Tensor.scatter_add_,
    torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_, F.embedding,
}  # fmt: skip

#: Of so many factors it is asked whether all are zero.
_FEW = 1024
# Where a factor of zero, or a mask, shuts off what it meets: opened it makes another path.
GATES: dict[Function, Callable[[Tensor], list[Tensor]]] = {
    **dict.fromkeys(
        (
            torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply, Tensor.__mul__,
            Tensor.__rmul__, Tensor.__imul__, torch.where, Tensor.where, torch.lerp, Tensor.lerp,
            Tensor.lerp_, torch.addcmul, Tensor.addcmul, Tensor.addcmul_, torch.masked_fill,
            Tensor.masked_fill, Tensor.masked_fill_, torch.masked_scatter, Tensor.masked_scatter,
            Tensor.masked_scatter_,
        ),
        _open,
    ),
    **dict.fromkeys(
        (
            torch.matmul, torch.mm, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.__matmul__,
            Tensor.__rmatmul__,
        ),
        _crosses,
    ),
}  # fmt: skip
PERMUTATIONS = {torch.randperm, torch.multinomial, Tensor.multinomial}
