"""The engine inside training loops as people write them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import capture, per_example, random_direction, relative_error, sum_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ola_augment.alignment import GradientAlignment
from ola_augment.alignment.method.uses import roundings_of
from ola_augment.alignment.proof.sums import SumCheck

DOUBLE = torch.float64


def small_network(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 9, 4),
    ).to(dtype)


def batch(size: int = 6, seed: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 8, 8, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.randint(0, 4, (size,), generator=generator)


def test_reference_gradient_of_the_next_step_at_moved_parameters() -> None:
    model = small_network()
    before = small_network()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    )
    engine = GradientAlignment(model, reduction="mean")
    capture(engine, model, *batch(), F.cross_entropy)
    optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(batch(seed=1)[0]), batch(seed=1)[1]).backward()
    g = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()  # weight decay and momentum stay outside of .grad
    # l_i is differentiated at theta_t, not at the parameters of today
    assert relative_error(engine.align(), per_example(before, *batch(), g)) < 1e-10


def test_micro_batches_of_unequal_sizes_follow_each_other() -> None:
    model = small_network()
    g = random_direction(model)
    engine = GradientAlignment(model)
    parts = [batch(4, 0), batch(4, 1), batch(1, 2)]
    with engine.capture():
        for x, y in parts:
            sum_loss(model(x), y).backward()
    expected = torch.cat([per_example(model, x, y, g) for x, y in parts])
    assert relative_error(engine.align(g), expected) < 1e-10


def test_forward_passes_before_their_backward_passes() -> None:
    model = small_network()
    g = random_direction(model)
    engine = GradientAlignment(model)
    parts = [batch(4, 0), batch(3, 1)]
    with engine.capture():
        losses = [sum_loss(model(x), y) for x, y in parts]
        for loss in reversed(losses):
            loss.backward()
    expected = torch.cat([per_example(model, x, y, g) for x, y in parts])
    assert relative_error(engine.align(g), expected) < 1e-10


def test_two_backward_passes_through_one_graph_add_up() -> None:
    model = small_network()
    g = random_direction(model)
    x, y = batch()
    engine = GradientAlignment(model)
    with engine.capture():
        loss = sum_loss(model(x), y)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    assert relative_error(engine.align(g), 3 * per_example(model, x, y, g)) < 1e-10


class Shift(nn.Module):
    """Autograd keeps nothing for a sum, and could go backward through it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_a_freed_graph_cannot_be_used_again() -> None:
    model = Shift()
    engine = GradientAlignment(model)
    x = torch.randn(3, 4, dtype=DOUBLE)

    def align(retain_graph: bool) -> Tensor:
        with engine.capture():
            outputs = model(x)
            outputs.sum().backward(retain_graph=retain_graph)
            outputs.square().sum().backward()
        return engine.align({"shift": torch.ones(4, dtype=DOUBLE)})

    with pytest.raises(RuntimeError, match="retain_graph=True"):
        align(retain_graph=False)
    assert torch.allclose(align(retain_graph=True), (1 + 2 * (x + 1)).sum(1))


def test_rounded_activations_are_freed_during_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ola_augment.alignment.method.storage._ROUNDED_FROM", 0)
    model = small_network(torch.float32)
    seen: list[weakref.ref] = []
    alive: list[int] = []
    last = list(model)[-1]
    last.register_forward_hook(
        lambda module, inputs, output: seen.append(weakref.ref(inputs[0].untyped_storage()))
    )
    next(iter(model)).weight.register_hook(  # reached when all later layers are done
        lambda gradient: alive.append(sum(ref() is not None for ref in seen))
    )
    engine = GradientAlignment(model)
    capture(engine, model, *batch(dtype=torch.float32))
    assert alive == [0]


