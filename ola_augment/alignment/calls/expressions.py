"""Tensors computed from parameters only, and their tangents along the reference gradient."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ola_augment.alignment.calls.arguments import functional


class Node:
    """A tensor that depends on the examples in no way; ``names``: the parameters it is made of."""

    names: frozenset[str]


class Leaf(Node):
    """A parameter itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names = frozenset((name,))


class Expression(Node):
    """``function(*args, **kwargs)``, or one of its several outputs, over nodes and constants.

    Args:
        function: the torch function that computed the tensor, or wrote it in place.
        args: its arguments, nodes in place of parameter-only tensors; constants copied, since
            buffers are written into by later forward passes.
        kwargs: the same.
        output: index into the flattened outputs of ``function``.
        draws: the random state before the call, where it drew from it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        output: int = 0,
        draws: RandomState | None = None,
    ) -> None:
        self._function = functional(function)
        self._output = output
        self._draws = draws
        constant = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        self._leaves, self._spec = tree_flatten(constant)
        self.inputs = [leaf for leaf in self._leaves if isinstance(leaf, Node)]
        self.names = frozenset(name for node in self.inputs for name in node.names)

    def value(self, *inputs: Tensor) -> Tensor:
        """Evaluate it again, for values of `inputs`."""
        rest = iter(inputs)
        leaves = [next(rest) if isinstance(leaf, Node) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return again(self._function, args, kwargs, self._output, self._draws)


class RandomState:
    """The state of a device's default generator at this moment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = self._now()

    def _now(self) -> Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def moved(self) -> bool:
        """Whether something was drawn since."""
        return not torch.equal(self._state, self._now())

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same again."""
        cuda = self._device.type == "cuda"
        with torch.random.fork_rng(devices=[self._device] if cuda else []):
            if cuda:
                torch.cuda.set_rng_state(self._state, self._device)
            else:
                torch.set_rng_state(self._state)
            yield


def again(
    function: Callable[..., Any], args: Any, kwargs: Any, output: int, draws: RandomState | None
) -> Tensor:
    """One of the flattened outputs of a call that ran before, with the random numbers of then."""
    with draws.replayed() if draws else contextlib.nullcontext():
        found: Tensor = tree_leaves(function(*args, **kwargs))[output]
    return found


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """Directional derivative of ``function`` at ``primals`` along ``tangents``.

    The derivative of u -> J^T u, which is linear, by a second reverse pass: unlike forward mode it
    covers every function that has a double backward (weight normalisation among them). The result
    has a graph where a tangent requires one.
    """
    linear = any(tangent.requires_grad for tangent in tangents)
    with torch.enable_grad():
        inputs = [primal.detach().requires_grad_() for primal in primals]
        output = function(*inputs)
        if not output.requires_grad:
            return torch.zeros_like(output)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, inputs, cotangent, create_graph=True, materialize_grads=True
        )
        moved = [t.to(p.dtype) for t, p in zip(tangents, inputs, strict=True)]
        # Rounding and signs have a derivative of zero, which depends on nothing.
        depends = [(p, t) for p, t in zip(pulled, moved, strict=True) if p.requires_grad]
        if not depends:
            return torch.zeros_like(output).detach() + 0 * sum(tangent.sum() for tangent in moved)
        result = torch.autograd.grad(
            [p for p, _ in depends], cotangent, [t for _, t in depends],
            allow_unused=True, create_graph=linear,
        )[0]  # fmt: skip
    if result is None:
        return torch.zeros_like(output)
    return result if linear else result.detach()


def pull_back(node: Node, gradients: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a node, (B, *shape), as gradients of the parameters it is made of.

    Args:
        node: at the values ``parameters``.
        gradients: one for each example.
        parameters: name -> value at the capture.

    Returns:
        Name -> (B, *shape of the parameter).
    """
    if isinstance(node, Leaf):
        return {node.name: gradients}
    with torch.enable_grad():
        moved = {name: parameters[name].detach().requires_grad_() for name in sorted(node.names)}
        output = Values(moved)(node)
    inputs = list(moved.values())
    gradients = gradients.to(output.dtype)
    try:  # all examples in one pass
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            together = torch.autograd.grad(
                output,
                inputs,
                gradients,
                retain_graph=True,
                materialize_grads=True,
                is_grads_batched=True,
            )
        return dict(zip(moved, together, strict=True))
    except RuntimeError:  # what the expression is made of cannot be batched
        by_example = [
            torch.autograd.grad(output, inputs, own, retain_graph=True, materialize_grads=True)
            for own in gradients
        ]
    return dict(zip(moved, map(torch.stack, zip(*by_example, strict=True)), strict=True))


class Values:
    """Values of nodes at given parameters, each found once."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._known: dict[Node, Tensor] = {}

    def __call__(self, node: Node) -> Tensor:
        """The value of a node."""
        if isinstance(node, Leaf):
            return self._parameters[node.name]
        if node not in self._known:
            assert isinstance(node, Expression)
            self._known[node] = node.value(*map(self, node.inputs))
        return self._known[node]


class Tangents:
    """Tangents of nodes along a direction given by parameter name, each found once.

    Args:
        direction: name -> tensor; parameters that are not in it do not move.
        parameters: name -> value at the capture, for those under an `Expression`.
    """

    def __init__(self, direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        self._direction = direction
        self._value = Values(parameters)
        self._tangents: dict[Node, Tensor | None] = {}

    def __call__(self, node: Node) -> Tensor | None:
        """The tangent of a node, None where it is zero."""
        if isinstance(node, Leaf):
            return self._direction.get(node.name)
        if node not in self._tangents:
            assert isinstance(node, Expression)
            self._tangents[node] = self._of_expression(node)
        return self._tangents[node]

    def _of_expression(self, node: Expression) -> Tensor | None:
        tangents = [self(one) for one in node.inputs]
        values = [self._value(one) for one in node.inputs]
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        if not moving:
            return None

        def value(*moved: Tensor) -> Tensor:
            return node.value(
                *(dict(enumerate(values)) | dict(zip(moving, moved, strict=True))).values()
            )

        return jvp(value, [values[i] for i in moving], [t for t in tangents if t is not None])
