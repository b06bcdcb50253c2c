"""Which tensors are parameters, or computed from parameters only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ola_augment.alignment._torch import memory_of
from ola_augment.alignment.calls.arguments import (
    Function,
    map_tensors,
    tensors_in,
    writes_in_place,
)
from ola_augment.alignment.calls.expressions import Expression, Leaf, Node, RandomState


class Nodes:
    """Tensors by identity, each with its node.

    Args:
        nodes: those to start with.
    """

    def __init__(self, nodes: Mapping[int, tuple[Tensor, Node]]) -> None:
        super().__init__()
        # Each with the tensor itself, so that no other can take its place.
        self._nodes = dict(nodes)
        self._overwritten: dict[int, Tensor] = {}

    def node(self, tensor: object) -> Node | None:
        """The node of a parameter or a tensor computed from parameters only."""
        known = self._nodes.get(id(tensor))
        return None if known is None else known[1]

    def _read(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call, with nodes instead of tensors."""
        nodes: tuple[Any, Any] = map_tensors(lambda t: self.node(t) or t, (args, kwargs))
        return nodes

    def _follow(
        self,
        function: Function,
        read: tuple[Any, Any],
        outputs: Mapping[int, Tensor],
        draws: RandomState | None = None,
    ) -> None:
        """Remember outputs of a call, by their index, as computed from parameters only.

        Args:
            function: what was called.
            read: its arguments as `_read` gave them before.
            outputs: index among the results -> tensor.
            draws: the random state before the call, where it drew from it.
        """
        written = writes_in_place(function)
        for index, output in outputs.items():
            if written:
                self.forget(output)
            node = Expression(function, *read, index, draws)
            self._nodes[id(output)] = (output, node)

    def stands_for(self, tensor: Tensor, node: Node) -> None:
        """A tensor came to be that is a parameter, or computed from parameters only."""
        self._nodes[id(tensor)] = (tensor, node)

    def forget(self, written: Tensor) -> None:
        """A tensor was written: what was known of it, and of what shares its memory, is past."""
        self._nodes.pop(id(written), None)
        memory = memory_of(written)
        for key, (tensor, _) in self._nodes.items():
            if memory_of(tensor) == memory:
                self._overwritten[key] = tensor

    def _check_overwritten(self, arguments: Iterable[Any]) -> None:
        if not self._overwritten:
            return
        for tensor in tensors_in(arguments):
            if id(tensor) in self._overwritten and (node := self.node(tensor)) is not None:
                raise RuntimeError(
                    f"a tensor computed from parameter {', '.join(map(repr, sorted(node.names)))} "
                    "is read after another view of its memory was written in place; use an "
                    "out-of-place function there"
                )

    def names(self, args: Any, kwargs: Any) -> frozenset[str]:
        """The parameters that a call reads, directly or through expressions."""
        known = map(self._nodes.get, map(id, tensors_in((*args, *kwargs.values()))))
        return frozenset[str]().union(*(one[1].names for one in known if one is not None))

    @property
    def nodes(self) -> Mapping[int, tuple[Tensor, Node]]:
        """The tensors followed so far."""
        return self._nodes


def leaves(parameters: Mapping[str, nn.Parameter]) -> dict[int, tuple[Tensor, Node]]:
    """Parameters as the nodes to start with."""
    return {id(parameter): (parameter, Leaf(name)) for name, parameter in parameters.items()}
