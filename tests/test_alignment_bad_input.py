"""Every mistake is named before anything changes, and the engine works afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import capture, per_example, random_direction, relative_error, sum_loss
from torch import Tensor, nn

from ola_augment.alignment import GradientAlignment

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0])


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def works(engine: GradientAlignment, model: nn.Module) -> bool:
    g = random_direction(model)
    capture(engine, model, X, Y)
    return relative_error(engine.align(g), per_example(model, X, Y, g)) < 1e-10


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


class Hidden(nn.Module):
    """Reads its weight through a custom function, and perhaps visibly too."""

    def __init__(self, visibly: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.a = nn.Linear(4, 4).double()
        self.visibly = visibly

    def forward(self, x: Tensor) -> Tensor:
        return self.a(Doubling.apply(x, self.w) + (x * self.w if self.visibly else 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.Flatten, "no parameters"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.Sequential(nn.LSTM(2, 2)), r"layer '0' \(LSTM\)"),
        (lambda: nn.Sequential(nn.GRUCell(2, 2)), r"layer '0' \(GRUCell\)"),
        (lambda: nn.Sequential(nn.EmbeddingBag(3, 2)), r"layer '0' \(EmbeddingBag\)"),
        (lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), r"layer '0' \(Embedding\)"),
        (lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)), r"layer '0' \(Embedding\)"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), r"layer '0' \(LazyLinear\).*initialised"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "DistributedDataParallel"),
    ],
)
def test_models_refused_at_construction(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientAlignment(make())


def test_frozen_layers_are_not_refused() -> None:
    GradientAlignment(nn.ModuleList([nn.LSTM(2, 2).requires_grad_(False), nn.Linear(2, 2)]))


def test_arguments_refused_at_construction() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        GradientAlignment(linear)
    with pytest.raises(ValueError, match=r"reduction must be one of sum, mean, got 'none'"):
        GradientAlignment(linear(), reduction="none")
    with pytest.raises(ValueError, match=r"storage must be one of .*, got 'float8'"):
        GradientAlignment(linear(), storage="float8")


@pytest.mark.parametrize("visibly", [False, True])
def test_a_use_that_cannot_be_seen_is_an_error(visibly: bool) -> None:
    model = Hidden(visibly)
    engine = GradientAlignment(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter 'w' received a gradient"):
            capture(engine, model, X, Y)
    with pytest.raises(RuntimeError, match="nothing to align"):
        engine.align()


def test_order_of_calls() -> None:
    model = linear()
    engine = GradientAlignment(model)
    with pytest.raises(RuntimeError, match="nothing to align"):
        engine.align()
    with pytest.raises(RuntimeError, match="the model was not called"), engine.capture():
        pass
    with pytest.raises(RuntimeError, match="no gradient reached"), engine.capture():
        model(X)
    unrelated = torch.ones(2, requires_grad=True).sum()
    with pytest.raises(RuntimeError, match="no gradient reached"):
        capture(engine, model, X, Y, lambda outputs, targets: unrelated)
    with pytest.raises(RuntimeError, match="inside capture"), engine.capture(), engine.capture():
        pass
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"), engine.capture():
        pass
    capture(engine, model, X, Y)
    with pytest.raises(RuntimeError, match="no reference gradient since the capture"):
        engine.align()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"all parameters' \.grad are None"):
        engine.align()
    sum_loss(model(X), Y).backward()
    assert engine.align().shape == (5,)
    with pytest.raises(RuntimeError, match="nothing to align"):
        engine.align()
    assert works(engine, model)


@pytest.mark.parametrize("zero", ["none", "zeros"])
def test_a_forgotten_zero_grad_is_refused(zero: str) -> None:
    model = linear()
    engine = GradientAlignment(model)
    capture(engine, model, X, Y)
    sum_loss(model(X), Y).backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"still hold .* Call optimizer.zero_grad\(\)"):
            engine.align()
    model.zero_grad(set_to_none=zero == "none")
    for _ in range(2):  # the reference gradient itself may be that of several batches
        sum_loss(model(X), Y).backward()
    g = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert relative_error(engine.align(), per_example(model, X, Y, g)) < 1e-10


def test_several_captures_wait_at_once() -> None:
    model = linear()
    g = random_direction(model)
    engine = GradientAlignment(model)
    with engine.capture() as first:
        sum_loss(model(X), Y).backward()
    with engine.capture() as second:  # the second half of an accumulated batch
        sum_loss(model(X[:2]), Y[:2]).backward()
    model.zero_grad()
    for _ in range(2):
        sum_loss(model(X), Y).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert relative_error(first.align(), per_example(model, X, Y, expected)) < 1e-10
    assert relative_error(second.align(g), per_example(model, X[:2], Y[:2], g)) < 1e-10
    assert relative_error(first.align(g), per_example(model, X, Y, g)) < 1e-10  # a value


def test_an_incomplete_capture_says_so() -> None:
    model = linear()
    engine = GradientAlignment(model)
    with pytest.raises(ZeroDivisionError), engine.capture() as captured:
        (sum_loss(model(X), Y) / (1 // 0)).backward()
    with pytest.raises(RuntimeError, match="nothing to align"):
        captured.align()


def test_an_error_inside_a_capture_leaves_nothing_behind() -> None:
    model = linear()
    engine = GradientAlignment(model)
    with pytest.raises(ZeroDivisionError), engine.capture():
        (sum_loss(model(X), Y) / (1 // 0)).backward()
    with pytest.raises(RuntimeError, match="nothing to align"):
        engine.align()
    assert not model._forward_pre_hooks
    assert works(engine, model)


def test_calls_that_are_not_the_models_in_this_thread_are_refused_with_a_way_out() -> None:
    model = nn.Sequential(linear())
    engine = GradientAlignment(model)
    with pytest.raises(RuntimeError, match="call it itself, not its parts"), engine.capture():
        sum_loss(model[0](X), Y).backward()
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match=r"in another thread than capture\(\)"),
        engine.capture(),
    ):
        sum_loss(pool.submit(model, X).result(), Y).backward()
    assert works(engine, model)


class Leaving(nn.Linear):
    """Its data goes through numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(x.numpy()))


