"""What a mean loss divided by: the factor between a term of it and an example's own loss.

A mean over D counted positions (examples, or tokens of them) gives each of them 1 / D. The own loss
of an example with n of them is their mean, so that its terms are multiplied by D / n.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ola_augment.alignment.calls.arguments import Function, spelled
from ola_augment.alignment.method.tape import Tape
from ola_augment.alignment.proof import Located


class Mean(NamedTuple):
    """A call that took a mean.

    Attributes:
        edge: of what it took the mean of, in the graph.
        like: its shape.
        denominator: what it divided by, in units of positions.
        counted: which positions count, of the shape without the classes; None: all.
        classes: the dimension of the classes, None where there is none.
    """

    edge: GradientEdge
    like: Tensor
    denominator: Any
    counted: Tensor | None
    classes: int | None


class Means:
    """The means of a capture's losses."""

    def __init__(self) -> None:
        self._found: dict[Node, Mean | None] = {}
        self._factors: dict[int, Tensor] = {}

    def note(self, function: Function, args: Any, kwargs: Any, result: Any) -> None:
        """A call that reads no parameter: a mean, or a sum in its place?"""
        if function in LOSSES:
            reduction = _reduction(kwargs)
        elif spelled(function) == "mean":
            reduction = "mean"
        else:
            return
        if not isinstance(result, Tensor) or result.dim() or result.grad_fn is None:
            return
        if reduction not in ("mean", "batchmean"):
            self._found[result.grad_fn] = None
        elif isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            edge = GradientEdge(args[0].grad_fn, args[0].output_nr)
            like = args[0].detach()
            if function in _OF_CLASSES:
                self._found[result.grad_fn] = Mean(edge, like, *_classes(args[0], args[1], kwargs))
            else:
                self._found[result.grad_fn] = Mean(edge, like, like.numel(), None, None)

    def settle(self, loss: Tensor, tapes: Sequence[Tape], located: Mapping[Any, Located]) -> None:
        """A loss is about to be differentiated: learn the factors of the examples in it.

        Raises:
            RuntimeError: no mean was seen in it, a sum, or means that divide by other numbers.
        """
        shared: set[Node] = set()
        while True:
            means, uses, beside = _below(loss.grad_fn, self._found, located, shared)
            if None in means.values():
                raise RuntimeError(_SUM)
            if not means:
                raise RuntimeError(_NO_MEAN)
            found = {node: _factors(mean, tapes, uses) for node, mean in means.items() if mean}
            new = {node for node, factors in found.items() if factors is None}
            if not new:
                break
            shared |= new
        settled = [one for each in found.values() for one in each or ()]
        for number, factors in settled:
            known = self._factors.get(number, torch.zeros_like(factors))
            both = (known > 0) & (factors > 0)
            if not torch.allclose(known[both], factors[both], rtol=1e-4):
                raise RuntimeError(_DIFFERENT)
            self._factors[number] = torch.maximum(known, factors)
        if beside and settled:
            alike = torch.cat([self._factors[number] for number, _ in settled])
            if not torch.allclose(alike, alike[0], rtol=1e-4):
                raise RuntimeError(_DIFFERENT)

    def of(self, number: int) -> Tensor:
        """The factors of a pass's examples, (batch,); 1 where an example is in no mean.

        Raises:
            RuntimeError: no loss was seen.
        """
        factors = self._factors.get(number)
        if factors is None:
            raise RuntimeError(_NO_MEAN)
        return torch.where(factors > 0, factors, 1.0)

    def clear(self) -> None:
        """Let go of the graph."""
        self._found.clear()


def _reduction(kwargs: Any) -> str:
    """A loss's reduction, which its old arguments say too."""
    average, reduce = kwargs.get("size_average"), kwargs.get("reduce")
    if average is None and reduce is None:
        return str(kwargs.get("reduction", "mean"))
    return "none" if reduce is False else "sum" if average is False else "mean"


def _classes(input: Tensor, target: Tensor, kwargs: Any) -> tuple[Any, Tensor | None, int]:
    """Denominator, counted positions and classes of a mean over positions of one class each."""
    classes = 0 if input.dim() == 1 else 1
    if target.is_floating_point():
        return input.numel() / input.shape[classes], None, classes
    counted = target != kwargs.get("ignore_index", -100)
    weight = kwargs.get("weight")
    if weight is None:
        return counted.sum(), counted, classes
    return (weight.detach()[torch.where(counted, target, 0)] * counted).sum(), counted, classes


def _factors(
    mean: Mean, tapes: Sequence[Tape], uses: Sequence[Located]
) -> list[tuple[int, Tensor]] | None:
    """The factors of the examples in a mean, by the number of their pass.

    None for a mean of what all examples share, be it of means: its denominator is none of theirs.

    Raises:
        RuntimeError: some of it is an example's own, and some is not.
    """
    reached = [n for n, tape in enumerate(tapes) if any(use.tape is tape for use in uses)]
    sizes = [tapes[number].batch for number in reached]
    counted, like = mean.counted, mean.like
    rows = len(reached) == 1 and like.shape[:1] == (sizes[0],)
    if counted is None and rows and _by_row(mean.edge, uses):
        return [(reached[0], like.new_full((sizes[0],), sizes[0], dtype=torch.float64))]
    owners = _owners(mean, [tapes[number] for number in reached], uses)
    several = owners == _SEVERAL
    if several.any():
        if (several | (owners == _NOBODY)).all():
            return None
        raise RuntimeError(_NO_MEAN)
    if mean.classes is not None:
        owners = owners.amax(mean.classes)
    if counted is not None:
        owners = torch.where(counted.to(owners.device), owners, _NOBODY)
    n = torch.bincount(owners[owners >= 0].flatten(), minlength=sum(sizes)).double()
    whole = mean.denominator if counted is not None else owners.numel()
    factors = torch.where(n > 0, whole / n.clamp(min=1), 0.0)
    return list(zip(reached, torch.split(factors, sizes), strict=True))


