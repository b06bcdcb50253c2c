"""Models and losses that mix examples out of sight: exact, or refused by name, in every capture.

Each runs in several captures, trained in between, against one float64 `autograd.grad` per term.
"""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import random_direction, relative_error
from test_alignment_hidden import batch, seed_all
from torch import Tensor, nn

from ola_augment.alignment import GradientAlignment

WIDTH = 8
CAPTURES = 16


class Model(nn.Module):
    """A layer, what a case does in the middle, a layer; and a loss for each example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)
        self.double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.middle(torch.tanh(self.a(x))))

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.c(h))

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y, reduction="none")


def true_alignments(model: Model, x: Tensor, y: Tensor, g: dict[str, Tensor]) -> Tensor:
    parameters = dict(model.named_parameters())
    rows = []
    for loss in model.losses(x, y):
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        rows.append(sum((d * g[n]).sum() for n, d in zip(parameters, found, strict=True)))
    return torch.stack(rows)


def outcomes(kind: type[Model], size: int, captures: int = CAPTURES) -> list[str]:
    """How each capture ended: "exact", "wrong" or the refusal."""
    model = kind()
    engine = GradientAlignment(model, storage="exact")
    ends = []
    for seed in range(captures):
        x, y = batch(size, seed)
        g = random_direction(model, seed)
        seed_all(seed)
        expected = true_alignments(copy.deepcopy(model), x, y, g)
        seed_all(seed)
        model.zero_grad()
        try:
            with engine.capture() as captured:
                model.losses(x, y).sum().backward()
            wrong = relative_error(captured.align(g), expected)
            ends.append("exact" if wrong < 1e-9 else f"wrong by {wrong}")
        except RuntimeError as refusal:
            ends.append(str(refusal))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.05 * p.grad
    return ends


# Branches that are no control flow: a factor or a mask opens.


class Gate(Model):
    def gate(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def middle(self, h: Tensor) -> Tensor:
        return h + self.gate(h) * 0.3 * h.roll(1, 0)


class DrawnGate(Gate):
    def gate(self, h: Tensor) -> Tensor:
        return (torch.rand(()) < 0.25).to(h)


class DrawnForRows(Gate):
    def gate(self, h: Tensor) -> Tensor:
        return (torch.rand(len(h), 1) < 0.08).to(h)


class OpensByData(Gate):
    def gate(self, h: Tensor) -> Tensor:
        return (h[0, 0] > 0.3).to(h)


class OpensByBuffer(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def gate(self, h: Tensor) -> Tensor:
        self.steps += 1
        return (self.steps - 7).clamp(0, 1)


class OpensInNumpy(Gate):
    def gate(self, h: Tensor) -> Tensor:
        return torch.tensor(float(np.random.rand() < 0.25))  # noqa: NPY002


class ChosenByWhere(Model):
    def middle(self, h: Tensor) -> Tensor:
        return torch.where(torch.rand(()) < 0.25, h.flip(0), h)


class WrittenByMask(Model):
    def middle(self, h: Tensor) -> Tensor:
        h = h.clone()
        chosen = torch.rand(len(h)) < 0.08
        h[chosen] = h.roll(1, 0)[chosen]
        return h


class PermutationMatrix(Model):
    def middle(self, h: Tensor) -> Tensor:
        rows = np.eye(len(h))
        if np.random.rand() < 0.25:  # noqa: NPY002
            rows = np.roll(rows, 1, 0)
        return torch.from_numpy(rows) @ h


class SlightlyMixed(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h + 1e-7 * h.mean(0)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize(
    "kind",
    [
        DrawnGate, DrawnForRows, OpensByData, OpensByBuffer, OpensInNumpy, ChosenByWhere,
        WrittenByMask, PermutationMatrix, SlightlyMixed,
    ],
)  # fmt: skip
def test_what_opens_later_is_seen(kind: type[Model], size: int) -> None:
    ends = outcomes(kind, size)
    assert not [end for end in ends if end.startswith("wrong")]
    assert any("could not be told apart" in end for end in ends)


# Losses that are no sum of the examples' own terms, and heads that read other examples' rows.


class Contrastive(Model):
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(self(x), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


class Balanced(Model):
    """The aux loss of a mixture of experts, computed inside forward."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.aux = out.softmax(1).mean(0).square().sum()
        return out

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        found = super().losses(x, y) + self.aux / len(x)
        del self.aux
        return found


class SpreadOut(Model):
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        out = self(x)
        spread = F.relu(2 - out.var(0)).mean()
        return F.cross_entropy(out, y, reduction="none") + spread / len(x)


class RootOfMean(Model):
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        found = super().losses(x, y)
        return found / found.sum().sqrt()


