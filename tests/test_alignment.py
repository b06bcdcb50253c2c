"""The engine against per-example backward passes and forward-mode derivatives."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import (
    by_jvp,
    capture,
    per_example,
    random_direction,
    relative_error,
    sum_loss,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ola_augment.alignment import GradientAlignment
from ola_augment.alignment.method.terms import ExampleGradient

B = 5
DOUBLE = torch.float64


class Net(nn.Module):
    """A forward written as a function of the module and its input."""

    def __init__(self, function, **members) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def pooled(layer: nn.Module) -> nn.Module:
    """Any number of positions, squared so that biases of normalisations matter."""
    return Net(lambda net, x: (net.layer(x) + 1).square().flatten(2).mean(2), layer=layer)


def attention(**settings) -> nn.Module:
    return nn.MultiheadAttention(4, 2, batch_first=True, **settings)


def tokens(net: nn.Module, x: Tensor) -> Tensor:
    classes = net.token.expand(len(x), -1, -1)
    return net.head(torch.cat([classes, x], 1) + net.position)[:, 0]


def convolutions(rank: int) -> dict[str, tuple]:
    conv, transposed = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
    shape = (B, 4, *[6] * rank)
    cases = {
        f"conv{rank}d-{mode}": (
            lambda mode=mode: pooled(conv(4, 4, 3, 2, 1, groups=2, padding_mode=mode)),
            shape,
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    }
    batch_norm = getattr(nn, f"BatchNorm{rank}d")
    instance_norm = getattr(nn, f"InstanceNorm{rank}d")
    return cases | {
        f"conv{rank}d-dilated": (lambda: pooled(conv(4, 6, 2, dilation=2)), shape),
        f"conv{rank}d-same": (lambda: pooled(conv(4, 4, 3, padding="same", bias=False)), shape),
        f"conv_transpose{rank}d": (
            lambda: pooled(transposed(4, 4, 3, 2, 1, output_padding=1, groups=2)),
            shape,
        ),
        f"batch_norm{rank}d-eval": (lambda: pooled(batch_norm(4)).eval(), shape),
        f"instance_norm{rank}d": (lambda: pooled(instance_norm(4, affine=True)), shape),
        f"instance_norm{rank}d-tracking-eval": (
            lambda: pooled(instance_norm(4, affine=True, track_running_stats=True)).eval(),
            shape,
        ),
    }


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


CASES: dict[str, tuple] = {
    **convolutions(1),
    **convolutions(2),
    **convolutions(3),
    "linear": (lambda: nn.Linear(4, 4), (B, 4)),
    "linear-3d": (lambda: pooled(nn.Linear(4, 4)), (B, 4, 4)),
    "linear-tied": (
        lambda: Net(lambda n, x: n.a(x).relu() @ n.a.weight, a=nn.Linear(4, 6)),
        (B, 4),
    ),
    "linear-twice-in-place": (
        lambda: Net(lambda n, x: n.a(n.a(x).relu_()), a=nn.Linear(4, 4)),
        (B, 4),
    ),
    "bilinear": (
        lambda: Net(lambda n, x: n.a(x[:, 0], x[:, 1]), a=nn.Bilinear(4, 4, 4)),
        (B, 2, 4),
    ),
    "layer_norm": (lambda: pooled(nn.LayerNorm(4)), (B, 4, 4)),
    "layer_norm-2d": (lambda: pooled(nn.LayerNorm((7, 4))), (B, 7, 4)),
    "rms_norm": (lambda: pooled(nn.RMSNorm(4)), (B, 4, 4)),
    "group_norm": (lambda: pooled(nn.GroupNorm(2, 4)), (B, 4, 3, 3)),
    "prelu-one": (lambda: pooled(nn.PReLU()), (B, 4, 4)),
    "prelu-channels": (lambda: pooled(nn.PReLU(4)), (B, 4, 3)),
    "attention": (lambda: Net(lambda n, x: n.a(x, x, x)[0].mean(1), a=attention()), (B, 7, 4)),
    "attention-length-is-batch": (
        lambda: Net(lambda n, x: n.a(x, x, x)[0].mean(1), a=attention()), (B, B, 4),
    ),
    "attention-sequence-first": (
        lambda: Net(
            lambda n, x: n.a(*[x.transpose(0, 1)] * 3)[0].mean(0), a=nn.MultiheadAttention(4, 2)
        ), (B, B, 4),
    ),
    "attention-other-widths": (
        lambda: Net(
            lambda n, x: n.a(x, x[..., :3], x[..., :2])[0].mean(1),
            a=attention(kdim=3, vdim=2, add_bias_kv=True),
        ), (B, 6, 4),
    ),
    "encoder-layer": (
        lambda: Net(
            lambda n, x: n.a(x).mean(1),
            a=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        ), (B, 6, 4),
    ),
    "encoder-layer-eval": (
        lambda: Net(
            lambda n, x: n.a(x).mean(1), a=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        ).eval(), (B, 10, 4),
    ),
    "class-token-and-position": (
        lambda: Net(
            tokens, token=parameter(1, 1, 4), position=parameter(1, 7, 4), head=nn.Linear(4, 4)
        ), (B, 6, 4),
    ),
    "position-by-index": (
        lambda: Net(
            lambda n, x: n.a(x + n.e(torch.arange(B))).mean(1),
            e=nn.Embedding(B, 4), a=nn.Linear(4, 4),
        ), (B, B, 4),
    ),
    "layer-scale": (
        lambda: Net(lambda n, x: x + n.s * n.a(x), s=parameter(4), a=nn.Linear(4, 4)), (B, 4),
    ),
    "layer-scale-zero": (
        lambda: Net(
            lambda n, x: x + n.s * n.a(x), s=nn.Parameter(torch.zeros(4)), a=nn.Linear(4, 4)
        ), (B, 4),
    ),
    "softplus-scale": (
        lambda: Net(lambda n, x: x * F.softplus(n.s) + n.s.exp().sum() * x[:, :1], s=parameter(4)),
        (B, 4),
    ),
    "arithmetic": (
        lambda: Net(
            lambda n, x: torch.where(x > 0, (n.a - x) / (n.w**2 + 1), 3 - n.a) * n.a - n.w,
            w=parameter(4), a=parameter(1),
        ), (B, 4),
    ),
    "added-in-place": (
        lambda: Net(lambda n, x: n.a(x).add_(n.s).relu_(), s=parameter(4), a=nn.Linear(4, 4)),
        (B, 4),
    ),
    "expanded-as-the-input": (
        lambda: Net(lambda n, x: n.a(x * n.s.expand_as(x)), s=parameter(4), a=nn.Linear(4, 4)),
        (B, 4),
    ),
    "expanded-as-one-example": (
        lambda: Net(lambda n, x: n.a(x * n.s.expand_as(x)), s=parameter(4), a=nn.Linear(4, 4)),
        (1, 4),
    ),
    "einsum": (
        lambda: Net(lambda n, x: torch.einsum("bte,ef->bf", x, n.w), w=parameter(4, 4)), (B, 6, 4),
    ),
    "matmul-left": (lambda: Net(lambda n, x: (n.w @ x).mean(2), w=parameter(4, 4)), (B, 4, 6)),
    "weight_norm": (weight_normed, (B, 4)),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval(), (B, 4),
    ),
    "windows": (
        lambda: Net(
            lambda n, x: n.a(x.reshape(-1, 4)).view(len(x), 10, 4).mean(1), a=nn.Linear(4, 4)
        ), (B, 10, 4),
    ),
    "flattened-sequence-first": (
        lambda: Net(
            lambda n, x: n.a(x.transpose(0, 1).reshape(-1, 4)).view(B, -1, 4).mean(0),
            a=nn.Linear(4, 4),
        ), (B, B, 4),
    ),
    "convolution-of-crops": (
        lambda: Net(
            lambda n, x: n.a(x.flatten(0, 1)).mean((2, 3)).view(len(x), 2, 4).mean(1),
            a=nn.Conv2d(3, 4, 3),
        ), (B, 2, 3, 6, 6),
    ),
    "one-example": (lambda: pooled(nn.Conv2d(4, 4, 3)), (1, 4, 6, 6)),
}  # fmt: skip


def problem(make, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = make().to(dtype)
    return model, torch.randn(shape).to(dtype), torch.randint(0, 4, shape[:1])


@pytest.mark.parametrize("case", CASES)
def test_exact_against_one_backward_per_example(case: str) -> None:
    model, x, y = problem(*CASES[case], DOUBLE)
    g = random_direction(model)
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    alignments = engine.align(g)
    assert alignments.shape == (len(x),)
    assert alignments.dtype == DOUBLE
    assert relative_error(alignments, per_example(model, x, y, g)) < 1e-10


@pytest.mark.parametrize(
    "case", ["linear", "conv2d-zeros", "group_norm", "encoder-layer", "batch_norm2d-eval"]
)
def test_single_precision(case: str) -> None:
    model, x, y = problem(*CASES[case], torch.float32)
    g = random_direction(model)
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    alignments = engine.align(g)
    assert alignments.dtype == torch.float32
    assert relative_error(alignments, per_example(model, x, y, g)) < 1e-5


def test_large_pairs_become_smaller_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-example weight gradients instead of pairs, for every kind of layer that has them."""
    packed = []
    monkeypatch.setattr("ola_augment.alignment.method.terms._WORTHWHILE", 0)
    original = ExampleGradient.__init__

    def counting(self: ExampleGradient, gradient: Tensor) -> None:
        packed.append(gradient.dim())
        original(self, gradient)

    monkeypatch.setattr(ExampleGradient, "__init__", counting)
    layers = {
        "strided": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
        "grouped, dilated": lambda: nn.Conv2d(4, 4, 3, groups=2, dilation=2, bias=False),
        "padded by name": lambda: nn.Conv2d(3, 4, 3, padding="same"),
        "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1, groups=1),
        "one dimension": lambda: nn.Conv1d(3, 4, (3,), padding=1),
        "three dimensions": lambda: nn.ConvTranspose3d(2, 4, 2, dilation=2),
        "rows": lambda: nn.Linear(3, 4),
    }
    shapes = {
        "strided": (B, 3, 17, 16), "grouped, dilated": (B, 4, 16, 16),
        "padded by name": (B, 3, 16, 16), "transposed": (B, 3, 12, 12),
        "one dimension": (B, 3, 99), "three dimensions": (B, 2, 6, 7, 8), "rows": (B, 50, 3),
    }  # fmt: skip
    for name, make in layers.items():
        packed.clear()
        model, x, y = problem(lambda make=make: pooled(make()), shapes[name], DOUBLE)
        g = random_direction(model)
        engine = GradientAlignment(model)
        capture(engine, model, x, y)
        assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10
        assert (max(packed) > 2) == (name != "padded by name"), name


