"""Set-ups that were wrong, crashed, or were refused without need."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from alignment_oracles import per_example, random_direction
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ola_augment import GradientAlignment
from ola_augment.alignment.proof import examination


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """(B, ..., 4) -> (B, 3), with something between two linear layers."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.w, self.gain = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.zeros(()))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.middle(self, self.first(x)))
        return h if h.dim() == 2 else h.mean(1)


def check(model: nn.Module, *shape: int, captures: int = 3, **settings: Any) -> GradientAlignment:
    engine = GradientAlignment(model.double(), storage="exact", **settings)
    for _ in range(captures):
        x = torch.randn(*shape, dtype=torch.float64)
        y, g = torch.randint(3, shape[:1]), random_direction(model)
        state = torch.get_rng_state()
        with engine.capture() as captured:
            F.cross_entropy(model(x), y, reduction="sum").backward()
        model.zero_grad()
        torch.set_rng_state(state)
        torch.testing.assert_close(captured.align(g), per_example(model, x, y, g))
    return engine


def recomputed(model: Any, h: Tensor, hook: bool = False) -> Tensor:
    def policy(context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
        saved = op == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    h = checkpoint(lambda z: (z @ model.w).tanh(), h, use_reentrant=False, context_fn=contexts)
    if h.requires_grad and hook:
        h.register_hook(lambda gradient: gradient * 1)
    return h


@pytest.mark.parametrize(
    "middle",
    {
        "zero-gain-in-place": lambda m, h: (h.relu() @ m.w).mul_(m.gain) + h,
        "grad-inside": lambda m, h: h + torch.func.grad(lambda z: z.sin().sum())(h),
        "grad-of-detached": lambda m, h: h + torch.func.grad(lambda z: z.sin().sum())(h.detach()),
        "vmap-inside": lambda m, h: torch.vmap(lambda z: z.sin() * z.sum())(h) @ m.w,
        "jvp-inside": lambda m, h: torch.func.jvp(torch.sin, (h,), (torch.ones_like(h),))[1],
        "selective-checkpointing": recomputed,
    }.items(),
    ids=lambda one: one[0],
)
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_exact(middle: tuple[str, Callable[..., Tensor]]) -> None:
    check(Net(middle[1]), 6, 4)


def test_hooks_beside_selective_checkpointing_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="selective checkpointing cannot be verified"):
        check(Net(functools.partial(recomputed, hook=True)), 6, 4)


def test_a_parameter_inside_a_transform_is_refused_by_name() -> None:
    model = Net(lambda m, h: torch.vmap(lambda z: m.w @ z)(h))
    with pytest.raises(RuntimeError, match=r"parameter 'w' inside a torch\.func transform"):
        check(model, 6, 4)


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(1, 18, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(1, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.deform(x, self.offset(x)).mean((2, 3)))


def test_fallback_without_a_double_backward() -> None:
    check(Deformed(), 3, 1, 4, 4, captures=1, fallback=True)


def test_an_exported_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16),
        nn.Linear(16, 3),
    ).double().eval()  # fmt: skip
    x, y = torch.randn(6, 1, 4, 4).double(), torch.randint(3, (6,))
    exported = torch.export.export(model, (x,)).module()
    engine = GradientAlignment(exported)
    g = random_direction(model)
    with engine.capture() as captured:
        F.cross_entropy(exported(x), y, reduction="sum").backward()
    torch.testing.assert_close(captured.align(g), per_example(model, x, y, g))


