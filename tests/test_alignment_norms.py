"""Norms of the examples' gradients, against one float64 gradient per example."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import (
    cdist_has_a_second_derivative,
    per_example,
    random_direction,
    sum_loss,
)
from torch import nn
from torch.nn.utils import parametrizations

from ola_augment import GradientAlignment
from ola_augment.alignment.method.rules import convolutions, layers


def true_norms(model, x, y, loss=sum_loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(x)):
        own = loss(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(own, parameters, materialize_grads=True)
        norms.append(sum(g.abs().square().sum() for g in gradients).sqrt())
    return torch.stack(norms)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.mix = nn.Linear(6, 6)

    def forward(self, tokens):
        h = self.mix(torch.tanh(self.mix(self.embed(tokens))))
        return (h @ self.embed.weight.T).mean(1)


class Class(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.layer(h)[:, 0]


class Raw(nn.Module):
    """Functions without a formula of their own, sequences first, a parameter in an expression."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x.transpose(0, 1)).transpose(0, 1)
        return torch.einsum("bti,io->bo", x, self.a * self.b.sigmoid()) * self.b


def conv(spatial, *args, transposed=False, **kwargs):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    return nn.Sequential(kind(*args, **kwargs), nn.GroupNorm(2, args[1]), nn.Flatten(1))


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)), (5,)),
    "positions": (lambda: nn.Sequential(nn.Linear(5, 40), nn.Flatten(1)), (3, 5)),
    "many positions": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Flatten(1)), (30, 5)),
    "conv": (lambda: conv(2, 3, 4, 3, padding=1), (3, 6, 6)),
    "conv, few positions": (lambda: conv(2, 8, 12, 3, stride=2, padding=1), (8, 4, 5)),
    "conv, groups": (lambda: conv(2, 8, 12, 3, 1, 2, 2, 4), (8, 3, 4)),
    "conv, dilation": (lambda: conv(2, 6, 8, (3, 2), (2, 1), (1, 0), (2, 1)), (6, 5, 4)),
    "conv, same": (lambda: conv(2, 3, 4, 3, padding="same"), (3, 4, 4)),
    "conv, circular": (lambda: conv(2, 8, 8, 3, padding=1, padding_mode="circular"), (8, 3, 3)),
    "conv 1d": (lambda: conv(1, 8, 10, 3, padding=1), (8, 4)),
    "conv 3d": (lambda: conv(3, 8, 8, 2), (8, 3, 2, 3)),
    "transposed": (lambda: conv(2, 12, 8, 3, 2, 1, 1, 2, transposed=True), (12, 3, 2)),
    "transposed 1d": (lambda: conv(1, 9, 8, 4, 3, transposed=True), (9, 3)),
    "batch norm": (lambda: conv(2, 3, 4, 3).append(nn.BatchNorm1d(64)).eval(), (3, 6, 6)),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 7)), nn.Linear(7, 3)),
        (5,),
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 7), nn.PReLU(7), nn.PReLU()), (5,)),
    "class token": (Class, (4, 6)),
    "bilinear": (lambda: Twice(nn.Bilinear(5, 5, 3)), (5,)),
    "raw": (Raw, (4, 6)),
}


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x.sin())


