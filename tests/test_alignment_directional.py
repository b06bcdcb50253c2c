"""Alignments as directional derivatives against the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import by_jvp, per_example, random_direction, relative_error
from torch import Tensor, nn

from ola_augment.alignment import DirectionalAlignment

METHODS = {"jvp": (1e-10, 1e-5), "finite_difference": (1e-5, 2e-2)}


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).to(dtype)


def problem(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    model = network(dtype)
    g = {name: value / 100 for name, value in random_direction(model).items()}
    return model, torch.randn(6, 3, 8, 8).to(dtype), torch.randint(0, 4, (6,)), g


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_derivative_of_each_examples_own_loss(method: str, training: bool) -> None:
    for dtype, error in zip((torch.float64, torch.float32), METHODS[method], strict=True):
        model, x, y, g = problem(dtype)
        model.train(training)
        # through the batch's statistics when training
        expected = (by_jvp if training else per_example)(model, x, y, g)
        engine = DirectionalAlignment(model, losses, method=method)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with engine.capture(x, y) as values:
            values.mean().backward()
        optimizer.step()  # the derivative is taken at the parameters of the capture
        buffers = [buffer.clone() for buffer in model.buffers()]
        alignments = engine.align(g)
        assert relative_error(alignments, expected) < error
        for before, after in zip(buffers, model.buffers(), strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_masks_are_those_of_the_capture(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 4, (6,))
    g = random_direction(model)
    engine = DirectionalAlignment(model, losses, method=method)
    with engine.capture(x, y) as values:
        values.sum().backward()
    expected = sum((p.grad * g[name]).sum() for name, p in model.named_parameters())
    state = torch.get_rng_state()
    assert abs(engine.align(g).sum() - expected) < 1e-4 * abs(expected)
    assert torch.equal(state, torch.get_rng_state())


def test_attention_has_a_forward_derivative() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    model = Attention()
    x, y = torch.randn(3, 5, 4).double(), torch.randint(0, 4, (3,))
    g = random_direction(model)
    engine = DirectionalAlignment(model, losses, method="jvp")
    with engine.capture(x, y) as values:
        values.sum().backward()
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


def test_default_reference_and_bad_input() -> None:
    model, x, y, _ = problem(torch.float64)
    with pytest.raises(ValueError, match="method must be one of"):
        DirectionalAlignment(model, losses, method="exact")
    with pytest.raises(TypeError, match="must be a torch"):
        DirectionalAlignment(losses, losses)
    engine = DirectionalAlignment(model, losses)
    with pytest.raises(RuntimeError, match="nothing to align"):
        engine.align()
    with pytest.raises(RuntimeError, match="no gradient reached"), engine.capture(x, y):
        pass
    mean = DirectionalAlignment(model, lambda model, x, y: losses(model, x, y).mean())
    message = r"one loss per example, \(B,\), got shape \(\)"
    with pytest.raises(ValueError, match=message), mean.capture(x, y):
        pass
    with engine.capture(x, y) as values:
        values.mean().backward()
    with pytest.raises(RuntimeError, match="no reference gradient since"):
        engine.align()
    model.zero_grad()
    losses(model, x, y).mean().backward()
    assert engine.align().shape == (6,)


class Twisted(nn.Module):
    """A backward pass that is not the derivative of the forward pass."""

    def __init__(self, twist: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.twist = nn.Linear(4, 16), nn.Linear(16, 4), twist

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twist(self.first(x).tanh()))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def jvp(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.3 * g


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda g: g * 0.5)
    return h


TWISTS = {
    "stop-gradient": lambda h: 4 * h * h.detach(),
    "straight-through": lambda h: h + ((h * 4).round() / 4 - h).detach(),
    "reversal": Reversed.apply,
    "hook": hooked,
}


@pytest.mark.parametrize(
    ("method", "twist"),
    [*(("finite_difference", one) for one in TWISTS), ("jvp", "reversal"), ("jvp", "hook")],
)
def test_what_is_not_the_derivative_of_the_loss_is_refused(method: str, twist: str) -> None:
    torch.manual_seed(0)
    model = Twisted(TWISTS[twist])
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    engine = DirectionalAlignment(model, losses, method=method)
    with engine.capture(x, y) as values:
        values.mean().backward()
    g = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="do not sum to the product"):
        engine.align(g)


def test_an_operator_without_a_forward_derivative_is_refused() -> None:
    torch.manual_seed(0)

    @torch.library.custom_op("ola_augment_tests::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_autograd(lambda ctx, g: g * 2)
    model = Twisted(double)
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    engine = DirectionalAlignment(model, losses, method="jvp")
    with engine.capture(x, y) as values:
        values.sum().backward()
    with pytest.raises(RuntimeError, match="do not sum to the product"):
        engine.align({name: p.grad.clone() for name, p in model.named_parameters()})


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_the_losses_are_no_matter(method: str) -> None:
    model, x, y, g = problem(torch.float64)
    model.eval()
    engine = DirectionalAlignment(model, losses, method=method)
    with engine.capture(x, y) as values:
        (values * torch.tensor([1.0, 0, 3, -1, 0.5, 2]).double()).sum().backward()
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-4