def test_data_that_leaves_torch_is_named_as_a_cause() -> None:
    model = Leaving(4, 4).double()
    with pytest.raises(RuntimeError, match=r"left torch by numpy\(\)"):
        capture(GradientAlignment(model), model, X, Y)


def test_inputs_without_a_batch() -> None:
    model = linear()
    engine = GradientAlignment(model)
    with pytest.raises(ValueError, match=r"the batch is empty: an input has shape \(0, 4\)"):
        capture(engine, model, X[:0], Y[:0])
    assert works(engine, model)


def test_loss_scale() -> None:
    engine = GradientAlignment(linear())
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="loss_scale"), engine.capture(loss_scale=scale):
            pass


def test_declared_reduction_against_the_loss() -> None:
    model = linear()
    engine = GradientAlignment(model, reduction="mean")
    with pytest.raises(RuntimeError, match='reduction="mean" was declared'):
        capture(engine, model, X, Y, sum_loss)
    capture(engine, model, X, Y, F.cross_entropy)


def test_reference_gradients_given_by_name() -> None:
    model = linear()
    engine = GradientAlignment(model)
    capture(engine, model, X, Y)
    with pytest.raises(TypeError, match="gradients must be a mapping"):
        engine.align([torch.zeros(4)])
    with pytest.raises(TypeError, match=r"gradients\['0.bias'\] must be a tensor, got float"):
        engine.align({"0.bias": 1.0})
    with pytest.raises(ValueError, match="names 'bias', which is no trainable parameter"):
        engine.align({"bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"must have shape \(6,\) on cpu, got \(4,\)"):
        engine.align({"0.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="on meta"):
        engine.align({"0.bias": torch.zeros(6, device="meta")})
    with pytest.raises(ValueError, match="gradients is empty"):
        engine.align({})
    assert engine.align(random_direction(model)).shape == (5,)  # still captured


@pytest.mark.parametrize("change", ["replace", "add", "freeze"])
def test_a_model_that_changes_between_capture_and_align(change: str) -> None:
    model = linear()
    engine = GradientAlignment(model)
    capture(engine, model, X, Y)
    if change == "replace":
        model[0].bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    elif change == "add":
        model.append(nn.Linear(4, 4).double())
    else:
        model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the model changed between capture and align"):
        engine.align(random_direction(model))
    engine.close()
    assert works(engine, model)


def test_second_order_and_partial_backward_are_refused() -> None:
    model = linear()
    engine = GradientAlignment(model)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"), engine.capture():
        sum_loss(model(x), Y).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True"), engine.capture():
        torch.autograd.grad(sum_loss(model(x), Y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward\(inputs="), engine.capture():
        sum_loss(model(x), Y).backward(inputs=[x])
    model.zero_grad()
    assert works(engine, model)


def test_a_penalty_inside_the_captured_loss_belongs_to_no_example() -> None:
    model = linear()
    engine = GradientAlignment(model)

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return sum_loss(outputs, targets) + penalty

    with pytest.raises(RuntimeError, match="belongs to no example"):
        capture(engine, model, X, Y, penalised)
    model.zero_grad()
    assert works(engine, model)


def test_an_input_overwritten_after_the_capture() -> None:
    model = linear()
    x = X.clone()
    engine = GradientAlignment(model, storage="exact")
    capture(engine, model, x, Y)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place between capture and align"):
        engine.align(random_direction(model))
