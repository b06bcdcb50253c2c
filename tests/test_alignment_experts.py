"""Mixtures of experts, and training loops that call the model or the loss more than once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import per_example, random_direction
from torch import Tensor, nn

from ola_augment import GradientAlignment, OLAAugment, OLALearner
from ola_augment.alignment import DirectionalAlignment


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Experts(nn.Module):
    """(B, T, 4) -> (B, 3): every token through the expert with the largest gate."""

    def __init__(self, route: Callable[[Experts, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.gate, self.last = (
            nn.Linear(4, 8),
            nn.Linear(8, 2, bias=False),
            nn.Linear(8, 3),
        )
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh().flatten(0, -2)
        gates = self.gate(h).softmax(-1)
        gates = gates * F.one_hot(gates.argmax(-1), 2)
        return self.last(h + self.route(self, h, gates)).unflatten(0, x.shape[:-1]).mean(1)


def by_rows(model: Experts, h: Tensor, gates: Tensor) -> Tensor:
    found = torch.zeros_like(h)
    for number, expert in enumerate(model.experts):
        (rows,) = torch.where(gates[:, number] > 0)
        found = found.index_add(0, rows, expert(h[rows]) * gates[rows, number, None])
    return found


def by_mask(model: Experts, h: Tensor, gates: Tensor) -> Tensor:
    found = torch.zeros_like(h)
    for number, expert in enumerate(model.experts):
        own = gates[:, number] > 0
        rows = expert(torch.masked_select(h, own.unsqueeze(1)).view(-1, 8))
        found = found.masked_scatter(own.unsqueeze(1), rows * gates[own, number, None])
    return found


def all_rows(model: Experts, h: Tensor, gates: Tensor) -> Tensor:
    return sum(gates[:, n, None] * expert(h) for n, expert in enumerate(model.experts))


def dropped(model: Experts, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("route", [by_rows, by_mask])
def test_rows_that_depend_on_the_data_are_refused_with_a_way_out(route) -> None:
    model = Experts(route).double()
    x, y = 5 * torch.randn(6, 5, 4).double(), torch.randint(3, (6,))
    g = random_direction(model)

    def capture() -> None:
        with GradientAlignment(model).capture():
            F.cross_entropy(model(x), y, reduction="sum").backward()

    with pytest.raises(RuntimeError, match="run every expert on all rows"):
        capture()
    expected = per_example(model, x, y, g)
    model.route = all_rows
    with GradientAlignment(model).capture() as captured:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    torch.testing.assert_close(captured.align(g), expected)
    model.route = route
    model.zero_grad()
    directional = DirectionalAlignment(model, dropped, method="jvp")
    with directional.capture(x, y) as losses:
        losses.sum().backward()
    torch.testing.assert_close(directional.align(g), expected)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")
def test_grouped_products() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.last = nn.Parameter(torch.randn(2, 8, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:  # (B, 2, 8): a group for each position
            ends = torch.tensor([len(x), 2 * len(x)], dtype=torch.int32)
            rows = x.transpose(0, 1).flatten(0, 1)
            h = F.grouped_mm(rows, self.w, offs=ends)
            return self.last(h.unflatten(0, (2, len(x))).mean(0))

    model = Grouped().bfloat16()
    x, y = torch.randn(6, 2, 8).bfloat16(), torch.randint(3, (6,))
    g = random_direction(model)
    with GradientAlignment(model, storage="exact").capture() as captured:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    found = captured.align(g)
    rows = []
    for i in range(6):
        h = torch.einsum("ti,tio->to", x[i].double(), model.w.double()).mean(0, keepdim=True)
        loss = F.cross_entropy(
            h @ model.last.weight.double().T + model.last.bias.double(), y[i : i + 1]
        )
        own = torch.autograd.grad(loss, [model.w, model.last.weight, model.last.bias])
        rows.append(
            sum((d.double() * t.double()).sum() for d, t in zip(own, g.values(), strict=True))
        )
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=0.1, atol=0.1)


def learner_of(model: nn.Module, **options: object) -> OLALearner:
    augment = OLAAugment(strength=1)
    held = [(torch.rand(6, 3, 4, 4), torch.randint(3, (6,)))]
    return OLALearner(model, augment, reference=held, learn_every=1, **options)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
    )


def plain_half(learner: OLALearner, model: nn.Module, images: Tensor, y: Tensor) -> None:
    with learner.plain_step():
        F.cross_entropy(model(images), y).backward()
    model.zero_grad()


def test_two_passes_over_one_augmented_batch_have_its_draws() -> None:
    model = small()
    learner = learner_of(model)
    images, y = torch.rand(6, 3, 4, 4), torch.randint(3, (6,))
    seen = []
    step = learner.updater.step
    learner.updater.step = lambda actions, *signal: (  # type: ignore[method-assign]
        seen.append((actions, signal)),
        step(actions, *signal),
    )[1]
    with learner.augmented_step():
        x = learner.augment(images)
        one, other = model(x).log_softmax(1), model(x).log_softmax(1)
        loss = F.nll_loss(one, y) + F.nll_loss(other, y)
        loss = loss + F.kl_div(one, other, log_target=True, reduction="batchmean")
        loss.backward()
    model.zero_grad()
    plain_half(learner, model, images, y)
    ((actions, signal),) = seen
    assert len(actions.log_prob) == len(signal[0]) == 12
    torch.testing.assert_close(actions.log_prob[:6], actions.log_prob[6:])


def test_examples_without_a_draw_are_refused_in_their_own_half() -> None:
    model = small()
    learner = learner_of(model)
    images, y = torch.rand(6, 3, 4, 4), torch.randint(3, (6,))

    def half() -> None:
        with learner.augmented_step():
            x = learner.augment(images)
            (F.cross_entropy(model(x), y) + F.cross_entropy(model(x[:4]), y[:4])).backward()

    with pytest.raises(RuntimeError, match=r"saw 10 examples .* passes of 6, 4, but 6 were augm"):
        half()


def test_augmentation_inside_a_capture_is_not_watched() -> None:
    from ola_augment.alignment.method.recorder import Recorder

    model = small()
    learner = learner_of(model)
    images, y = torch.rand(6, 3, 4, 4), torch.randint(3, (6,))
    calls = []
    other = Recorder.other
    with pytest.MonkeyPatch.context() as patch, learner.augmented_step():
        patch.setattr(Recorder, "other", lambda *a: (calls.append(1), other(*a))[1])
        x = learner.augment(images)
        assert not calls
        F.cross_entropy(model(x), y).backward()
        assert calls


class Counts(torch.autograd.Function):
    backwards = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        Counts.backwards += 1
        return gradient


@pytest.mark.parametrize("batch", [6, 16])
def test_hooks_of_the_loss_run_four_times_in_a_verified_capture(batch: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    engine, hooked = GradientAlignment(model), []
    Counts.backwards = 0
    runs = []
    for _ in range(3):
        hooked.clear()
        Counts.backwards = 0
        with engine.capture():
            out = model(torch.randn(batch, 4))
            out.register_hook(lambda gradient: hooked.append(1))
            F.cross_entropy(Counts.apply(out), torch.randint(3, (batch,))).backward()
        runs.append((len(hooked), Counts.backwards))
    assert runs == [(4, 4), (4, 4), (1, 1)]


def test_sam() -> None:
    """Two forward and backward passes in one capture, the second at moved parameters."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    engine, g = GradientAlignment(model), random_direction(model)
    parameters = list(model.parameters())
    for _ in range(3):
        x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
        expected = [per_example(model, x, y, g)]
        with engine.capture(norms=True) as captured:
            F.cross_entropy(model(x), y, reduction="sum").backward()
            moves = [0.05 * p.grad / p.grad.norm() for p in parameters]
            with torch.no_grad():
                torch._foreach_add_(parameters, moves)
            model.zero_grad()
            expected.append(per_example(model, x, y, g))
            F.cross_entropy(model(x), y, reduction="sum").backward()
            with torch.no_grad():
                torch._foreach_sub_(parameters, moves)
        model.zero_grad()
        assert captured.passes == (6, 6)
        torch.testing.assert_close(captured.align(g), torch.cat(expected))