class Counting(nn.Module):
    """Another path in every fifth pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.passes = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            self.seen += 1
        h = self.first(x)
        if self.passes % 5 == 4 or int(self.seen) % 7 == 6:
            h = self.extra(h).relu()
        return self.last(h)


def test_paths_that_depend_on_a_counter_are_verified_when_they_are_taken() -> None:
    model = Counting()
    engine = GradientAlignment(model)
    g = random_direction(model)
    for number in range(1, 16):
        with engine.capture() as captured:
            F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
        expected = sum(
            (p.grad * g[n]).sum() for n, p in model.named_parameters() if p.grad is not None
        )
        torch.testing.assert_close(captured.align(g).sum(), expected)
        model.zero_grad()
        assert model.passes == int(model.seen) == number


def gathered(model: Any, h: Tensor) -> Tensor:
    kept = torch.rand(h.shape[:2]).argsort(1)[:, :3]
    return torch.gather(h, 1, kept.unsqueeze(-1).expand(-1, -1, 8)) @ model.w


def dropped(model: Any, h: Tensor) -> Tensor:
    kept = torch.rand(h.shape[:2]).argsort(1)[:, :3]
    return h[torch.arange(len(h)).unsqueeze(-1), kept] @ model.w


def flattened(model: Any, h: Tensor) -> Tensor:
    kept = torch.rand(h.shape[:2]).argsort(1)[:, :3] + 5 * torch.arange(len(h)).unsqueeze(1)
    return h.flatten(0, 1)[kept.flatten()].view(len(h), 3, 8) @ model.w


def strongest(model: Any, h: Tensor) -> Tensor:
    index = h.norm(dim=2).topk(3, 1).indices
    return torch.take_along_dim(h, index.unsqueeze(-1), 1) @ model.w


def cropped(model: Any, h: Tensor) -> Tensor:
    if len(h) > 1:  # the oracle takes the examples one by one
        model.start = int(torch.randint(3, ()))
    return h[:, model.start : model.start + 3].narrow(1, model.start % 2, 2) @ model.w


def quantised(model: Any, h: Tensor) -> Tensor:
    return h + model.w[torch.cdist(h, model.w.detach().expand(len(h), -1, -1)).argmin(2)]


@pytest.mark.parametrize("middle", [gathered, dropped, flattened, strongest, cropped, quantised])
def test_verification_settles(
    middle: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    verify = examination.verify
    monkeypatch.setattr(examination, "verify", lambda *args: (times.append(1), verify(*args))[1])
    check(Net(middle), 6, 5, 4, captures=9)
    assert len(times) <= 3


def test_a_copy_made_inside_a_capture_is_none_of_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with GradientAlignment(model).capture() as captured:
        average = torch.optim.swa_utils.AveragedModel(model)
        model(torch.randn(5, 4)).sum().backward()
    copied = average.module
    assert not copied._forward_hooks
    assert not copied._forward_pre_hooks
    assert "__deepcopy__" not in {**vars(copied), **vars(model)}
    copied(torch.randn(2, 4)).sum().backward()
    assert captured.align(random_direction(model)).shape == (5,)


def test_two_engines_at_once() -> None:
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    first, second = GradientAlignment(generator), GradientAlignment(critic)
    for _ in range(3):
        with first.capture() as one, second.capture() as two:
            critic(generator(torch.randn(6, 4).double())).square().sum().backward()
        for model, captured in ((generator, one), (critic, two)):
            g = {n: p.grad.clone() for n, p in model.named_parameters()}
            model.zero_grad()
            square = sum(value.square().sum() for value in g.values())
            torch.testing.assert_close(captured.align(g).sum(), square)


def test_an_optimizer_that_steps_inside_the_capture() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    engine = GradientAlignment(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3)
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    g, expected = random_direction(model), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
        expected.append(sum((p.grad * g[n]).sum() for n, p in model.named_parameters()))
        return loss

    with engine.capture() as captured:
        optimizer.step(closure)
    assert len(expected) > 1
    torch.testing.assert_close(captured.align(g).view(-1, 6).sum(1), torch.stack(expected))


def test_gradients_by_autograd_grad() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y, g = torch.randn(6, 4).double(), torch.randint(3, (6,)), random_direction(model)
    with GradientAlignment(model).capture() as captured:
        loss = F.cross_entropy(model(x), y, reduction="sum")
        torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(captured.align(g), per_example(model, x, y, g))


def networks() -> Iterator[nn.Module]:
    yield nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    yield nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        weight_norm(nn.Linear(16, 3)),
    )
    yield nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))


@pytest.mark.parametrize("storage", ["exact", "bfloat16"])
@pytest.mark.parametrize("references", [1, 2, 5])
def test_a_stack_of_references(references: int, storage: str) -> None:
    for model in networks():
        model.double()
        stack = [random_direction(model, seed) for seed in range(references)]
        with GradientAlignment(model, storage=storage).capture() as captured:
            x = torch.randn(6, 1, 4, 4).double()
            F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        together = captured.align({n: torch.stack([g[n] for g in stack]) for n in stack[0]})
        one_by_one = torch.stack([captured.align(g) for g in stack])
        torch.testing.assert_close(together, one_by_one)


def test_a_stack_is_checked() -> None:
    model = nn.Linear(4, 3)
    with GradientAlignment(model).capture() as captured:
        model(torch.randn(5, 4)).sum().backward()
    for stack in (
        {"weight": torch.ones(2, 3, 4), "bias": torch.ones(3)},
        {"weight": torch.ones(2, 3, 4), "bias": torch.ones(3, 3)},
        {"weight": torch.ones(0, 3, 4)},
    ):
        with pytest.raises(ValueError, match="the same number R > 0"):
            captured.align(stack)


def test_norms_of_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), weight_norm(nn.Linear(8, 3))).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    names = ["0.weight", "2.parametrizations.weight.original0"]
    engine = GradientAlignment(model)
    with engine.capture(norms=names) as captured:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    parameters = dict(model.named_parameters())
    true = [
        sum(
            one.square().sum()
            for one in torch.autograd.grad(
                F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), [parameters[n] for n in names]
            )
        ).sqrt()
        for i in range(5)
    ]
    torch.testing.assert_close(captured.norms(), torch.stack(true))
    with pytest.raises(ValueError, match="norms names 'other'"), engine.capture(norms=["other"]):
        pass


def test_a_frozen_tensor_parallel_body_goes_before_the_engines_part() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)).double()
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        body = parallelize_module(body, init_device_mesh("cpu", (1,)), plan)
        model = nn.Sequential(body, nn.Linear(6, 3).double())
        with pytest.raises(ValueError, match=r"^parameter '0\.0\.weight' is sharded"):
            GradientAlignment(model)
        body.requires_grad_(False)
        with pytest.raises(ValueError, match="give the engine the plain part of the model alone"):
            GradientAlignment(model)
        head = model[1]
        engine, g = GradientAlignment(head), random_direction(head)
        for _ in range(2):
            x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
            with engine.capture() as captured:
                F.cross_entropy(model(x), y, reduction="sum").backward()
            torch.testing.assert_close(captured.align(g), per_example(head, body(x), y, g))
    finally:
        dist.destroy_process_group()


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.last = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, t: Tensor, x: Any) -> Tensor:
        return self.last(x * self.time(t.unsqueeze(-1)))


class Weighted(nn.Module):
    """A learned weight of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.s = nn.Linear(6, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def test_numbers_that_are_no_example_s_and_the_ways_out() -> None:
    model = Weighted().double()
    x, y, g = torch.randn(5, 6).double(), torch.randint(3, (5,)), random_direction(model)
    engine = GradientAlignment(model, reduction="mean")

    def penalty() -> Tensor:
        return 0.1 * sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]

    def own() -> Tensor:
        return torch.exp(-model.s) * F.cross_entropy(model(x), y, reduction="none") + model.s

    for loss in (
        lambda: F.cross_entropy(model(x), y) + penalty(),
        lambda: torch.exp(-model.s) * F.cross_entropy(model(x), y) + model.s,
    ):
        with pytest.raises(RuntimeError, match="belongs to no example"), engine.capture():
            loss().backward()
    model.zero_grad()
    with engine.capture() as captured:
        own().mean().backward()
    penalty().backward()
    found = captured.align(g)
    for row, alone in zip(own(), found, strict=True):
        grads = torch.autograd.grad(row, list(model.parameters()), retain_graph=True)
        named = zip(model.named_parameters(), grads, strict=True)
        torch.testing.assert_close(alone, sum((d * g[n]).sum() for (n, _), d in named))


