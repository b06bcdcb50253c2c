"""Whether the backward pass keeps the examples apart: losses, heads outside forward, hooks.

What lies between the last uses of parameters and a loss is no part of the model's forward pass,
which alone can be repeated. Its derivatives tell: a loss is a sum of the examples' own terms where
no gradient at one example's rows depends on another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from ola_augment.alignment._fsdp import is_custom, is_sharded, unnoticed
from ola_augment.alignment._torch import unnoticed_by_ddp
from ola_augment.alignment.calls.layout import Assumed, Layout
from ola_augment.alignment.proof.snapshot import Undisturbed

#: Of the largest derivative: what others' rows may have by rounding.
_PRECISION = 1e-5
_IN_SHARDS = (
    "{} cannot be verified while processes share the model's parameters (fully_shard): leave them "
    "out, or use DistributedDataParallel"
)
# An output in the graph: its node and its number.
GraphNode = tuple[Node, int]
# A power of two, or zero, for each example, (batch,), for each size of a batch.
Weights = Mapping[int, Tensor]


class Hooks:
    """Hooks on gradients that are set in a capture, left out where the gradients are none.

    Attributes:
        any: there are some.
        resting: leave them out for now.
    """

    def __init__(self) -> None:
        self.any = self.resting = False

    def resting_at_times(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """The same hook, which rests when the others do."""
        return lambda gradient: None if self.resting else hook(gradient)


class Located:
    """An output of a call that reads parameters, and where its examples lie.

    Attributes:
        edge: where it stands in the graph, once it is placed.
        layout: of its examples; None as long as it is not known.
        tape: the forward pass whose examples they are.
    """

    def __init__(self, output: Tensor, name: str, tape: Any) -> None:
        self.name, self.tape = name, tape
        self.shape, self.dtype, self.device = output.shape, output.dtype, output.device
        self.edge: GradientEdge
        self.layout: Layout | None = None

    def place(self, output: Tensor) -> GraphNode:
        """Note where the output stands in the graph; the key by which it is found there."""
        assert output.grad_fn is not None
        self.edge = GradientEdge(output.grad_fn, output.output_nr)
        return self.edge.node, self.edge.output_nr

    def weights(self, of: Weights) -> Tensor:
        """Its examples' over their rows, to broadcast."""
        layout = self.layout
        assert layout is not None
        known = of.get(layout.batch)
        return self.rows(torch.ones(layout.batch, device="cpu") if known is None else known)

    def rows(self, own: Tensor) -> Tensor:
        """Spread what is said of each example, (batch,), over its rows, to broadcast."""
        layout = self.layout
        assert layout is not None
        rows = own.repeat_interleave(layout.inner).repeat(layout.outer).to(self.device)
        return rows.view(-1, *(1,) * (len(self.shape) - layout.dim - 1))

    def noise(self) -> Tensor:
        """Random numbers of its shape, the same ones every time."""
        generator = torch.Generator().manual_seed(self.shape.numel())
        return torch.randn(self.shape, generator=generator, device="cpu").to(
            self.device, self.dtype
        )