@pytest.mark.parametrize(("storage", "error"), [("bfloat16", 1e-2), ("int8", 3e-2)])
def test_storages_round_single_precision_only(
    storage: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ola_augment.alignment.method.storage._ROUNDED_FROM", 0)

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3),
            nn.Flatten(), nn.Linear(8 * 36, 4),
        )  # fmt: skip

    for dtype, smallest, largest in ((torch.float32, 1e-6, error), (DOUBLE, 0, 1e-10)):
        model, x, y = problem(make, (16, 3, 8, 8), dtype)
        g = random_direction(model)
        engine = GradientAlignment(model, storage=storage)
        for _ in range(2):  # the second time in the first one's memory
            capture(engine, model, x, y)
            assert smallest < relative_error(engine.align(g), per_example(model, x, y, g)) < largest


def test_embedding_with_padding() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: n.a(n.e(x)).mean(1), e=nn.Embedding(9, 4, padding_idx=0), a=nn.Linear(4, 4)
    ).double()
    x, y = torch.randint(0, 3, (B, 7)), torch.randint(0, 4, (B,))
    g = random_direction(model)
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])
def test_batch_norm_in_training_returns_shares_of_the_total(layer: nn.Module) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

    model, x, y = problem(make, (B, 3, 6, 6), DOUBLE)
    g = random_direction(model)
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    alignments = engine.align(g)
    own = by_jvp(model, x, y, g)
    assert torch.allclose(alignments.sum(), own.sum(), rtol=1e-10)
    assert relative_error(alignments, own) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_batch_norm_of_a_model_in_half_precision(dtype, affine: bool, tracks: bool) -> None:
    def make() -> nn.Module:
        norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=tracks)
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

    model, x, y = problem(make, (B, 3, 6, 6), dtype)
    g = random_direction(model)
    engine = GradientAlignment(model)
    for _ in range(2):  # verified, and later
        model.zero_grad()
        capture(engine, model, x, y)
        alignments = engine.align(g)
        total = sum((p.grad * g[name]).double().sum() for name, p in model.named_parameters())
        assert abs(alignments.double().sum() - total) < 0.02 * alignments.abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(lambda net, x: net.norm(x).mean(1), norm=nn.LayerNorm(4)),
        lambda: Net(lambda net, x: net.norm(x.unflatten(2, (2, 2))).mean(1).flatten(1),
                    norm=nn.LayerNorm((2, 2))),
        lambda: Net(lambda net, x: (x + net.rows((x[..., 0] > 0).long())).mean(1),
                    rows=nn.Embedding(2, 4)),
    ],
    ids=["layer norm", "of two dimensions", "embedding"],
)  # fmt: skip
def test_alignments_are_right_where_torch_adds_up_in_16_bits(make, dtype) -> None:
    """Of 2,048 equal summands one by one little arrives in the gradient."""
    model, x, y = problem(make, (B, 2048, 4), dtype)
    g = random_direction(model)
    engine = GradientAlignment(model)
    for _ in range(2):  # verified, and later
        model.zero_grad()
        capture(engine, model, x, y)
        exact = copy.deepcopy(model).double()
        wide = {name: part.double() for name, part in g.items()}
        expected = per_example(exact, x.double(), y, wide)
        assert relative_error(engine.align(g).double(), expected) < 0.02
    if dtype == torch.bfloat16:  # as it is to be
        sum_loss(exact(x.double()), y).backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        assert max(relative_error(one.grad.double(), own.grad) for one, own in pairs) > 0.2


