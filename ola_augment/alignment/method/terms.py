"""What is kept of one use of a parameter until the reference gradient g is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ola_augment.alignment._torch import memory_of
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.method.storage import Packed, Storage


@dataclass(frozen=True)
class Adjoint:
    """Per-example gradients of an operator's w, from rows of delta and of the inputs.

    Attributes:
        gradients: (rows of delta, *rows of the inputs, shape of w) -> (B, *shape).
        squared_norms: the same arguments -> (B,) squared norms of these, or None where forming
            the gradients is cheaper.
    """

    gradients: Callable[..., Tensor]
    squared_norms: Callable[..., Tensor | None] | None = None


#: Tangents from which on per-example gradients are formed, and elements of them at a time.
_SEVERAL = 3
_ELEMENTS = 2**24
#: Bytes an example from which on a pair is exchanged for a smaller per-example gradient.
_WORTHWHILE = 2**17


class PackedTerm(Protocol):
    """One use's part of the alignments, linear in the tangent of the tensor that was used."""

    def contract(self, tangent: Tensor) -> Tensor:
        """<per-example gradient, tangent>, (B,), for a tangent of the used tensor's shape."""
        ...

    def contract_all(self, tangents: Tensor) -> Tensor:
        """The same for R of them, (R, *shape) -> (R, B)."""
        ...


class Term(PackedTerm, Protocol):
    """The same as backward brings it."""

    def pack(self, storage: Storage, shape: torch.Size) -> PackedTerm:
        """The same term in the storage's format; ``shape``: the used tensor's."""
        ...

    def gradients(self, shape: torch.Size) -> Tensor:
        """The per-example gradients themselves, (B, *shape)."""
        ...

    def squared_norms(self, shape: torch.Size) -> Tensor:
        """Their squared norms, (B,)."""
        ...


