"""What is kept of one use of a parameter until the reference gradient g is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ola_augment.alignment.layout import Layout
from ola_augment.alignment.storage import Packed, Storage

# (rows of delta, *rows of the inputs, shape of w) -> per-example gradients of w, (B, *shape).
Adjoint = Callable[..., Tensor]

#: Bytes an example from which on a pair is exchanged for a smaller per-example gradient.
_WORTHWHILE = 2**17


class Term(Protocol):
    """One use's part of the alignments, linear in the tangent of the tensor that was used."""

    def contract(self, tangent: Tensor) -> Tensor:
        """<per-example gradient, tangent>, (B,), for a tangent of the used tensor's shape."""
        ...

    def pack(self, storage: Storage, shape: torch.Size) -> Term:
        """The same term in the storage's format; ``shape``: the used tensor's."""
        ...


class ExampleGradient:
    """The per-example gradient itself: (B, *shape), where that is small (biases, scales)."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def contract(self, tangent: Tensor) -> Tensor:
        """<gradient_i, tangent>, the real part where they are complex."""
        tangent = tangent.to(self.gradient.dtype).flatten()
        gradient = self.gradient.reshape(len(self.gradient), -1)
        return (gradient.conj() @ tangent).real if gradient.is_complex() else gradient @ tangent

    def pack(self, storage: Storage, shape: torch.Size) -> ExampleGradient:
        """Unchanged: it is small already."""
        return self


class Pair:
    """Input and output gradient of an operator that is linear in the used tensor w.

    Lemmas 2 and 3: <d l_i / d w, g> = <delta_i, operator(x_i, g)>.
    """

    def __init__(
        self,
        operator: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        delta: Tensor,
        layout: Layout,
        adjoint: Adjoint | None = None,
    ) -> None:
        self.operator = operator
        self.inputs = inputs
        self.delta = delta
        self.layout = layout
        self.adjoint = adjoint

    def contract(self, tangent: Tensor) -> Tensor:
        """<delta_i, operator(x_i, tangent)>, in delta's precision."""
        dtype = self.delta.dtype
        if dtype.is_complex:
            product = self.operator(*self.inputs, tangent) * self.delta.conj()
            return self.layout.sum(product.real)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs]
        tangent = tangent.to(dtype)
        output = self.operator(*inputs, tangent)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, tangent)}
        # In place, unless the operator returned a view: new memory costs more than the product.
        fresh = output.untyped_storage().data_ptr() not in own
        return self.layout.sum(output.mul_(self.delta) if fresh else output * self.delta)

    def pack(self, storage: Storage, shape: torch.Size) -> Term:
        """Keep the pair in the storage's format, or the per-example gradients of w themselves.

        Those where they take less than half the room and that is worth it: forming them costs
        about as much as the product with g that they save, but for small layers more.
        """
        batch = self.layout.batch
        pair = sum(storage.size(tensor) for tensor in (*self.inputs, self.delta)) // batch
        smaller = 2 * shape.numel() * self.delta.element_size() <= pair
        if smaller and pair >= _WORTHWHILE and self.layout.dim == 0 and self.adjoint is not None:
            rows = self.layout.rows
            return ExampleGradient(self.adjoint(rows(self.delta), *map(rows, self.inputs), shape))
        return PackedPair(
            self.operator,
            tuple(storage.pack_shared(tensor) for tensor in self.inputs),
            storage.pack(self.delta),
            self.layout,
        )


class PackedPair:
    """A `Pair` whose tensors are kept in a storage format."""

    def __init__(
        self,
        operator: Callable[..., Tensor],
        inputs: tuple[Packed, ...],
        delta: Packed,
        layout: Layout,
    ) -> None:
        self.operator = operator
        self.inputs = inputs
        self.delta = delta
        self.layout = layout

    def contract(self, tangent: Tensor) -> Tensor:
        """As `Pair.contract`."""
        inputs = tuple(packed.unpack() for packed in self.inputs)
        return Pair(self.operator, inputs, self.delta.unpack(), self.layout).contract(tangent)

    def pack(self, storage: Storage, shape: torch.Size) -> PackedPair:
        """Unchanged: it is packed already."""
        return self
