"""Compiled models: captured as they were written, while the plain step stays compiled."""

import pytest
import torch
from alignment_oracles import capture, per_example, random_direction, relative_error, sum_loss
from torch import nn

from ola_augment import GradientAlignment

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 2, 1, 0])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class Calls:
    """A backend that counts how often compiled code runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def whole(model, backend):
    return torch.compile(model, backend=backend)


def layer(model, backend):
    model[0] = torch.compile(model[0], backend=backend)
    return model


def in_place(model, backend):
    model.compile(backend=backend)
    return model


class Function(nn.Module):
    def __init__(self, model, backend):
        super().__init__()
        self.model = model
        self.function = torch.compile(lambda h: self.model(h), backend=backend)

    def forward(self, x):
        return self.function(x)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [whole, layer, in_place, Function])
def test_exact_and_still_compiled(compiled) -> None:
    backend = Calls()
    model, written = compiled(network(), backend), network()
    engine = GradientAlignment(model)
    true = per_example(written, X, Y, random_direction(written))
    names = [name for name, _ in written.named_parameters()]
    for step in range(3):
        model.zero_grad()
        sum_loss(model(X), Y).backward()
        assert backend.runs == step + 1
        g = dict(zip(engine.gradients(), random_direction(written).values(), strict=True))
        assert len(g) == len(names)
        model.zero_grad()
        capture(engine, model, X, Y)
        assert backend.runs == step + 1
        assert relative_error(engine.align(g), true) < 1e-10


def test_an_engine_of_the_model_inside_captures_the_wrapper() -> None:
    model = network()
    compiled = torch.compile(model, backend=Calls())
    engine = GradientAlignment(model)
    g = random_direction(model)
    capture(engine, compiled, X, Y)
    assert relative_error(engine.align(g), per_example(model, X, Y, g)) < 1e-10