def test_soft_targets_and_label_smoothing() -> None:
    model = small_network()
    g = random_direction(model)
    x, y = batch()
    soft = 0.3 * F.one_hot(y, 4).double() + 0.7 * F.one_hot(y.flip(0), 4).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=0.1, reduction="none").sum()

    engine = GradientAlignment(model)
    capture(engine, model, x, soft, loss)
    alignments = engine.align(g)
    rows = []
    for i in range(len(x)):
        d = torch.autograd.grad(loss(model(x[i : i + 1]), soft[i : i + 1]), model.parameters())
        rows.append(sum((a * b).sum() for a, b in zip(d, g.values(), strict=True)))
    assert relative_error(alignments, torch.stack(rows)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_loss_scale(dtype: torch.dtype) -> None:
    model = small_network(torch.float32)
    x, y = batch(dtype=torch.float32)
    g = random_direction(model)
    engine = GradientAlignment(model)
    for _ in range(2):
        model.zero_grad()
        with engine.capture(loss_scale=1024.0):
            with torch.autocast("cpu", dtype=dtype):
                loss = sum_loss(model(x), y)
            (loss * 1024).backward()
        assert relative_error(engine.align(g), per_example(model, x, y, g)) < 5e-2


def test_backward_inside_autocast() -> None:
    model = small_network(torch.float32)
    x, y = batch(dtype=torch.float32)
    g = random_direction(model)
    engine = GradientAlignment(model)
    with torch.autocast("cpu"), engine.capture():
        sum_loss(model(x), y).backward()
    with torch.autocast("cpu"):
        alignments = engine.align(g)
    assert alignments.dtype == torch.float32
    assert relative_error(alignments, per_example(model, x, y, g)) < 5e-2


def test_overflow_is_reported_and_forgotten() -> None:
    model = small_network()
    x, y = batch()
    g = random_direction(model)
    engine = GradientAlignment(model)
    with engine.capture():
        (sum_loss(model(x), y) * float("inf")).backward()
    with pytest.raises(RuntimeError, match="6 of 6 alignments are inf or NaN"):
        engine.align(g)
    model.zero_grad()
    capture(engine, model, x, y)
    g["0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"reference gradient of '0.weight' is not finite"):
        engine.align(g)
    capture(engine, model, x, y)
    g = random_direction(model)
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = small_network()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


def test_activation_checkpointing() -> None:
    model = Checkpointed(reentrant=False)
    g = random_direction(model)
    x, y = batch()
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    plain = {name.removeprefix("inner."): value for name, value in g.items()}
    assert relative_error(engine.align(g), per_example(model.inner, x, y, plain)) < 1e-10
    model = Checkpointed(reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        capture(GradientAlignment(model), model, x, y)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_checkpoint_around_the_model_itself(early: bool, differentiable: bool) -> None:
    model = small_network()
    engine = GradientAlignment(model)
    for _ in range(3):
        g = random_direction(model)
        x, y = batch()
        x.requires_grad_(differentiable)
        with set_checkpoint_early_stop(early), engine.capture() as captured:
            sum_loss(checkpoint(model, x, use_reentrant=False), y).backward()
        assert captured.passes == (len(x),)
        assert relative_error(captured.align(g), per_example(model, x, y, g)) < 1e-10
        model.zero_grad()
    with pytest.raises(RuntimeError, match="use_reentrant=False"), engine.capture():
        sum_loss(checkpoint(model, x.requires_grad_(), use_reentrant=True), y).backward()


def test_gradients_of_other_things_inside_a_capture() -> None:
    model = small_network()
    g = random_direction(model)
    x, y = batch()
    engine = GradientAlignment(model)
    with engine.capture():
        probe = x.clone().requires_grad_()
        with torch.no_grad():
            model(x)  # an evaluation pass is none of it
        outputs = model(x)
        loss = sum_loss(outputs, y)
        torch.autograd.grad(loss, outputs, retain_graph=True)
        assert probe.grad is None
        loss.backward()
    assert relative_error(engine.align(g), per_example(model, x, y, g)) < 1e-10


def test_new_batch_sizes_and_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    g = random_direction(model)
    engine = GradientAlignment(model)
    for size in (4, 3, 1, 4):
        model.train(size != 1)
        x, y = torch.randn(size, 4, dtype=DOUBLE), torch.randint(0, 4, (size,))
        model.zero_grad()
        capture(engine, model, x, y)
        expected = sum((p.grad * g[name]).sum() for name, p in model.named_parameters())
        assert torch.allclose(engine.align(g).sum(), expected, rtol=1e-10)


@pytest.mark.parametrize("storage", ["exact", "bfloat16", "int8"])
def test_nothing_accumulates_over_200_steps(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ola_augment.alignment.method.storage._ROUNDED_FROM", 0)
    model = small_network(torch.float32)
    engine = GradientAlignment(model, storage=storage)
    x, y = batch(dtype=torch.float32)
    g = random_direction(model)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(entry), Tensor) for entry in gc.get_objects())

    for step in range(200):
        model.zero_grad()
        capture(engine, model, x, y)
        engine.align(g)
        if step == 2:
            early = alive()
    assert alive() <= early


def test_the_model_is_left_as_it_was_found() -> None:
    model = small_network()
    engine = GradientAlignment(model)
    capture(engine, model, *batch())
    engine.close()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(not p._backward_hooks for p in model.parameters())
    with pytest.raises(RuntimeError, match="nothing to align"):
        engine.align()


def test_gradients_may_be_zeroed_inside_the_capture() -> None:
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    g = random_direction(model)
    results = []
    for inside in (False, True):
        engine = GradientAlignment(model)
        F.cross_entropy(model(x), y).backward()
        if not inside:
            optimizer.zero_grad()
        with engine.capture():
            if inside:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
        results.append(engine.align(g))
        optimizer.zero_grad()
    assert torch.equal(*results)


@pytest.mark.parametrize("side", [224, 300])
def test_large_images_are_not_refused_for_what_torch_rounds(side):
    """A CPU convolution sums up its bias's gradient one by one: off by 1e-3 at this size."""
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )
        engine = GradientAlignment(model, storage="exact")
        images, targets = torch.rand(4, 3, side, side), torch.tensor([0, 1, 2, 0])
        with engine.capture():
            nn.functional.cross_entropy(model(images), targets).backward()
        assert engine.align(engine.gradients()).isfinite().all()


def test_accumulation_over_several_captures_and_plain_micro_batches() -> None:
    """Two micro-batches a step, each loss halved, as Hugging Face's Trainer accumulates them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    engine = GradientAlignment(model, storage="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def halves(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        return list(zip(x.split(4), (torch.arange(8) % 3).split(4), strict=True))

    for pair in range(3):
        optimizer.zero_grad()
        captures, at_capture = [], copy.deepcopy(model)
        for x, y in halves(2 * pair):
            with engine.capture() as captured:
                (F.cross_entropy(model(x), y) / 2).backward()
            captures.append(captured)
        optimizer.step()
        optimizer.zero_grad()
        for x, y in halves(2 * pair + 1):
            (F.cross_entropy(model(x), y) / 2).backward()
        g = [p.grad for p in model.parameters()]
        for captured, (x, y) in zip(captures, halves(2 * pair), strict=True):
            expected = [
                sum((d * own).sum() for d, own in zip(found, g, strict=True))
                for loss in F.cross_entropy(at_capture(x), y, reduction="none") / 8
                for found in [
                    torch.autograd.grad(loss, list(at_capture.parameters()), retain_graph=True)
                ]
            ]
            assert torch.allclose(captured.align(), torch.stack(expected), rtol=1e-10)
        optimizer.step()
    # Without zero_grad between the two, the captured gradients are part of the reference.
    for x, y in halves(9):
        with engine.capture() as captured:
            F.cross_entropy(model(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        captured.align()


@pytest.mark.parametrize(("error", "refused"), [(1.8e-5, False), (1e-3, True)])
def test_sums_of_a_convolution_may_differ_as_they_did_in_training(error, refused):
    """64 digits, 16 x 16 positions: torch's gradient was off by 1.8e-5 of the terms' size."""
    batch, channels, side = 64, 4, 16
    direction = {"w": torch.ones(channels, 1, 3, 3)}
    terms = torch.linspace(-1, 1, batch) + 0.1
    size = float(terms.norm() + terms.sum())
    gradient = torch.zeros(channels, 1, 3, 3)
    gradient[0, 0, 0, 0] = terms.double().sum() + error * size
    check = SumCheck(0.0)
    check.receive("w", gradient)
    delta = torch.empty(batch, channels, side, side)
    check.computed(("w",), torch.float32, roundings_of("conv2d", delta, gradient.shape))
    found = [(frozenset(("w",)), terms)]
    if refused:
        with pytest.raises(RuntimeError, match="'w' received a gradient"):
            check.compare(found, direction)
    else:
        check.compare(found, direction)