def test_rows_lost_in_16_bits_are_refused_with_a_way_out() -> None:
    def make() -> nn.Module:
        return Net(
            lambda net, x: (x + net.rows[(x[..., 0] > 0).long()]).mean(1), rows=parameter(2, 4)
        )

    model, x, y = problem(make, (B, 2048, 4), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"'rows'.* keep parameters in float32"):
        capture(GradientAlignment(model), model, x, y)
    model, x = model.float(), x.float()
    engine = GradientAlignment(model)
    with engine.capture(), torch.autocast("cpu"):
        sum_loss(model(x), y).backward()
    g = random_direction(model)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 0.02


@pytest.mark.parametrize("shape", [(B, 4), (B, 4, 3), (B, 4, 3, 2)])
def test_shares_of_batch_norm_are_those_of_the_gradient_that_each_example_sends(shape) -> None:
    """delta_i times the normalised input, and delta_i; also where the mean is far from 0."""
    kind = nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d

    def make() -> nn.Module:
        norm = kind(4, eps=0.1)
        nn.init.uniform_(norm.weight, 0.5, 2)
        return nn.Sequential(norm, nn.Flatten(), nn.Linear(math.prod(shape[1:]), 4))

    for dtype, offset, error in ((DOUBLE, 0, 1e-10), (torch.float32, 100, 1e-5)):
        model, x, y = problem(make, shape, dtype)
        x += offset
        g = {name: part for name, part in random_direction(model).items() if name.startswith("0.")}
        engine = GradientAlignment(model)
        capture(engine, model, x, y)
        exact = copy.deepcopy(model).double()
        normalised = exact[0](x.double())
        (delta,) = torch.autograd.grad(sum_loss(exact[1:](normalised), y), normalised)
        along = (1, 4, *(1,) * (len(shape) - 2))
        xhat = (normalised - exact[0].bias.view(along)) / exact[0].weight.view(along)
        tangent = g["0.weight"].view(along) * xhat + g["0.bias"].view(along)
        expected = (delta * tangent).flatten(1).sum(1)
        assert relative_error(engine.align(g).double(), expected.detach()) < error


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 6),
    length=st.integers(1, 6),
    inputs=st.integers(1, 5),
    bias=st.booleans(),
    mean=st.booleans(),
)
def test_linear_of_any_shape(batch: int, length: int, inputs: int, bias: bool, mean: bool) -> None:
    def make() -> nn.Module:
        return Net(lambda net, x: net.a(x).mean(1), a=nn.Linear(inputs, 4, bias=bias))

    model, x, y = problem(make, (batch, length, inputs), DOUBLE)
    g = random_direction(model)
    engine = GradientAlignment(model, reduction="mean" if mean else "sum")
    capture(engine, model, x, y, F.cross_entropy if mean else sum_loss)
    assert torch.allclose(engine.align(g), per_example(model, x, y, g), rtol=1e-9, atol=1e-12)