class Listed(nn.Module):
    """Takes a list: of examples, or of inputs of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, images: Any) -> Tensor:
        return self.last(torch.stack(list(images))).sum(-2)


class Masked(nn.Module):
    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = self.mask if mask is None else mask
        return self.last(torch.einsum("st,btd->bsd", mask, self.mix(x))).mean(1)


def test_a_mask_with_as_many_rows_as_examples_is_to_be_a_buffer() -> None:
    x, y, mask = torch.randn(4, 4, 6), torch.randint(3, (4,)), torch.ones(4, 4).tril()
    model = Masked()
    engine = GradientAlignment(model)
    with pytest.raises(RuntimeError, match="happens to have as many a buffer"), engine.capture():
        F.cross_entropy(model(x, mask), y, reduction="sum").backward()
    advised = Masked(mask).double()
    g = random_direction(advised)
    with GradientAlignment(advised).capture() as captured:
        F.cross_entropy(advised(x.double()), y, reduction="sum").backward()
    torch.testing.assert_close(captured.align(g), per_example(advised, x.double(), y, g))


def test_what_is_no_batch_is_refused_by_name() -> None:
    model = Timed()
    engine = GradientAlignment(model)
    with pytest.raises(ValueError, match="5 came out: give the batch first"), engine.capture():
        model(t=torch.tensor([2.0]), x=torch.randn(5, 4)).sum().backward()
    listed = Listed()
    engine = GradientAlignment(listed)
    for images in ([torch.randn(1, 6)] * 4, tuple(torch.randn(4, 1, 6))):
        with pytest.raises(ValueError, match=r"a list of 4 .* torch.stack\(images\)"):  # noqa: SIM117
            with engine.capture():
                listed(images).sum().backward()
    x, g = torch.randn(4, 1, 6), random_direction(listed)
    with engine.capture() as captured:
        listed([x, x]).sum().backward()
    assert captured.align(g).shape == (4,)
    linear = nn.Linear(4, 3)
    engine = GradientAlignment(linear)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    for x, kind in ((nested, "nested"), (torch.eye(4).to_sparse(), "sparse")):
        with pytest.raises(ValueError, match=f"is a {kind} tensor"), engine.capture():
            linear(x)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_embeddings_under_backpack() -> None:
    backpack = pytest.importorskip("backpack")
    from ola_augment.alignment import BackPACKAlignment

    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
    x, y, g = torch.randint(7, (5, 2)), torch.randint(3, (5,)), random_direction(model)
    true = per_example(copy.deepcopy(model), x, y, g)
    extension = BackPACKAlignment(backpack.extend(model), storage="exact")
    with extension.capture():
        F.cross_entropy(model(x), y, reduction="sum").backward()
    torch.testing.assert_close(extension.align(g), true)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_other_libraries_hooks_in_the_same_backward_are_refused_by_name() -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad

    model = backpack.extend(nn.Sequential(nn.Linear(4, 3)))
    engine = GradientAlignment(model)
    x = torch.randn(5, 4)
    for _ in range(2):
        with (
            pytest.raises(RuntimeError, match="BackPACK's extensions inside capture"),
            engine.capture(),
            backpack.backpack(BatchGrad()),
        ):
            model(x).sum().backward()
    with engine.capture() as captured:  # left whole
        model(x).sum().backward()
    assert captured.align(random_direction(model)).shape == (5,)


def rounded(h: Tensor) -> Tensor:
    """Zeros, with the gradient of h."""
    return (h.mul(1e-6).round() - h).detach() + h


@pytest.mark.parametrize(
    "middle",
    {
        "dead-units": lambda m, h: (h - 100).relu() @ m.w,
        "rounded-to-the-same": lambda m, h: rounded(h) @ m.w,
        "the-same-choice": lambda m, h: (
            F.gumbel_softmax(h + torch.eye(8)[2] * 1e3, hard=True) @ m.w
        ),
    }.items(),
    ids=lambda one: one[0],
)
def test_values_that_are_alike_for_all_examples(middle: tuple[str, Any]) -> None:
    check(Net(middle[1]), 6, 4)
    check(Net(middle[1]), 9, 4)


def test_values_that_are_alike_hide_no_mixing() -> None:
    with pytest.raises(RuntimeError, match="on values that are alike for all examples"):
        check(Net(lambda m, h: rounded(h.flip(0)) @ m.w), 6, 4)


class Cells(nn.Module):
    """A cell's two outputs, one of which is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTMCell(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[:, 0])
        return self.last(self.cell(x[:, 1], state)[0] + state[1])