class Functional(nn.Module):
    """A function of the input and of parameters that have no layer."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.parts = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.parts).flatten(1)


MEAN, VAR = torch.linspace(-1, 1, 4).double(), torch.linspace(0.01, 2, 4).double()
FUNCTIONS = {
    "linear": (F.linear, [(5, 6)], (2, 6)),
    "bilinear": (lambda x, w: F.bilinear(x, x.sin(), w), [(3, 6, 6)], (6,)),
    "conv1d": (F.conv1d, [(9, 8, 2), (9,)], (8, 4)),
    "conv2d": (F.conv2d, [(10, 8, 2, 2)], (8, 3, 3)),
    "conv2d, many positions": (F.conv2d, [(2, 3, 2, 2)], (3, 6, 6)),
    "conv2d, numbers": (lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 2), [(8, 4, 3, 3)], (8, 4, 4)),
    "conv2d, names": (
        lambda x, w: F.conv2d(x, w, stride=(2, 1), dilation=2), [(9, 8, 2, 2)], (8, 5, 4),
    ),
    "conv3d": (F.conv3d, [(8, 6, 2, 2, 2)], (6, 3, 2, 2)),
    "settings of one entry": (
        lambda x, w: F.conv2d(x, w, None, (2,), (1,), (1,)), [(9, 8, 2, 2)], (8, 5, 4),
    ),
    "transposed": (F.conv_transpose2d, [(12, 5, 2, 2), (5,)], (12, 2, 2)),
    "transposed, numbers": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2, 2), [(12, 5, 3, 3)], (12, 2, 2),
    ),
    "addmm": (lambda x, b, w: torch.addmm(b, x, w), [(4,), (5, 4)], (5,)),
    "addmm, scaled": (
        lambda x, b, w: b.addmm(x, w, beta=3, alpha=0.5), [(1, 4), (5, 4)], (5,),
    ),
    "baddbmm, left": (
        lambda x, b, w: torch.baddbmm(b, w.expand(len(x), -1, -1), x, alpha=0.5),
        [(4,), (3, 2)], (2, 4),
    ),
    "baddbmm, right": (
        lambda x, b, w: torch.baddbmm(b, x, w.expand(len(x), -1, -1), beta=3, alpha=0.5),
        [(3,), (4, 3)], (2, 4),
    ),
    "batch norm": (lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b), [(4,), (4,)], (4, 3)),
    "instance norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(4,), (4,)], (4, 3)),
    "instance norm, running": (
        lambda x, w, b: F.instance_norm(x, MEAN, VAR, w, b, use_input_stats=False),
        [(4,), (4,)], (4, 3),
    ),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(4,), (4,)], (4, 3)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4, 3), w, b), [(4, 3), (4, 3)], (2, 4, 3)),
    "layer norm, shift": (lambda x, b: F.layer_norm(x, (3,), bias=b), [(3,)], (2, 3)),
    "RMS norm": (lambda x, w: F.rms_norm(x, (3,), w), [(3,)], (2, 3)),
    "RMS norm, wide": (lambda x, w: F.rms_norm(x, (3,), w, 0.5), [(3,)], (2, 3)),
    "PReLU": (lambda x, w: F.prelu(x, w), [(4,)], (4, 3)),
}  # fmt: skip
CASES |= {
    f"functional {name}": (lambda f=function, s=shapes: Functional(f, *s), shape)
    for name, (function, shapes, shape) in FUNCTIONS.items()
}


@pytest.mark.parametrize("known", [False, True], ids=["pairs", "reference first"])
@pytest.mark.parametrize("name", CASES)
def test_norms_and_alignments_are_those_of_one_gradient_per_example(name, known):
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make().double()
    x, y = torch.randn(5, *shape).double(), torch.randint(3, (5,))
    true = true_norms(model, x, y)
    engine = GradientAlignment(model)
    g = random_direction(model)
    aligned = per_example(model, x, y, g)
    for _ in range(3):
        with engine.capture(norms=True, gradients=g if known else None) as captured:
            sum_loss(model(x), y).backward()
        torch.testing.assert_close(captured.norms(), true, rtol=1e-10, atol=1e-12)
        found = captured.align(*(() if known else (g,)))
        torch.testing.assert_close(found, aligned, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(captured.norms(), true, rtol=1e-10, atol=1e-12)


KERNELS = [name for name in CASES if "conv" in name or "transposed" in name]


@pytest.mark.parametrize("name", [*KERNELS, "conv, by channel"])
def test_kernel_gradients_by_windows_and_by_a_call_for_each_example_are_the_same(name, monkeypatch):
    torch.manual_seed(0)
    make, shape = CASES.get(name, (lambda: conv(2, 4, 4, 3, groups=4), (4, 9, 9)))
    model = make().double()
    x, y = torch.randn(5, *shape).double(), torch.randint(3, (5,))
    g, found = random_direction(model), []
    for few in (2**22, 0):
        monkeypatch.setattr(convolutions, "_FEW", few)
        with GradientAlignment(model).capture(norms=True, gradients=g) as captured:
            sum_loss(model(x), y).backward()
        found += [captured.norms(), captured.align()]
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0], true_norms(model, x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", [3, 30], ids=["gradients", "Gram matrices"])
def test_norms_of_complex_gradients(width):
    torch.manual_seed(0)
    model = nn.Linear(width, width, dtype=torch.complex128)
    x, y = torch.randn(5, 4, width, dtype=torch.complex128), torch.zeros(5)

    def loss(outputs, _):
        return outputs.abs().square().sin().sum()

    with GradientAlignment(model).capture(norms=True) as captured:
        loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y, loss))


class RealAmongComplex(nn.Module):
    def __init__(self, meet):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6))
        self.meet = meet

    def forward(self, x):
        return self.last(self.meet(torch.fft.fft(self.first(x)), self.w))


@pytest.mark.parametrize(
    "meet",
    [
        lambda z, w: (z * w).real,
        lambda z, w: (w * z + w).abs(),
        lambda z, w: (z - w).abs(),
        lambda z, w: (w - z).abs(),
        lambda z, w: (z / w).real,
        lambda z, w: torch.cat((z, w.expand_as(z)), 1).cumprod(1).abs()[:, 6:],
        lambda z, w: torch.lerp(z, w.to(z.dtype), 0.3j).abs(),
    ],
)
def test_norms_of_real_parameters_that_meet_complex_data(meet):
    torch.manual_seed(0)
    model = RealAmongComplex(meet).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    with GradientAlignment(model, fallback=True).capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y))


def test_tied_weights_are_added_before_the_norm():
    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randint(11, (4, 6)), torch.randint(11, (4,))
    x[:, 2] = x[:, 3] = 0
    with GradientAlignment(model).capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)


def test_embedding_rows_that_are_read_twice_meet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6, padding_idx=1), nn.Flatten(1), nn.Linear(24, 3))
    model.double()
    x, y = torch.randint(5, (7, 4)), torch.randint(3, (7,))
    with GradientAlignment(model).capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)


@pytest.mark.parametrize("padding", [None, 3, -2])
def test_embedding_by_its_function(padding):
    torch.manual_seed(0)
    model = Functional(lambda x, w: F.embedding(x, w, padding), (5, 2)).double()
    x, y = torch.randint(5, (7, 4)), torch.randint(3, (7,))
    g = random_direction(model)
    with GradientAlignment(model).capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)
    torch.testing.assert_close(captured.align(g), per_example(model, x, y, g), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_whose_gradients_are_not_their_examples_are_refused(option):
    model = Functional(lambda x, w: F.embedding(x, w, **option), (5, 2))

    def captured():
        with GradientAlignment(model).capture():
            model(torch.randint(5, (7, 4))).sum().backward()

    with pytest.raises(RuntimeError, match="embedding with max_norm, scale_grad_by_freq or sparse"):
        captured()


def crops(x, w):
    return F.conv2d(x.flatten(0, 1), w).reshape(len(x), -1)


# Input, shape of w, and whether the Gram matrices of T x T cost fewer multiplications for an
# example and group, T T (O + I), than its gradient, T O I.
WAYS = {
    "linear, 4 x 4 x 16 <= 4 x 64": (F.linear, (4, 8), (8, 8), True),
    "linear, 5 x 5 x 16 > 5 x 64": (F.linear, (5, 8), (8, 8), False),
    "groups, 3 x 3 x 20 <= 3 x 64": (partial(F.conv2d, groups=2), (8, 2, 4), (8, 4, 2, 2), True),
    "groups, 4 x 4 x 20 > 4 x 64": (partial(F.conv2d, groups=2), (8, 2, 5), (8, 4, 2, 2), False),
    "transposed, 7 x 7 x 32 <= 7 x 240": (F.conv_transpose2d, (12, 7, 1), (12, 5, 2, 2), True),
    "transposed, 8 x 8 x 32 > 8 x 240": (F.conv_transpose2d, (12, 8, 1), (12, 5, 2, 2), False),
    "two crops, 6 x 6 x 40 <= 6 x 256": (crops, (2, 8, 2, 4), (8, 8, 2, 2), True),
    "two crops, 8 x 8 x 40 > 8 x 256": (crops, (2, 8, 2, 5), (8, 8, 2, 2), False),
}


@pytest.mark.parametrize("case", WAYS)
def test_norms_take_the_way_that_costs_less(case, monkeypatch):
    function, shape, weight, gram = WAYS[case]
    calls, original = [], layers.gram_norms
    for module in (layers, convolutions):
        monkeypatch.setattr(module, "gram_norms", lambda *rows: calls.append(1) or original(*rows))
    torch.manual_seed(0)
    model = Functional(function, weight).double()
    x, y = torch.randn(5, *shape).double(), torch.randint(3, (5,))
    with GradientAlignment(model).capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)
    assert bool(calls) == gram


@pytest.mark.skipif(not cdist_has_a_second_derivative(), reason="torch cannot")
def test_a_function_without_a_rule():
    torch.manual_seed(0)

    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return torch.cdist(x, self.centers)

    model = Distances().double()
    x, y = torch.randn(4, 5).double(), torch.randint(3, (4,))
    with GradientAlignment(model, fallback=True).capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)


def test_the_factor_is_that_of_the_alignments():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(4, 5).double(), torch.randint(3, (4,))
    with GradientAlignment(model, reduction="mean").capture(norms=True, loss_scale=8.0) as captured:
        (F.cross_entropy(model(x), y) * 8).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)


def test_several_passes_and_backwards():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    true = true_norms(model, x, y)
    engine = GradientAlignment(model)
    with engine.capture(norms=True) as captured:
        sum_loss(model(x[:4]), y[:4]).backward()
        sum_loss(model(x[4:]), y[4:]).backward()
    torch.testing.assert_close(captured.norms(), true, rtol=1e-10, atol=0)
    with engine.capture(norms=True) as captured:  # two losses of one pass
        out = model(x)
        (0.25 * sum_loss(out, y)).backward(retain_graph=True)
        (0.75 * sum_loss(out, y)).backward(retain_graph=True)
    torch.testing.assert_close(captured.norms(), true, rtol=1e-10, atol=0)


def test_another_use_after_the_backward_is_refused():
    torch.manual_seed(0)
    body, head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
    model = nn.Sequential(body, head)
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))

    def late():
        with GradientAlignment(model).capture(norms=True):
            out = model(x)
            sum_loss(out, y).backward()
            sum_loss(head(out.detach()[:, :1].expand(-1, 4)), y).backward()

    with pytest.raises(RuntimeError, match=r"norms=True: parameter '1\..*' is used again"):
        late()


def test_norms_of_all_parameters_when_the_reference_names_some():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    g = {"1.bias": torch.ones(3).double()}
    with GradientAlignment(model).capture(norms=True, gradients=g) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true_norms(model, x, y), rtol=1e-10, atol=0)


def test_single_precision_and_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 8, 16, 3, padding=1), nn.Linear(16 * 16, 5))
    x, y = torch.randn(6, 8, 4, 4), torch.randint(5, (6,))
    true = true_norms(model, x, y)
    engine = GradientAlignment(model)
    with engine.capture(norms=True) as captured:
        sum_loss(model(x), y).backward()
    torch.testing.assert_close(captured.norms(), true, rtol=1e-5, atol=0)
    with engine.capture(norms=True) as captured:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum_loss(model(x), y)
        loss.backward()
    torch.testing.assert_close(captured.norms(), true, rtol=2e-2, atol=0)


def test_norms_must_be_asked_for():
    model = nn.Linear(5, 3)
    with GradientAlignment(model).capture() as captured:
        model(torch.randn(2, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="norms=True"):
        captured.norms()


class OneByOne(nn.Module):
    """Layers and products that see one example without the batch's dimension."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.w, self.q = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 8))
        self.bilinear, self.norm = nn.Bilinear(8, 8, 8), nn.LayerNorm(8)
        self.embed, self.conv = nn.Embedding(4, 8), nn.Conv2d(1, 2, 2, padding=1)
        self.up = nn.ConvTranspose1d(2, 2, 2)

    def one(self, x):
        h, w, q = self.a(x), self.w, self.q
        return {
            "linear, twice": lambda: h + self.a(2 * x),
            "bilinear": lambda: self.bilinear(h, h),
            "norm": lambda: self.norm(h),
            "embedding": lambda: h + self.embed((x[0] > 0).long()),
            "conv": lambda: self.conv(h.view(1, 2, 4)).flatten()[:8],
            "transposed conv": lambda: self.up(h.view(2, 4)).flatten()[:8],
            "matmul": lambda: h @ w,
            "mv": lambda: torch.mv(w, h),
            "addmv": lambda: torch.addmv(q[0], w, h),
            "einsum": lambda: torch.einsum("i,io->o", h, w),
            "dot": lambda: h + torch.dot(h, w[0]),
            "outer": lambda: torch.outer(q[:, 0], h).sum(0),
            "stack": lambda: torch.stack([h, w[0]]).sum(0),
            "cat": lambda: torch.cat([h[:4], w[0, :4]]),
            "numbers": lambda: h * w[0, 0] + x.sum() * w[0, 1],
            "attention": lambda: F.scaled_dot_product_attention(
                q, h * x[:3, None], h * x[:3, None]
            ).mean(0),
        }[self.how]()

    def forward(self, x):
        return torch.stack([self.b(self.one(one)) for one in x])


@pytest.mark.parametrize(
    "how",
    [
        "linear, twice", "bilinear", "norm", "embedding", "conv", "transposed conv", "matmul", "mv",
        "addmv", "einsum", "dot", "outer", "stack", "cat", "numbers", "attention",
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [False, True], ids=["reference after", "reference first"])
def test_a_batch_of_one_may_lack_its_dimension(how, first):
    torch.manual_seed(0)
    model = OneByOne(how).double()
    engine = GradientAlignment(model)
    g = random_direction(model)
    for _ in range(3):
        x, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
        with engine.capture(gradients=g if first else None, norms=True) as captured:
            sum_loss(model(x), y).backward()
        found = captured.align() if first else captured.align(g)
        torch.testing.assert_close(found, per_example(model, x, y, g), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(captured.norms(), true_norms(model, x, y))
    with pytest.raises(RuntimeError, match="could not be told apart"), engine.capture():
        sum_loss(model(torch.randn(3, 6).double()), torch.tensor([0, 1, 2])).backward()
