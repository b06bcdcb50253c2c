"""However a call is spelled, the engine sees what it reads and which rows it moves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import per_example, random_direction
from torch import Tensor, nn

from ola_augment import GradientAlignment


class Spelled(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, call) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 6) / 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.first(x).tanh(), self.w))


def aligned(model: nn.Module, x: Tensor, y: Tensor, engine: GradientAlignment | None = None):  # type: ignore[no-untyped-def]
    engine = engine or GradientAlignment(model, storage="exact")
    g = random_direction(model)
    with engine.capture() as captured:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    model.zero_grad()
    return captured.align(g), g


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "call",
    {
        "linear": lambda h, w: F.linear(input=h, weight=w),
        "linear-bias": lambda h, w: F.linear(h, weight=w, bias=w[0]),
        "matmul": lambda h, w: torch.matmul(input=h, other=w),
        "mm": lambda h, w: torch.mm(input=h, mat2=w),
        "addmm": lambda h, w: torch.addmm(input=w[0], mat1=h, mat2=w),
        "baddbmm": lambda h, w: torch.baddbmm(
            input=w[:1], batch1=h.unsqueeze(1), batch2=w.expand(len(h), -1, -1)
        ).squeeze(1),
        "cat": lambda h, w: torch.cat(tensors=(h, w[0].expand_as(h)), dim=1)[:, 3:9],
        "cat-axis": lambda h, w: torch.cat((h, w[0].expand_as(h)), axis=1)[:, 3:9],
        "concatenate-axis": lambda h, w: torch.concatenate((w[0].expand_as(h), h), axis=-1)[:, 3:9],
        "rsub": lambda h, w: torch.rsub(h, w[0], alpha=2) + torch.rsub(w[1], h, alpha=3),
        "add-complex": lambda h, w: torch.add(
            torch.fft.fft(h), torch.complex(w[0], w[1]), alpha=2 + 1j
        ).abs(),
        "stack": lambda h, w: torch.stack(tensors=(h, w[0].expand_as(h)), dim=1).sum(1),
        "add": lambda h, w: torch.add(input=h, other=w[0], alpha=2),
        "sub": lambda h, w: torch.sub(input=w[0], other=h),
        "mul": lambda h, w: torch.mul(input=w[0], other=h),
        "div": lambda h, w: torch.div(input=h, other=w[0].exp()),
        "where": lambda h, w: torch.where(condition=h > 0, input=h, other=w[0]),
        "lerp": lambda h, w: torch.lerp(input=h, end=w[0], weight=0.3),
        "maximum": lambda h, w: torch.maximum(input=h, other=w[0]),
        "addcmul": lambda h, w: torch.addcmul(input=h, tensor1=h, tensor2=w[0], value=2),
        "einsum": lambda h, w: torch.einsum("bi,oi->bo", h, w),
        "prelu": lambda h, w: F.prelu(input=h, weight=w[0]),
        "layer_norm": lambda h, w: F.layer_norm(input=h, normalized_shape=(6,), weight=w[0]),
        "group_norm": lambda h, w: F.group_norm(input=h, num_groups=2, weight=w[0], bias=w[1]),
        "conv1d": lambda h, w: F.conv1d(
            input=h.unsqueeze(1), weight=w[:2, :3].unsqueeze(1), padding=1
        ).sum(1),
        "bilinear": lambda h, w: F.bilinear(input1=h, input2=h, weight=w.expand(6, 6, 6) * 1),
        "method": lambda h, w: h.matmul(other=w),
        "method-add": lambda h, w: h.add(other=w[0]),
        "method-addmm": lambda h, w: w[0].addmm(mat1=h, mat2=w),
        "attention": lambda h, w: F.scaled_dot_product_attention(
            query=h.view(-1, 3, 2), key=h.view(-1, 3, 2), value=h.view(-1, 3, 2),
            attn_mask=w[:3, :3],
        ).flatten(1),
        "aten-layer_norm": lambda h, w: torch.layer_norm(h, (6,), w[0], w[1]),
        "aten-rms_norm": lambda h, w: torch.rms_norm(h, (6,), w[0]),
        "aten-group_norm": lambda h, w: torch.group_norm(h, 2, w[0], w[1]),
        "aten-batch_norm": lambda h, w: torch.batch_norm(
            h, w[0], w[1], torch.zeros(6), torch.ones(6), False, 0.1, 1e-5, False
        ),
        "aten-instance_norm": lambda h, w: torch.instance_norm(
            h.view(-1, 2, 3), w[0, :2], w[1, :2], None, None, True, 0.1, 1e-5, False
        ).flatten(1),
        "aten-embedding": lambda h, w: h + torch.embedding(w, h.argmax(1)),
        "op-linear": lambda h, w: torch.ops.aten.linear(h, w),
        "op-linear-default": lambda h, w: torch.ops.aten.linear.default(h, w, w[0]),
        "op-mul": lambda h, w: torch.ops.aten.mul.Tensor(h, w[0]),
        "op-addmm": lambda h, w: torch.ops.aten.addmm.default(w[0], h, w),
        "op-layer_norm": lambda h, w: torch.ops.aten.layer_norm.default(h, [6], w[0], w[1]),
        "detached": lambda h, w: h @ w * F.normalize(w.detach(), dim=0)[0] * w.data.norm(),
        "detached-einsum": lambda h, w: h @ w + torch.einsum("ij->i", w.detach()),
    }.items(),
    ids=lambda one: one[0],
)  # fmt: skip
def test_any_spelling(call) -> None:  # type: ignore[no-untyped-def]
    model = Spelled(call[1]).double() if not call[0].startswith("aten-batch") else Spelled(call[1])
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(5, 4, dtype=dtype), torch.randint(3, (5,))
    alignments, g = aligned(model, x, y)
    torch.testing.assert_close(alignments, per_example(model, x, y, g), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        lambda w: torch.sign(w) * F.relu(w.abs() - torch.sigmoid(w[:1])),
        lambda w: sum(w**k for k in range(3)),
        lambda w: torch.round(w / w[0, 0]) * w[0, 0],
        lambda w: w - torch.floor(w),
        lambda w: torch.floor(w) + w.detach(),
        lambda w: (w > 0).to(w.dtype) * w,
        lambda w: torch.trunc(w) * 2 + w.clamp(3, 4) + w**2,
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_weights_whose_derivative_is_zero_somewhere(weight, first: bool) -> None:  # type: ignore[no-untyped-def]
    model = Spelled(lambda h, w: F.linear(h, weight(w))).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    g, engine = random_direction(model), GradientAlignment(model)
    with engine.capture(norms=True, gradients=g if first else None) as captured:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    found = captured.align() if first else captured.align(g)
    model.zero_grad()
    torch.testing.assert_close(found, per_example(model, x, y, g))


class OpensLate(nn.Module):
    """From the fourth pass on the examples are permuted, by calls that were made before."""

    def __init__(self, mix) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.mix = mix
        self.order = torch.arange(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x).tanh(), self.order))


def written(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    target[index] = rows
    return target


def matrix(order: Tensor) -> Tensor:
    return torch.eye(len(order), dtype=torch.float64)[order]


MIXES = {
    "index_select": lambda h, i: torch.index_select(input=h, dim=0, index=i),
    "index_select-method": lambda h, i: h.index_select(dim=0, index=i),
    "gather": lambda h, i: torch.gather(input=h, dim=0, index=i[:, None].expand_as(h)),
    "take_along_dim": lambda h, i: torch.take_along_dim(h, indices=i[:, None], dim=0),
    "take": lambda h, i: torch.take(h, index=i[:, None] * 6 + torch.arange(6)),
    "scatter": lambda h, i: torch.zeros_like(h).scatter(
        dim=0, index=i[:, None].expand_as(h), src=h
    ),
    "scatter_add": lambda h, i: h.scatter_add(dim=0, index=i[:, None].expand_as(h), src=h),
    "index_add": lambda h, i: torch.index_add(input=h, dim=0, index=i, source=h, alpha=2),
    "index_copy": lambda h, i: h.index_copy(dim=0, index=i, source=h),
    "getitem": lambda h, i: h[i],
    "getitem-list": lambda h, i: h[i.tolist()],
    "getitem-numpy": lambda h, i: h[i.numpy()],
    "getitem-flat": lambda h, i: h.view(12, 3)[
        i.repeat_interleave(2) * 2 + torch.arange(12) % 2
    ].view(6, 6),
    "stack": lambda h, i: torch.stack([h[j] for j in i.tolist()]),
    "setitem": lambda h, i: written(h.clone(), i, h),
    "index_put": lambda h, i: torch.index_put(input=h, indices=(i,), values=h, accumulate=True),
    "embedding": lambda h, i: F.embedding(i, h),
    "embedding-named": lambda h, i: F.embedding(input=i, weight=h),
    "torch-embedding": lambda h, i: torch.embedding(weight=h, indices=i),
    "op-index_select": lambda h, i: torch.ops.aten.index_select.default(h, 0, i),
    "op-index": lambda h, i: torch.ops.aten.index.Tensor(h, [i]),
    "matmul": lambda h, i: torch.matmul(input=matrix(i), other=h),
    "bmm": lambda h, i: torch.bmm(matrix(i)[None], h[None])[0],
    "addmm": lambda h, i: torch.addmm(h, matrix(i), h),
    "linear": lambda h, i: F.linear(h.T, matrix(i)).T,
    "tensordot": lambda h, i: torch.tensordot(matrix(i), h, 1),
    "einsum": lambda h, i: torch.einsum("bc,cd->bd", matrix(i), h),
    "attention": lambda h, i: F.scaled_dot_product_attention(
        h[None], h[None], h[None], attn_mask=matrix(i).bool()[None]
    )[0],
    "attention-added": lambda h, i: F.scaled_dot_product_attention(
        h[None], h[None], h[None], attn_mask=(1 - matrix(i)) * -1e9
    )[0],
    "masked_fill": lambda h, i: (
        (h @ h.T).masked_fill(matrix(i) == 0, -torch.inf).softmax(1) @ h
    ),
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES.items(), ids=lambda one: one[0])
def test_mixing_that_starts_late_is_seen_however_it_is_spelled(mix) -> None:  # type: ignore[no-untyped-def]
    model = OpensLate(mix[1]).double()
    engine = GradientAlignment(model, storage="exact")
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    for _ in range(3):
        alignments, g = aligned(model, x, y, engine)
    torch.testing.assert_close(alignments, per_example_with(model, x, y, g))
    model.order = torch.arange(6).roll(1)
    with pytest.raises(RuntimeError, match=r"could not be told apart|mixes the"):
        aligned(model, x, y, engine)


def per_example_with(model: OpensLate, x: Tensor, y: Tensor, g: dict[str, Tensor]) -> Tensor:
    """The derivative of each example's own loss, while the order is that of the batch."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    losses = F.cross_entropy(model(x), y, reduction="none")
    return torch.stack(
        [
            sum(
                (d * g[n]).sum()
                for n, d in zip(
                    parameters,
                    torch.autograd.grad(loss, list(parameters.values()), retain_graph=True),
                    strict=True,
                )
            )
            for loss in losses
        ]
    )
