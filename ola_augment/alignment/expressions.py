"""Tensors computed from parameters only, and their tangents along the reference gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only


class Node:
    """A tensor that depends on the examples in no way; ``names``: the parameters it is made of."""

    names: frozenset[str]

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Evaluate it for parameter values by name."""
        raise NotImplementedError


class Leaf(Node):
    """A parameter itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names = frozenset((name,))

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The parameter's value."""
        return parameters[self.name]


class Expression(Node):
    """``function(*args, **kwargs)``, or one of its several outputs, over nodes and constants.

    Args:
        function: the torch function that computed the tensor.
        args: its arguments, nodes in the place of parameter-only tensors; constants copied, since
            buffers are written into by later forward passes.
        kwargs: the same.
        output: index into the flattened outputs of ``function``.
    """

    def __init__(
        self, function: Callable[..., Any], args: Any, kwargs: Any, output: int = 0
    ) -> None:
        self.function = function
        self.output = output
        self.args, self.kwargs = tree_map_only(
            Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs)
        )
        leaves = tree_flatten((args, kwargs))[0]
        self.names = frozenset(
            name for node in leaves if isinstance(node, Node) for name in node.names
        )

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Evaluate it again."""
        args, kwargs = tree_map_only(
            Node, lambda node: node.value(parameters), (self.args, self.kwargs)
        )
        output: Tensor = tree_flatten(self.function(*args, **kwargs))[0][self.output]
        return output


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """Directional derivative of ``function`` at ``primals`` along ``tangents``.

    The derivative of u -> J^T u, which is linear, by a second reverse pass: unlike forward mode it
    covers every function that has a double backward (weight normalisation among them).
    """
    with torch.enable_grad():
        inputs = [primal.detach().requires_grad_() for primal in primals]
        output = function(*inputs)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, inputs, cotangent, create_graph=True, materialize_grads=True
        )
        result = torch.autograd.grad(
            pulled, cotangent, [t.to(p.dtype) for t, p in zip(tangents, inputs, strict=True)],
            allow_unused=True,
        )[0]  # fmt: skip
    return torch.zeros_like(output) if result is None else result.detach()


class Tangents:
    """Tangents of nodes along a direction given by parameter name.

    Args:
        direction: name -> tensor; parameters that are not in it do not move.
        parameters: name -> value at the capture, for those under an `Expression`.
    """

    def __init__(self, direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        self._direction = direction
        self._parameters = parameters
        self._known: dict[int, Tensor | None] = {}

    def __call__(self, node: Node) -> Tensor | None:
        """The tangent of a node, None where it is zero."""
        if isinstance(node, Leaf):
            return self._direction.get(node.name)
        if id(node) not in self._known:
            self._known[id(node)] = self._of_expression(node)
        return self._known[id(node)]

    def _of_expression(self, node: Node) -> Tensor | None:
        names = sorted(node.names & self._direction.keys())
        if not names:
            return None
        fixed = {name: self._parameters[name] for name in node.names}
        return jvp(
            lambda *values: node.value({**fixed, **dict(zip(names, values, strict=True))}),
            [fixed[name] for name in names],
            [self._direction[name] for name in names],
        )