def _owners(mean: Mean, tapes: Sequence[Tape], uses: Sequence[Located]) -> Tensor:
    """For each entry, the example that it depends on, numbered through the passes.

    Or `_NOBODY`, or `_SEVERAL`.
    """
    probe = torch.zeros_like(mean.like).requires_grad_()
    ends = torch.tensor([0, *(tape.batch for tape in tapes)], device="cpu").cumsum(0).tolist()
    first = {id(tape): end for tape, end in zip(tapes, ends, strict=False)}
    try:
        pulled = torch.autograd.grad(
            [mean.edge], [use.edge for use in uses], [probe], create_graph=True, allow_unused=True
        )
        used = [(use, p) for use, p in zip(uses, pulled, strict=True) if p is not None]

        def reached(code: Tensor) -> Tensor:
            """Which entries depend on the examples of a code, (examples,) bool."""
            along = probe.sum() * 0
            for use, p in used:
                own = code[first[id(use.tape)] :][: use.tape.batch]
                along = along + (p * use.noise().abs() * use.rows(own)).sum()
            return torch.autograd.grad(along, probe, retain_graph=True)[0] != 0

        numbers = torch.arange(ends[-1], device="cpu")
        owners = reached(numbers >= 0).long() + _NOBODY
        several = torch.zeros_like(owners, dtype=torch.bool)
        for bit in range(max(ends[-1] - 1, 0).bit_length()):
            ones = (numbers >> bit & 1).bool()
            of_ones = reached(ones)
            owners += of_ones.long() << bit
            several |= of_ones & reached(~ones)
    except RuntimeError as error:
        raise RuntimeError(f"{_NO_MEAN} ({error})") from error
    return torch.where(several, _SEVERAL, owners)


def _by_row(edge: GradientEdge, uses: Sequence[Located]) -> bool:
    """Whether what a mean was taken of is plainly computed row by row from uses of parameters."""
    ends = {(use.edge.node, use.edge.output_nr) for use in uses}
    node: Node | None
    node, number = edge.node, edge.output_nr
    while node is not None and (node, number) not in ends:
        if node.name() not in _ROW_BY_ROW:
            return False
        node, number = node.next_functions[0]
    return node is not None


def _below(
    root: Node | None,
    means: Mapping[Node, Mean | None],
    located: Mapping[Any, Located],
    shared: Collection[Node],
) -> tuple[dict[Node, Mean | None], list[Located], bool]:
    """The means nearest to a loss, and the last uses of parameters below them.

    And whether there are uses beside the means. Means of what all examples share are passed by.
    """
    found: dict[Node, Mean | None] = {}
    beside = False
    uses: list[Located] = []
    pending: list[tuple[Node, int, bool]] = [] if root is None else [(root, 0, True)]
    seen = set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        node, number, above = one
        use = located.get((node, number))
        if use is not None:
            uses += [] if above else [use]
            beside = beside or above
            continue
        if above and node in means and node not in shared:
            found[node] = means[node]
            above = False
        pending += [(n, i, above) for n, i in node.next_functions if n is not None]
    return found, uses, beside


#: Instead of the number of an example.
_NOBODY, _SEVERAL = -1, -2
#: Calls whose first argument is what is differentiated, and whose rows are its rows.
_ROW_BY_ROW = {
    "NllLossBackward0", "LogSoftmaxBackward0", "MseLossBackward0", "L1LossBackward0",
    "SmoothL1LossBackward0", "HuberLossBackward0", "BinaryCrossEntropyWithLogitsBackward0",
    "BinaryCrossEntropyBackward0", "ToCopyBackward0",
}  # fmt: skip
_OF_CLASSES = {F.cross_entropy, F.nll_loss}
LOSSES = {
    getattr(F, name)
    for name in (
        "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
        "multilabel_margin_loss", "multilabel_soft_margin_loss", "soft_margin_loss",
        "multi_margin_loss", "hinge_embedding_loss", "poisson_nll_loss", "gaussian_nll_loss",
        "cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss", "ctc_loss",
    )
}  # fmt: skip

_SUM = 'reduction="mean" was declared, but the loss inside capture() has reduction="sum"'
_NO_MEAN = (
    'reduction="mean" was declared, but no mean over the examples was seen in the loss inside '
    "capture(), so that what it divided by is not known: use a loss of torch.nn.functional or "
    '.mean(), and loss.backward(); or declare reduction="sum" and multiply the alignments yourself'
)
_DIFFERENT = (
    'reduction="mean" was declared, but the loss inside capture() is made of means that divide by '
    'different numbers of rows, or of such a mean and a sum: declare reduction="sum"'
)