class Head(Model):
    """A head that is called outside of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return torch.cat([self.b(self.middle(h)), h], 1)

    def rows(self, h: Tensor) -> Tensor:
        return h

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        out = self(x)
        head = self.head(self.rows(out[:, 3:]))
        return F.cross_entropy(out[:, :3], y, reduction="none") + F.cross_entropy(
            head, y, reduction="none"
        )


class PairsInHead(Head):
    def rows(self, h: Tensor) -> Tensor:
        return h + h.roll(1, 0)


class ShuffledHead(Head):
    def rows(self, h: Tensor) -> Tensor:
        return h[torch.arange(len(h)).roll(1)]


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Contrastive, "the loss mixes the examples"),
        (Balanced, "the loss mixes the examples"),
        (SpreadOut, "the loss mixes the examples"),
        (RootOfMean, "the loss mixes the examples"),
        (PairsInHead, "linear, called outside of the model's forward pass"),
        (ShuffledHead, "linear, called outside of the model's forward pass"),
    ],
)
def test_losses_and_heads_that_mix_are_refused(kind: type[Model], message: str, size: int) -> None:
    assert all(re.search(message, end) for end in outcomes(kind, size, 3))


def test_a_loss_that_mixes_later_is_refused() -> None:
    class Later(Contrastive):
        def losses(self, x: Tensor, y: Tensor) -> Tensor:
            own = Model.losses(self, x, y)
            return own if self.calls < 5 else own + super().losses(x, y)

    ends = outcomes(Later, 4, 8)
    assert ends[:4] == ["exact"] * 4
    assert all("the loss mixes the examples" in end for end in ends[4:])


class OwnHead(Head):
    def rows(self, h: Tensor) -> Tensor:
        return 2 * h.sin()


class Focal(Model):
    """Weights from the whole batch, without a gradient."""

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        found = super().losses(x, y)
        return found * found.detach() / found.detach().sum()


class Hardest(Model):
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        found = super().losses(x, y)
        kept = torch.zeros_like(found)
        kept[found.topk(max(1, len(found) // 2)).indices] = 1
        return found * kept


class MixedTargets(Model):
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        other = torch.randperm(len(x))
        out = self(0.7 * x + 0.3 * x[other])
        own, others = (F.cross_entropy(out, t, reduction="none") for t in (y, y[other]))
        return 0.7 * own + 0.3 * others


class KeptOutputs(Model):
    """``retain_grad`` on what the loss reads."""

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        self.out = self(x)
        self.out.retain_grad()
        found = F.cross_entropy(self.out, y, reduction="none")
        self.__dict__["kept"] = self.__dict__.pop("out")
        return found

    def __deepcopy__(self, memo: object) -> KeptOutputs:
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin


class RoundedWeights(Model):
    """All weights of a layer round to zero, and so does all that it lets through."""

    def middle(self, h: Tensor) -> Tensor:
        w = self.c.weight
        return F.linear(h, w + ((w * 0.1).round() - w).detach())


class StartsAtZero(Model):
    """What follows a layer that starts at zero sees the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)

    def middle(self, h: Tensor) -> Tensor:
        return self.c(h)


class CarriesAcross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient + 0.1 * gradient.mean(0)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Signs(Model):
    def middle(self, h: Tensor) -> Tensor:
        return self.c(StraightThrough.apply(h))


class Reversed(Model):
    def middle(self, h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: -0.5 * gradient)
        return self.c(h)


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize(
    "kind",
    [
        OwnHead, Focal, Hardest, MixedTargets, KeptOutputs, RoundedWeights, StartsAtZero, Signs,
        Reversed,
    ],
)  # fmt: skip
def test_what_keeps_examples_apart_is_exact(kind: type[Model], size: int) -> None:
    assert outcomes(kind, size, 5) == ["exact"] * 5


def test_the_check_of_the_loss_leaves_kept_gradients_alone() -> None:
    model = KeptOutputs()
    x, y = batch(4)
    with GradientAlignment(model).capture():
        model.losses(x, y).sum().backward()
    found = model.kept.grad
    plain = model(x)
    F.cross_entropy(plain, y, reduction="sum").backward(
        inputs=[plain.retain_grad() or model.a.bias]
    )
    assert torch.allclose(found, plain.grad)


# Gradients that other examples change.


class CentredGradient(Model):
    def middle(self, h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient - gradient.mean(0))
        return self.c(h)


class UnitGradient(Model):
    def middle(self, h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient / gradient.norm())
        return self.c(h)


class ModuleHook(Model):
    def __init__(self) -> None:
        super().__init__()
        self.c.register_full_backward_hook(lambda m, given, _: (given[0] - given[0].mean(0),))


class MixingBackward(Model):
    def middle(self, h: Tensor) -> Tensor:
        return self.c(CarriesAcross.apply(h))


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", [CentredGradient, UnitGradient, ModuleHook, MixingBackward])
def test_backward_passes_that_mix_are_refused(kind: type[Model], size: int) -> None:
    ends = outcomes(kind, size, 3)
    assert all("gradient hook or a custom autograd.Function mixes" in end for end in ends)


def test_hooks_are_not_run_for_good_by_the_check() -> None:
    class Counted(Model):
        seen = 0

        def __init__(self) -> None:
            super().__init__()
            self.c.register_full_backward_hook(self.see)

        def see(self, *_: object) -> None:
            self.seen += 1

    model, (x, y) = Counted(), batch(4)
    with GradientAlignment(model).capture():
        model.losses(x, y).sum().backward()
    assert model.seen == 1
