"""One forward pass: its batch and, after backward, its terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ola_augment.alignment.calls.expressions import Node, Tangents
from ola_augment.alignment.method.norms import ExampleNorms
from ola_augment.alignment.method.terms import PackedTerm


@dataclass(eq=False)
class Tape:
    """One forward pass: its batch and, after backward, its terms.

    Attributes:
        batch: number of examples.
        terms: with the node whose tangent each meets, while the reference gradient is not known.
        contracted: (batch,) each with the parameters it belongs to, when it is.
        norms: of the examples' gradients, if they are asked for.
    """

    batch: int
    terms: list[tuple[Node, PackedTerm]] = field(default_factory=list)
    contracted: list[tuple[frozenset[str], Tensor]] = field(default_factory=list)
    norms: ExampleNorms | None = None

    def explained(self) -> Iterable[str]:
        """Names of the parameters that have a term."""
        if self.norms is not None:
            yield from self.norms.names()
        for node, _ in self.terms:
            yield from node.names
        for names, _ in self.contracted:
            yield from names

    def contract(self, tangents: Tangents) -> list[tuple[frozenset[str], Tensor]]:
        """<d l_i / d node, tangent> for each term, (batch,)."""
        found = list(self.contracted)
        for node, term in self.terms:
            tangent = tangents(node)
            if tangent is not None:
                found.append((node.names, term.contract(tangent)))
        return found