class ExampleGradient:
    """The per-example gradient itself: (B, *shape), where that is small (biases, scales)."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def contract(self, tangent: Tensor) -> Tensor:
        """<gradient_i, tangent>, the real part where they are complex."""
        gradient, tangent = _rows(self.gradient, tangent.to(self.gradient.dtype).unsqueeze(0))
        tangent = tangent[0]
        return (gradient.conj() @ tangent).real if gradient.is_complex() else gradient @ tangent

    def contract_all(self, tangents: Tensor) -> Tensor:
        """One product for all."""
        if self.gradient.is_complex():
            return torch.stack([self.contract(tangent) for tangent in tangents])
        gradient, tangents = _rows(self.gradient, tangents.to(self.gradient.dtype))
        return tangents @ gradient.T

    def pack(self, storage: Storage, shape: torch.Size) -> ExampleGradient:
        """Unchanged: it is small already."""
        return self

    def gradients(self, shape: torch.Size) -> Tensor:
        """As they are."""
        return self.gradient.reshape(-1, *shape)

    def squared_norms(self, shape: torch.Size) -> Tensor:
        """Of what is there."""
        return squared_norms(self.gradient)


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
        self._formed: Tensor | None = None

    def contract(self, tangent: Tensor) -> Tensor:
        """<delta_i, operator(x_i, tangent)>, in delta's precision.

        By the per-example gradients where they were formed.
        """
        if self._formed is not None:
            return ExampleGradient(self._formed).contract(tangent)
        dtype = self.delta.dtype
        if dtype.is_complex:
            product = self.operator(*self.inputs, tangent) * self.delta.conj()
            return self.layout.sum(product.real)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs]
        tangent = tangent.to(dtype)
        output = self.operator(*inputs, tangent)
        own = {memory_of(tensor) for tensor in (*inputs, tangent)}
        # In place, unless the operator returned a view: new memory costs more than the product.
        fresh = memory_of(output) not in own
        return self.layout.sum(output.mul_(self.delta) if fresh else output * self.delta)

    def contract_all(self, tangents: Tensor) -> Tensor:
        """By the per-example gradients, some examples at a time, where there is a formula."""
        shape = tangents.shape[1:]
        if len(tangents) < _SEVERAL or self.adjoint is None:
            return torch.stack([self.contract(tangent) for tangent in tangents])
        at_once = max(1, _ELEMENTS // max(1, shape.numel()))
        parts = zip(*(torch.split(rows, at_once) for rows in self._rows()), strict=True)
        gradients = (ExampleGradient(self.adjoint.gradients(*rows, shape)) for rows in parts)
        return torch.cat([one.contract_all(tangents) for one in gradients], 1)

    def pack(self, storage: Storage, shape: torch.Size) -> PackedTerm:
        """Keep the pair in the storage's format, or the per-example gradients of w themselves.

        Those where they take less than half the room and that is worth it: forming them costs
        about as much as the product with g that they save, but for small layers more.
        """
        batch = self.layout.batch
        pair = sum(storage.size(tensor) for tensor in (*self.inputs, self.delta)) // batch
        smaller = 2 * shape.numel() * self.delta.element_size() <= pair
        if smaller and pair >= _WORTHWHILE and self.adjoint is not None:
            return ExampleGradient(self.gradients(shape))
        kind, operator, layout, adjoint = type(self), self.operator, self.layout, self.adjoint
        return PackedPair(
            lambda inputs, delta: kind(operator, inputs, delta, layout, adjoint),
            tuple(storage.pack_shared(tensor) for tensor in self.inputs),
            storage.pack(self.delta),
        )

    def gradients(self, shape: torch.Size) -> Tensor:
        """Formed once."""
        if self._formed is None:
            self._formed = self._form(shape)
        return self._formed

    def _form(self, shape: torch.Size) -> Tensor:
        """By the rule's formula, else by one reverse pass of the operator for each example."""
        if self.adjoint is not None:
            return self.adjoint.gradients(*self._rows(), shape)
        inputs = [x.to(self.delta.dtype) if x.is_floating_point() else x for x in self.inputs]
        with torch.enable_grad():
            w = self.delta.new_zeros(shape, requires_grad=True)
            output = self.operator(*inputs, w)
        return torch.stack(
            [
                torch.autograd.grad(output, w, own, retain_graph=True, materialize_grads=True)[0]
                for own in self.layout.each(self.delta)
            ]
        )

    def squared_norms(self, shape: torch.Size) -> Tensor:
        """By the Gram matrices of inputs and gradients where that is cheaper."""
        if self.adjoint is not None and self.adjoint.squared_norms is not None:
            found = self.adjoint.squared_norms(*self._rows(), shape)
            if found is not None:
                return found
        return squared_norms(self.gradients(shape))

    def _rows(self) -> list[Tensor]:
        return [self.layout.rows(tensor) for tensor in (self.delta, *self.inputs)]


class PackedPair:
    """A `Pair` whose tensors are kept in a storage format; ``make``: it, of them."""

    def __init__(
        self, make: Callable[..., Pair], inputs: tuple[Packed, ...], delta: Packed
    ) -> None:
        self._make = make
        self.inputs = inputs
        self.delta = delta

    def _unpacked(self) -> Pair:
        return self._make(tuple(packed.unpack() for packed in self.inputs), self.delta.unpack())

    def contract(self, tangent: Tensor) -> Tensor:
        """As `Pair.contract`."""
        return self._unpacked().contract(tangent)

    def contract_all(self, tangents: Tensor) -> Tensor:
        """As `Pair.contract_all`."""
        return self._unpacked().contract_all(tangents)


def squared_norms(gradients: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    norms: Tensor = torch.linalg.vector_norm(_rows(gradients, gradients)[0], dim=1)
    return norms.square()


def _rows(gradients: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Both flattened but for their first dimension, in the order of the gradients in memory."""
    if not gradients.is_contiguous() and gradients.shape[1:] == tangents.shape[1:]:
        order = sorted(range(1, gradients.dim()), key=gradients.stride, reverse=True)
        gradients, tangents = gradients.permute(0, *order), tangents.permute(0, *order)
    return gradients.reshape(len(gradients), -1), tangents.reshape(len(tangents), -1)
