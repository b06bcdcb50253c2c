"""Rules: every hand-written model of the zoo against one autograd.grad per example's loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from alignment_oracles import (
    capture,
    cdist_has_a_second_derivative,
    per_example,
    random_direction,
    relative_error,
)
from torch import Tensor, nn

from ola_augment.alignment import GradientAlignment, register_rule
from ola_augment.alignment.method.rules import RULES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "zoo"))

from check import check
from handwritten_cases import CASES

PENDING = {"GRU by hand"}  # its first state is a constant


@pytest.mark.parametrize("name", [name for name in CASES if name not in PENDING])
@pytest.mark.filterwarnings("ignore")
def test_exact_in_the_first_and_in_a_later_capture(name: str) -> None:
    if name == "distances to prototypes" and not cdist_has_a_second_derivative():
        pytest.skip("torch cannot")
    for mode, verdict in check(CASES[name]()).items():
        assert verdict.status == "exact", (mode, verdict)


@torch.overrides.wrap_torch_function(lambda x, w: (x, w))
def squared_linear(x: Tensor, w: Tensor) -> Tensor:
    return x @ (w * w).T


class Squared(nn.Module):
    """Calls a function that torch knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return squared_linear(x, self.w)


@pytest.fixture
def own_rule():
    yield
    RULES.pop(squared_linear, None)


@pytest.mark.usefixtures("own_rule")
def test_a_registered_rule_is_used_and_checked() -> None:
    torch.manual_seed(0)
    model, x, y = Squared(), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 4, 2])
    g = random_direction(model)

    @register_rule(squared_linear)
    def right(x, w):
        yield w, lambda x, w, g: x @ (2 * w * g).T, (x, w)

    engine = GradientAlignment(model)
    for _ in range(2):
        capture(engine, model, x, y)
        assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-12

    @register_rule(squared_linear)
    def wrong(x, w):
        yield w, lambda x, w, g: x @ (w * g).T, (x, w)

    with pytest.raises(RuntimeError, match="'w' received a gradient"):
        capture(GradientAlignment(model), model, x, y)


def test_rules_are_for_functions() -> None:
    with pytest.raises(TypeError, match="function must be callable, got str"):
        register_rule("linear")