def test_shares_of_a_mean_sum_to_the_directional_derivative() -> None:
    model, x, y = problem(*CASES["conv2d-zeros"], DOUBLE)
    engine = GradientAlignment(model)
    capture(engine, model, x, y, F.cross_entropy)
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    g = random_direction(model)
    expected = sum((gradient[name] * g[name]).sum() for name in g)
    assert torch.allclose(engine.align(g).sum(), expected, rtol=1e-10)


def test_frozen_parameters_are_skipped() -> None:
    model, x, y = problem(*CASES["encoder-layer"], DOUBLE)
    for name, p in model.named_parameters():
        p.requires_grad_("linear1" in name or name.endswith("norm2.bias"))
    g = random_direction(model)
    assert len(g) == 3
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


def test_parameters_without_gradient_and_partial_directions() -> None:
    model, x, y = problem(
        lambda: Net(lambda n, x: n.a(x), a=nn.Linear(4, 4), unused=nn.Linear(4, 4)), (B, 4), DOUBLE
    )
    engine = GradientAlignment(model)
    g = {"a.bias": torch.ones(4, dtype=DOUBLE), "unused.bias": torch.ones(4, dtype=DOUBLE)}
    full = {name: torch.zeros_like(p) for name, p in model.named_parameters()} | g
    capture(engine, model, x, y)
    found = engine.align(g)
    capture(engine, model, x, y)
    assert torch.equal(found, engine.align(full))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_fallback_differentiates_what_no_rule_covers(kind: str) -> None:
    model, x, y = problem(
        lambda: Net(lambda n, x: n.a(x)[0][:, -1], a=getattr(nn, kind)(3, 4, batch_first=True)),
        (B, 6, 3),
        DOUBLE,
    )
    with pytest.raises(ValueError, match=r"layer 'a' .*fallback=True"):
        GradientAlignment(model)
    g = random_direction(model)
    engine = GradientAlignment(model, fallback=True)
    capture(engine, model, x, y)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