def test_outputs_that_are_computed_from_each_other() -> None:
    check(Cells(), 5, 2, 4, fallback=True)


class Recurrent(nn.Module):
    """A fused function that draws: dropout between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 5, 2, batch_first=True, dropout=0.4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


def test_a_function_without_a_rule_draws_the_same_again() -> None:
    model = Recurrent().double()
    engine = GradientAlignment(model, fallback=True)
    for _ in range(3):
        x, g = torch.randn(5, 3, 4, dtype=torch.float64), random_direction(model)
        y = torch.randint(3, (5,))
        state = torch.get_rng_state()
        losses = F.cross_entropy(model(x), y, reduction="none")
        gradients = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in losses
        ]
        expected = [
            sum((d * h).sum() for d, h in zip(own, g.values(), strict=True)) for own in gradients
        ]
        squares = [sum(d.square().sum() for d in own) for own in gradients]
        torch.set_rng_state(state)
        with engine.capture(norms=True) as captured:
            F.cross_entropy(model(x), y, reduction="sum").backward()
        after = torch.get_rng_state()
        torch.testing.assert_close(captured.align(g), torch.stack(expected))
        torch.testing.assert_close(captured.norms(), torch.stack(squares).sqrt())
        assert torch.equal(torch.get_rng_state(), after)


class Small(nn.Module):
    """Memory for three examples at once; fails before or behind its parameters."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.linear, self.late = nn.Linear(4, 3), late

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3 and not self.late:
            raise torch.OutOfMemoryError("out of memory")
        h = self.linear(x).tanh()
        if len(x) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return h