class Separation:
    """The graph of a loss, looked at before its backward.

    Args:
        loss: of any shape.
        gradient: of the loss, None for a scalar.
        located: outputs of calls that read parameters, by node and output number.
    """

    def __init__(
        self,
        loss: Tensor,
        gradient: Tensor | None,
        located: Mapping[GraphNode, Located],
    ) -> None:
        self._loss = loss
        self._gradient = gradient
        self._located = located
        #: Names of the nodes between the loss and the last uses of parameters.
        self.ending: tuple[str, ...]
        self._last, self.ending = self._below(loss.grad_fn)
        self._graph: set[Node] = set()
        self._statistics = False

    def check(self, weights: Weights, model: nn.Module, hooks: Hooks, once: bool = False) -> None:
        """Refuse what mixes examples, but for BatchNorm's statistics.

        Args:
            weights: of the examples, by which to tell them apart; none of batches of one.
            model: left as it is.
            hooks: on tensors, which may change gradients.
            once: a part of the graph permits a single backward.

        Raises:
            RuntimeError: a loss, a head outside of forward, or a hook mixes them.
        """
        self._graph = set(_nodes([self._loss.grad_fn]))
        with unnoticed_by_ddp(self._graph), unnoticed():
            self._check(weights, model, hooks, once)

    def _check(self, weights: Weights, model: nn.Module, hooks: Hooks, once: bool) -> None:
        self._statistics = _has_statistics([node.name() for node in self._graph])
        if self._statistics:  # not through them, from features that the loss reads too
            inner = set(_nodes(n for one in self._last for n, _ in one.edge.node.next_functions))
            self._last = [one for one in self._last if one.edge.node not in inner]
        if not self._last or not weights or _has_statistics(self.ending):
            return
        first = torch.autograd.grad(
            self._loss,
            [one.edge for one in self._last],
            self._gradient,
            create_graph=True,
            allow_unused=True,
        )
        own = hooks.any or any(map(is_custom, self._graph))
        half = any(one.dtype == torch.float16 for one in self._located.values())
        if own or half:  # what is not linear, or overflows, is left to rows of zeros
            weights = {size: (w > w.median()).to(w) for size, w in weights.items()}
        sharded = is_sharded(model)
        if own and sharded:
            raise RuntimeError(_IN_SHARDS.format("gradient hooks and custom autograd.Functions"))
        self._check_heads(weights, sharded)
        hooks.resting = True
        try:
            self._check_loss(first, weights)
        finally:
            hooks.resting = False
        if own:
            if once:
                raise RuntimeError(
                    "gradient hooks or custom autograd.Functions beside selective checkpointing "
                    "cannot be verified, for it permits a single backward: use checkpoint() "
                    "without context_fn, or leave the hooks out"
                )
            with Undisturbed(model):
                self._check_hooks(first, weights)

    def _check_loss(self, first: Sequence[Tensor | None], weights: Weights) -> None:
        """No second derivative joins an example with others."""
        moved = [
            (gradient, one)
            for gradient, one in zip(first, self._last, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not moved:  # the loss is linear
            return
        edges = [one.edge for one in self._last]

        def second(own: Weights) -> tuple[Tensor | None, ...]:
            total: Any = 0.0
            for gradient, one in moved:
                product = gradient * one.noise() * one.weights(own).to(one.dtype)
                total = total + (product.real if product.is_complex() else product).sum()
            return torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)

        try:
            mixed = _mixed(second, self._last, weights)
        except RuntimeError:  # it cannot be differentiated twice
            return
        if mixed:
            raise RuntimeError(
                "the loss mixes the examples of the batch: its gradient at one example's values "
                "depends on others' (a contrastive or pairwise loss, statistics of the batch, a "
                "function of the mean). Only sums and means of the examples' own terms can be "
                "aligned; run the rest of the loss outside capture()"
            )

    def _check_heads(self, weights: Weights, sharded: bool) -> None:
        """Where a layout is assumed, what is there for an example comes from that example."""
        for one in self._located.values():
            below, names = self._below(one.edge.node)
            if not isinstance(one.layout, Assumed) or not below or _has_statistics(names):
                continue
            if sharded:
                what = f"uses on values that are alike, or outside of forward ({one.name}),"
                raise RuntimeError(_IN_SHARDS.format(what))

            def pulled(
                own: Weights, one: Located = one, below: list[Located] = below
            ) -> tuple[Tensor | None, ...]:
                return torch.autograd.grad(
                    [one.edge],
                    [other.edge for other in below],
                    [one.noise() * one.weights(own).to(one.dtype)],
                    retain_graph=True,
                    allow_unused=True,
                )

            if _mixed(pulled, below, weights):
                raise RuntimeError(
                    f"{one.name}, called outside of the model's forward pass or on values that "
                    "are alike for all examples, reads examples in another order than the model "
                    "gave them, or several at once: its rows cannot be told apart; call it inside "
                    "forward, on each example's own values"
                )

    def _check_hooks(self, first: Sequence[Tensor | None], weights: Weights) -> None:
        """The gradients of an example are what they would be beside others."""
        if self._statistics:
            return
        above = [(one, g) for one, g in zip(self._last, first, strict=True) if g is not None]
        inner = [one for one in self._located.values() if one not in self._last]
        if not above or not inner:
            return

        def pulled(own: Weights) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                [one.edge for one, _ in above],
                [one.edge for one in inner],
                [g.detach() * one.weights(own).to(g.dtype) for one, g in above],
                retain_graph=True,
                allow_unused=True,
            )

        if _mixed(pulled, inner, weights):
            raise RuntimeError(
                "a gradient hook or a custom autograd.Function mixes the examples of the "
                "batch: the gradients of some change with others'; examples that influence "
                "each other cannot be aligned"
            )

    def _below(self, node: Node | None) -> tuple[list[Located], tuple[str, ...]]:
        """The uses of parameters that come first below a node, and the nodes on the way."""
        found: list[Located] = []
        names: list[str] = []
        pending, seen = [] if node is None else [(node, -1)], set()
        while pending:
            one = pending.pop()
            if one in seen:
                continue
            seen.add(one)
            located = self._located.get(one)
            if located is not None and one[0] is not node:
                found.append(located)
                continue
            names.append(one[0].name())
            pending += [(n, i) for n, i in one[0].next_functions if n is not None]
        return found, tuple(names)


def _mixed(
    derivative: Callable[[Weights], Sequence[Tensor | None]], of: Sequence[Located], own: Weights
) -> bool:
    """Whether a derivative's rows are not each their own example's weight times what they were."""
    plain, weighted = derivative({}), derivative(own)
    size = difference = 0.0
    for before, after, one in zip(plain, weighted, of, strict=True):
        if before is not None and after is not None and before.numel():
            size = max(size, float(before.abs().max()))
            expected = before * one.weights(own).to(before.dtype)
            difference = max(difference, float((after - expected).abs().max()))
    return difference > _PRECISION * size


def _has_statistics(names: Sequence[str]) -> bool:
    return any("BatchNorm" in name for name in names)


def _nodes(roots: Iterable[Node | None]) -> Iterator[Node]:
    """All nodes of a graph."""
    pending, seen = list(roots), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [one for one, _ in node.next_functions]
