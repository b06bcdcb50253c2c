"""One forward pass: its batch and, after backward, its terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ola_augment.alignment.calls.expressions import Leaf, Node, Tangents
from ola_augment.alignment.method.norms import ExampleNorms
from ola_augment.alignment.method.terms import PackedTerm


@dataclass(eq=False)
class Tape:
    """One forward pass: its batch and, after backward, its terms.

    Attributes:
        batch: number of examples.
        values: parameters at the pass, for expressions.
        terms: with the node whose tangent each meets, while the reference gradient is not known.
        contracted: (batch,) each with the parameters it belongs to, when it is.
        norms: of the examples' gradients, if they are asked for.
    """

    batch: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
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

    def contract_all(
        self, stack: Mapping[str, Tensor], tangents: Sequence[Tangents]
    ) -> list[tuple[frozenset[str], Tensor]]:
        """The same along several directions, (R, batch) each.

        Args:
            stack: name -> (R, *shape), the directions.
            tangents: those of each.
        """
        found = []
        for node, term in self.terms:
            if isinstance(node, Leaf):
                along = stack.get(node.name)
            else:
                own = [one(node) for one in tangents]
                known = next((one for one in own if one is not None), None)
                along = (
                    None
                    if known is None
                    else torch.stack(
                        [torch.zeros_like(known) if one is None else one for one in own]
                    )
                )
            if along is not None:
                found.append((node.names, term.contract_all(along)))
        return found