def test_fallback_for_one_function() -> None:
    model, x, y = problem(
        lambda: Net(
            lambda n, x: torch.xlogy(x, n.w.abs()) + torch.special.xlog1py(x, n.w.abs()),
            w=parameter(4),
        ),
        (B, 4),
        DOUBLE,
    )
    engine = GradientAlignment(model)
    with pytest.raises(RuntimeError, match=r"xlog1py reads parameter 'w'.*fallback=True"):
        capture(engine, model, x, y)
    g = random_direction(model)
    engine = GradientAlignment(model, fallback=True)
    capture(engine, model, x, y)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


def test_fallback_around_fused_attention() -> None:
    """Its fused kernel has no second derivative: parameters reach it unfused."""

    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        key = torch.special.xlog1py(x, net.w.abs())
        query = net.query.expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(query, key, net.a(x), net.bias).mean(1)

    def make() -> nn.Module:
        return Net(
            forward, w=parameter(4), query=parameter(3, 4), bias=parameter(3, 5), a=nn.Linear(4, 4)
        )

    model, x, y = problem(make, (B, 5, 4), DOUBLE)
    g = random_direction(model)
    engine = GradientAlignment(model, fallback=True)
    capture(engine, model, x, y)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


MIXING = {
    "flip": lambda net, x: net.a(x.flip(0)),
    "neighbour": lambda net, x: net.a(x + 0.1 * x.roll(1, 0)),
    "sorted": lambda net, x: net.a(x.sort(0).values),
}


@pytest.mark.parametrize("mix", MIXING)
def test_models_that_mix_examples_are_refused(mix: str) -> None:
    model, x, y = problem(lambda: Net(MIXING[mix], a=nn.Linear(4, 4)), (B, 4), DOUBLE)
    with pytest.raises(RuntimeError, match=r"'a.bias', 'a.weight'.*told apart"):
        capture(GradientAlignment(model), model, x, y)


def test_noise_and_dropout_do_not_hide_the_layout() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden = F.dropout(net.a(x), 0.5) + torch.randn_like(x)
        return net.a(hidden * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5))

    model, x, y = problem(lambda: Net(forward, a=nn.Linear(4, 4)), (B, 4), DOUBLE)
    g = random_direction(model)
    engine = GradientAlignment(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    capture(engine, model, x, y)
    torch.set_rng_state(state)  # the check drew nothing from it
    gradient = torch.autograd.grad(sum_loss(model(x), y), list(model.parameters()))
    expected = sum(
        (d * g[n]).sum() for (n, _), d in zip(model.named_parameters(), gradient, strict=True)
    )
    assert torch.allclose(engine.align(g).sum(), expected, rtol=1e-10)


def test_buffers_are_left_alone_by_the_check() -> None:
    model, x, y = problem(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), (B, 4), DOUBLE)
    capture(GradientAlignment(model), model, x, y)
    assert int(model[0].num_batches_tracked) == 1
    assert torch.allclose(model[0].running_mean, 0.1 * x.mean(0))


def test_sums_that_cancel_are_not_refused_for_the_rounding_of_int8(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    networks = importlib.import_module("networks")
    torch.manual_seed(1)
    model = networks.WideResNet(10, 2, 10)
    inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    found = []
    for storage in ("int8", "exact"):
        engine = GradientAlignment(model, storage=storage)
        with engine.capture():
            F.cross_entropy(model(inputs), targets).backward()
        model.zero_grad()
        F.cross_entropy(model(inputs.flip(0)), targets).backward()
        found.append(engine.align())
        model.zero_grad()
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.999
