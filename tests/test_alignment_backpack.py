"""The BackPACK extension against the engine and against BackPACK's own BatchGrad."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import per_example, random_direction, relative_error, sum_loss
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import Tensor, nn

from ola_augment.alignment import BackPACKAlignment, GradientAlignment

DOUBLE = torch.float64
# BackPACK's own hooks meet inputs that need no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.BatchNorm2d(4).eval(),
        nn.Flatten(2),
        nn.LayerNorm(64),
        nn.Linear(64, 2),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 3, 8, 8, dtype=DOUBLE), torch.randint(0, 4, (size,))


def test_exact_and_equal_to_the_engine() -> None:
    model = layers()
    x, y = batch()
    g = random_direction(model)
    expected = per_example(model, x, y, g)
    engine = GradientAlignment(model)
    with engine.capture():
        sum_loss(model(x), y).backward()
    by_hooks = engine.align(g)
    extension = BackPACKAlignment(extend(model))
    with backpack(extension):
        sum_loss(model(x), y).backward()
    alignments = extension.align(g)
    assert relative_error(alignments, expected) < 1e-10
    assert relative_error(alignments, by_hooks) < 1e-12
    extension.close()


def test_composes_with_batch_grad_in_one_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).double()
    x, y = batch()
    extension = BackPACKAlignment(extend(model), reduction="mean")
    loss = extend(nn.CrossEntropyLoss())
    with backpack(extension, BatchGrad()):
        loss(model(x), y).backward()
    gradients = {name: p.grad_batch.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss(model(x.flip(0)), y).backward()
    expected = 5 * sum(
        (gradients[name].flatten(1) @ p.grad.flatten()) for name, p in model.named_parameters()
    )
    assert relative_error(extension.align(), expected) < 1e-10


def test_limits_are_errors() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))

    class Twice(nn.Module):
        def __init__(self, functional: bool = False) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()
            self.functional = functional

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            if self.functional:
                return hidden + F.linear(x.tanh(), self.a.weight)
            return self.a(hidden)

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' is tied between modules"):
        BackPACKAlignment(tied)
    with pytest.raises(ValueError, match=r"layer '0' \(RMSNorm\).*no BackPACK rule"):
        BackPACKAlignment(nn.Sequential(nn.RMSNorm(4)))
    with pytest.raises(ValueError, match="no trainable parameter"):
        BackPACKAlignment(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(TypeError, match="must be a torch"):
        BackPACKAlignment("model")

    model = Twice(functional=True)
    extension = BackPACKAlignment(model)
    extend(model.a)
    with pytest.raises(RuntimeError, match="nothing to align"):
        extension.align()
    with backpack(extension):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"'a.weight' received.*BackPACK sees modules only"):
        extension.align(random_direction(model))

    model = Twice()
    extension = BackPACKAlignment(model)
    extend(model.a)
    with backpack(extension), pytest.raises(RuntimeError, match="Linear was called twice"):
        model(x).sum().backward()


def test_reference_gradient_must_be_newer() -> None:
    model = extend(nn.Sequential(nn.Linear(4, 4)).double())
    extension = BackPACKAlignment(model)
    x = torch.randn(3, 4, dtype=DOUBLE)
    with backpack(extension):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="no reference gradient since"):
        extension.align()
    model(x).square().sum().backward()
    assert extension.align().shape == (3,)
