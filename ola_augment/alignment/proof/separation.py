"""Whether the backward pass keeps the examples apart: losses, heads outside forward, hooks.

What lies between the last uses of parameters and a loss is no part of the model's forward pass,
which alone can be repeated. Its derivatives tell: a loss is a sum of the examples' own terms where
no gradient at one example's rows depends on another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from ola_augment.alignment._torch import unnoticed_by_ddp
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.proof.snapshot import Undisturbed

#: Of the largest derivative: what others' rows may have by rounding.
_PRECISION = 1e-5
# An output in the graph: its node and its number.
GraphNode = tuple[Node, int]
# Which examples to look at, (batch,) bool, for each size of a batch.
Chosen = Mapping[int, Tensor]


class Located:
    """An output of a call that reads parameters, and where its examples lie.

    Attributes:
        edge: where it stands in the graph, once it is placed.
        layout: of its examples; None as long as it is not known.
        tape: the forward pass whose examples they are.
        outside: the call was made outside of the forward pass: the layout is assumed.
    """

    def __init__(self, output: Tensor, name: str, tape: Any) -> None:
        self.name, self.tape = name, tape
        self.shape, self.dtype, self.device = output.shape, output.dtype, output.device
        self.edge: GradientEdge
        self.layout: Layout | None = None
        self.outside = False

    def place(self, output: Tensor) -> GraphNode:
        """Note where the output stands in the graph; the key by which it is found there."""
        assert output.grad_fn is not None
        self.edge = GradientEdge(output.grad_fn, output.output_nr)
        return self.edge.node, self.edge.output_nr

    def mask(self, chosen: Chosen) -> Tensor:
        """Whether a row is a chosen example's, to broadcast."""
        layout = self.layout
        assert layout is not None
        return self.rows(
            chosen.get(layout.batch, torch.ones(layout.batch, dtype=torch.bool, device="cpu"))
        )

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

    def check(
        self, sets: Sequence[Chosen], model: nn.Module, hooks: bool, once: bool = False
    ) -> None:
        """Refuse what mixes examples, but for BatchNorm's statistics.

        Args:
            sets: which examples to look at in turn.
            model: left as it is.
            hooks: there are hooks on tensors, which may change gradients.
            once: a part of the graph permits a single backward.

        Raises:
            RuntimeError: a loss, a head outside of forward, or a hook mixes them.
        """
        self._graph = set(_nodes([self._loss.grad_fn]))
        with unnoticed_by_ddp(self._graph):
            self._check(sets, model, hooks, once)

    def _check(self, sets: Sequence[Chosen], model: nn.Module, hooks: bool, once: bool) -> None:
        self._statistics = _has_statistics([node.name() for node in self._graph])
        if self._statistics:  # not through them, from features that the loss reads too
            inner = set(_nodes(n for one in self._last for n, _ in one.edge.node.next_functions))
            self._last = [one for one in self._last if one.edge.node not in inner]
        if not self._last or _has_statistics(self.ending):
            return
        first = torch.autograd.grad(
            self._loss,
            [one.edge for one in self._last],
            self._gradient,
            create_graph=True,
            allow_unused=True,
        )
        for chosen in sets:
            self._check_heads(chosen)
            self._check_loss(first, chosen)
        if sets and (hooks or any(isinstance(n, BackwardCFunction) for n in self._graph)):
            if once:
                raise RuntimeError(
                    "gradient hooks or custom autograd.Functions beside selective checkpointing "
                    "cannot be verified, for it permits a single backward: use checkpoint() "
                    "without context_fn, or leave the hooks out"
                )
            with Undisturbed(model):
                self._check_hooks(first, sets[0])

    def _check_loss(self, first: Sequence[Tensor | None], chosen: Chosen) -> None:
        """No second derivative joins the chosen examples with others."""
        total: Any = 0.0
        for gradient, one in zip(first, self._last, strict=True):
            if gradient is not None and gradient.requires_grad:
                product = gradient * one.noise() * one.mask(chosen)
                total = total + (product.real if product.is_complex() else product).sum()
        if not isinstance(total, Tensor):  # the loss is linear
            return
        edges = [one.edge for one in self._last]
        try:
            second = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
        except RuntimeError:  # it cannot be differentiated twice
            return
        if _leaks(second, self._last, chosen):
            raise RuntimeError(
                "the loss mixes the examples of the batch: its gradient at one example's values "
                "depends on others' (a contrastive or pairwise loss, statistics of the batch, a "
                "function of the mean). Only sums and means of the examples' own terms can be "
                "aligned; run the rest of the loss outside capture()"
            )

    def _check_heads(self, chosen: Chosen) -> None:
        """What a call outside of forward gives for an example comes from that example."""
        for one in self._located.values():
            below, names = self._below(one.edge.node)
            if not one.outside or not below or _has_statistics(names):
                continue
            found = torch.autograd.grad(
                [one.edge],
                [other.edge for other in below],
                [one.noise() * one.mask(chosen)],
                retain_graph=True,
                allow_unused=True,
            )
            if _leaks(found, below, chosen):
                raise RuntimeError(
                    f"{one.name}, called outside of the model's forward pass, reads examples in "
                    "another order than the model gave them, or several at once: its rows cannot "
                    "be told apart; call it inside forward, on each example's own values"
                )

    def _check_hooks(self, first: Sequence[Tensor | None], chosen: Chosen) -> None:
        """The gradients of the chosen examples are what they would be alone."""
        if self._statistics:
            return
        above = [(one, g) for one, g in zip(self._last, first, strict=True) if g is not None]
        inner = [one for one in self._located.values() if one not in self._last]
        if not above or not inner:
            return

        def pulled(alone: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                [one.edge for one, _ in above],
                [one.edge for one in inner],
                [g.detach() * (one.mask(chosen) if alone else 1) for one, g in above],
                retain_graph=True,
                allow_unused=True,
            )

        alone, together = pulled(True), pulled(False)
        for one, own, all_ in zip(inner, alone, together, strict=True):
            if own is None or all_ is None:
                continue
            difference = (own - all_ * one.mask(chosen)).abs().max()
            if bool(difference > _PRECISION * all_.abs().max()):
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


def _leaks(found: Sequence[Tensor | None], of: Sequence[Located], chosen: Chosen) -> bool:
    """Whether rows other than those of the chosen examples have a derivative."""
    own, others = [], []
    for gradient, one in zip(found, of, strict=True):
        if gradient is not None:
            mask = one.mask(chosen)
            own.append(float((gradient * mask).abs().max()))
            others.append(float((gradient * ~mask).abs().max()))
    return bool(own) and max(others) > _PRECISION * max(*own, *others)


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
