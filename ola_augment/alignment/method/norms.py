"""Exact norms of the examples' gradients, for rewards that are cosines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor

from ola_augment.alignment.calls.expressions import Leaf, Node, pull_back
from ola_augment.alignment.method.terms import Term, squared_norms


class ExampleNorms:
    """|grad l_i| of one forward pass, gathered as backward brings the terms.

    A parameter that is used once gives its squared norms at once. The uses of one that is used
    several times (tied weights), or through an expression (weight normalisation), are added up as
    per-example gradients first: (B, *shape) for each such parameter.

    Args:
        of: the names of the parameters that count.
    """

    def __init__(self, of: Set[str]) -> None:
        self._of = of
        self._uses: Counter[str] = Counter()
        self._squares: dict[str, Tensor] = {}
        self._gradients: dict[Node, Tensor] = {}

    def expect(self, nodes: Iterable[Node]) -> None:
        """A call reads these: their terms will come."""
        for node in nodes:
            for name in node.names & self._of:
                self._refuse_late(name)
                self._uses[name] += 1

    def add(self, node: Node, term: Term, shape: torch.Size, last: bool) -> None:
        """A term came.

        Args:
            node: what the term belongs to, of this shape.
            term: its per-example gradients.
            shape: of the node's tensor.
            last: no other backward can bring terms of the same calls.
        """
        if not node.names & self._of:
            return
        for name in node.names:
            self._refuse_late(name)
        only = last and node not in self._gradients
        if only and isinstance(node, Leaf) and self._uses[node.name] == 1:
            self._squares[node.name] = term.squared_norms(shape)
            return
        gradients = term.gradients(shape)
        known = self._gradients.get(node)
        self._gradients[node] = gradients if known is None else known + gradients

    def _refuse_late(self, name: str) -> None:
        if name in self._squares:
            raise RuntimeError(
                f"norms=True: parameter {name!r} is used again after a backward() inside capture() "
                "went through its only use; run one backward on the sum of the losses, or pass "
                "retain_graph=True to the first"
            )

    def names(self) -> set[str]:
        """The parameters of which a term came."""
        return {*self._squares, *(name for node in self._gradients for name in node.names)}

    def total(self, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """(B,) norms over all parameters; empties what was gathered.

        Args:
            values: parameters at the capture, for expressions.
            like: (B,), its precision is that of the sum.
        """
        total = torch.zeros_like(like)
        for squares in self._squares.values():
            total += squares.to(total)
        gradients: dict[str, Tensor] = {}
        for node, own in self._gradients.items():
            for name, one in pull_back(node, own, values).items():
                if name not in self._of:
                    continue
                gradients[name] = gradients[name] + one if name in gradients else one
        for one in gradients.values():
            total += squared_norms(one).to(total)
        self._squares.clear()
        self._gradients.clear()
        return total.sqrt()