@pytest.mark.parametrize("late", [False, True])
def test_a_forward_pass_that_failed_is_none_of_the_capture(late: bool) -> None:
    model = Small(late).double()
    engine = GradientAlignment(model)
    for _ in range(4):
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
        g = random_direction(model)
        with engine.capture() as captured:
            with pytest.raises(torch.OutOfMemoryError):
                model(x)
            for rows, targets in zip(x.split(3), y.split(3), strict=True):
                F.cross_entropy(model(rows), targets, reduction="sum").backward()
        assert captured.passes == (3, 2)
        torch.testing.assert_close(captured.align(g), per_example(model, x, y, g))
    assert not model._forward_hooks


def test_units_that_are_all_dead_are_named_as_the_cause() -> None:
    """Nothing tells the examples apart behind a frozen body, not even derivatives."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(requires_grad=False).bias.fill_(-100.0)
    engine = GradientAlignment(model)
    with (
        pytest.raises(RuntimeError, match=r"'2.bias' and 1 others .* units before it are dead"),
        engine.capture(),
    ):
        model(torch.randn(6, 4)).square().sum().backward()
    model[0].bias.zero_()
    with engine.capture() as captured:
        model(torch.randn(6, 4)).square().sum().backward()
    assert captured.align(engine.gradients()).shape == (6,)
