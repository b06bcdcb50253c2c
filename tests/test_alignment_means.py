"""What a mean loss divides by is taken from the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import random_direction
from torch import Tensor, nn

from ola_augment import GradientAlignment


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Tokens(nn.Module):
    """(B, T) tokens -> (B, T, 5) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


def own(model: nn.Module, losses: Tensor, g: dict[str, Tensor]) -> Tensor:
    """<grad of each loss, g>, by one backward each."""
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(one, list(parameters.values()), retain_graph=True) for one in losses
    ]
    return torch.stack(
        [sum((d * g[n]).sum() for n, d in zip(parameters, row, strict=True)) for row in rows]
    )


def aligned(model: nn.Module, loss: Callable[[], Tensor], g: dict[str, Tensor]) -> Tensor:
    engine = GradientAlignment(model, reduction="mean")
    with engine.capture(gradients=g, norms=True) as captured:
        loss().backward()
    model.zero_grad()
    return captured.align()


def linear() -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    model = nn.Linear(4, 3).double()
    y = torch.tensor([0, 1, 2, 2, 1, 2, 0, 2])
    return model, torch.randn(8, 4).double(), y, random_direction(model)


def test_two_passes_under_one_mean() -> None:
    model, x, y, g = linear()
    true = own(model, F.cross_entropy(model(x), y, reduction="none"), g)
    order = torch.tensor([6, 7, 0, 1, 2, 3, 4, 5])

    def loss() -> Tensor:
        first, second = model(x[:6]), model(x[6:])
        return F.cross_entropy(torch.cat((second, first)), y[order])

    torch.testing.assert_close(aligned(model, loss, g), true)


@pytest.mark.parametrize(
    "function", [F.cross_entropy, lambda z, y, **k: F.nll_loss(z.log_softmax(1), y, **k)]
)
def test_class_weights_and_ignored_examples(function: Callable[..., Tensor]) -> None:
    model, x, y, g = linear()
    weight = torch.tensor([1.0, 2, 3]).double()
    y[3] = -100
    true = own(model, function(model(x), y, weight=weight, reduction="none"), g)
    found = aligned(model, lambda: function(model(x), y, weight=weight), g)
    torch.testing.assert_close(found, true)
    assert found[3] == 0


@pytest.mark.parametrize("form", ["flat", "classes-second", "time-first", "packed", "shifted"])
def test_padded_tokens(form: str) -> None:
    model = Tokens().double()
    x, y = torch.randint(7, (6, 5)), torch.randint(5, (6, 5))
    lengths = torch.tensor([5, 1, 3, 4, 2, 5])
    padding = torch.arange(5) >= lengths[:, None]
    y[padding] = -100
    g = random_direction(model)
    if form == "shifted":
        y[:, 0] = 1
    logits = model(x)
    kept = y.clone()
    if form == "shifted":
        logits, kept = logits[:, :-1], y[:, 1:]
        kept[1, 0] = 2  # each has one at least
    each = F.cross_entropy(logits.flatten(0, 1), kept.flatten(), reduction="none").view(6, -1)
    true = own(model, each.sum(1) / (kept != -100).sum(1), g)

    def loss() -> Tensor:
        z = model(x)
        if form == "flat":
            return F.cross_entropy(z.flatten(0, 1), y.flatten())
        if form == "classes-second":
            return F.cross_entropy(z.transpose(1, 2), y)
        if form == "time-first":
            return F.cross_entropy(z.transpose(0, 1).reshape(30, 5), y.T.flatten())
        if form == "packed":
            return F.cross_entropy(z[~padding], y[~padding])
        return F.cross_entropy(z[:, :-1].reshape(24, 5), kept.reshape(24))

    torch.testing.assert_close(aligned(model, loss, g), true)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.mse_loss(z, y),
        lambda z, y: F.kl_div(z.log_softmax(1), y.softmax(1), reduction="batchmean"),
        lambda z, y: (z - y).square().mean(),
        lambda z, y: torch.mean((z - y).square().sum(1)),
        lambda z, y: F.smooth_l1_loss(z.T, y.T),
        lambda z, y: F.cross_entropy(z, y.softmax(1), label_smoothing=0.1),
        lambda z, y: F.mse_loss(z, y) + 0.1 * z.square().mean(),
    ],
)
def test_other_means(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x, _, g = linear()
    y = torch.randn(8, 3).double()
    z = model(x)
    true = own(model, torch.stack([loss(z[i : i + 1], y[i : i + 1]) for i in range(8)]), g)
    torch.testing.assert_close(aligned(model, lambda: loss(model(x), y), g), true)


@pytest.mark.parametrize("batch", [2, 3, 4, 5, 8])
def test_a_mean_of_means(batch: int) -> None:
    """The outer one says nothing of the examples, all of which each of its values is made of."""
    model, x, y, g = linear()
    x, y = x[:batch], y[:batch]
    t = torch.randn(batch, 3).double()

    def loss(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z, y), F.mse_loss(z, t), z.square().mean()]).mean()

    z = model(x)
    each = [loss(z[i : i + 1], y[i : i + 1], t[i : i + 1]) for i in range(batch)]
    true = own(model, torch.stack(each), g)
    torch.testing.assert_close(aligned(model, lambda: loss(model(x), y, t), g), true)


def test_a_sum_beside_a_mean_over_all_examples_alike() -> None:
    model, x, y, g = linear()
    z = model(x)
    true = own(model, F.cross_entropy(z, y, reduction="none") + z.square().sum(1), g)

    def loss() -> Tensor:
        z = model(x)
        return F.cross_entropy(z, y) + z.square().sum() / 8

    torch.testing.assert_close(aligned(model, loss, g), true)


@pytest.mark.parametrize("by", [{"size_average": False}, {"reduce": True, "size_average": False}])
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_sums_by_their_old_names_are_refused(by: dict[str, bool]) -> None:
    model, x, y, g = linear()
    with pytest.raises(RuntimeError, match='="sum"'):
        aligned(model, lambda: F.cross_entropy(model(x), y, **by), g)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z: z.square().mean(0).mean(), "no mean"),
        (lambda z: torch.cat((z.square().sum(1), z.square().mean()[None])).mean(), "no mean"),
        (
            lambda z: (
                F.cross_entropy(z.repeat(2, 1), torch.tensor([0, 1, 2, 0] * 3 + [-100] * 4))
                + z.square().sum() / 8
            ),
            "different numbers",
        ),
        (lambda z: z.square().sum(), "no mean"),
        (lambda z: z.square().mean(1).sum() / len(z), "no mean"),
        (lambda z: F.mse_loss(z, z.detach() + 1, reduction="sum"), '="sum"'),
        (lambda z: z[:4].square().mean() + z.square().mean(), "different numbers"),
    ],
)
def test_what_cannot_be_told_is_refused(loss: Callable[[Tensor], Tensor], message: str) -> None:
    model, x, _, g = linear()
    with pytest.raises(RuntimeError, match=f'reduction="mean" was declared.*{message}'):
        aligned(model, lambda: loss(model(x)), g)
