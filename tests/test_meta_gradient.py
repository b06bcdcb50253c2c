"""Both ways to the meta-gradient against finite differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ola_augment import MetaGradientUpdater

ALPHA = 0.05


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    next_x, next_y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    return model, (x, y), (next_x, next_y)


def weighted_loss(outputs, targets, phi):
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (phi.sigmoid() * losses).mean()


def next_loss_after_step(model, batch, next_batch, phi):
    """L(theta_{t+1}(phi)), computed anew for every phi: the oracle."""
    twin = {
        name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()
    }
    loss = weighted_loss(functional_call(model, twin, batch[0]), batch[1], phi)
    gradients = torch.autograd.grad(loss, list(twin.values()))
    moved = {n: v - ALPHA * g for (n, v), g in zip(twin.items(), gradients, strict=True)}
    return nn.functional.cross_entropy(
        functional_call(model, moved, next_batch[0]), next_batch[1]
    ).detach()


@pytest.mark.parametrize("way", ["re-used", "unrolled"])
def test_meta_gradient_equals_finite_differences(way):
    model, batch, next_batch = problem()
    phi = torch.randn(6).double().requires_grad_()
    meta = MetaGradientUpdater(model, [phi], ALPHA, optimizer=torch.optim.SGD([phi], lr=1.0))
    exact = torch.zeros(6).double()
    step = 1e-5
    for i in range(6):
        ends = []
        for sign in (1, -1):
            moved = phi.detach().clone()
            moved[i] += sign * step
            ends.append(next_loss_after_step(model, batch, next_batch, moved))
        exact[i] = (ends[0] - ends[1]) / (2 * step)

    before = phi.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=ALPHA)
    meta.backward(weighted_loss(meta.forward(batch[0]), batch[1], phi))
    optimizer.step()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(next_batch[0]), next_batch[1]).backward()
    if way == "unrolled":
        ordinary = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        outputs = functional_call(model, meta.unrolled_parameters(), next_batch[0])
        meta.step_unrolled(nn.functional.cross_entropy(outputs, next_batch[1]))
        for parameter, gradient in zip(model.parameters(), ordinary, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    else:
        meta.step()
    torch.testing.assert_close(before - phi.detach(), exact, rtol=1e-6, atol=1e-11)


def test_noisy_labels_lose_weight():
    """Learned per-example weights tell wrong labels from right ones."""
    torch.manual_seed(0)
    truth = torch.randn(10, 3)
    x, plain_x = torch.randn(60, 10), torch.randn(200, 10)
    y, plain_y = (x @ truth).argmax(1), (plain_x @ truth).argmax(1)
    y[:15] = (y[:15] + 1) % 3
    model = nn.Linear(10, 3)
    phi = torch.zeros(60, requires_grad=True)
    meta = MetaGradientUpdater(model, [phi], 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        meta.backward(weighted_loss(meta.forward(x), y, phi))
        optimizer.step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(plain_x), plain_y).backward()
        meta.step()
        optimizer.step()
    weights = phi.detach().sigmoid()
    assert (weights[:15] < 0.1).float().mean() > 0.7
    assert weights[15:].mean() > 0.5


def test_bad_use_is_refused():
    model = nn.Linear(2, 1)
    phi = torch.zeros(1, requires_grad=True)
    meta = MetaGradientUpdater(model, [phi], 0.1)
    for call in (meta.step, meta.unrolled_parameters, lambda: meta.step_unrolled(phi.sum())):
        with pytest.raises(RuntimeError, match="forward"):
            call()
    with pytest.raises(RuntimeError, match="forward"):
        meta.backward(phi.sum())
    meta.backward((meta.forward(torch.ones(1, 2)) * phi.exp()).sum())
    model.zero_grad()
    with pytest.raises(RuntimeError, match="backward first"):
        meta.step()
    with pytest.raises(RuntimeError, match="unrolled_parameters"):
        meta.step_unrolled(phi.sum())
    for arguments, message in (
        ((model, [], 0.1), "at least one"),
        ((model, [torch.zeros(1)], 0.1), "leaf"),
        ((nn.ReLU(), [phi], 0.1), "trainable"),
        ((model, [phi], 0.0), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MetaGradientUpdater(*arguments)
