"""Small models by hand, each for one thing that real models do with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from check import BATCH, Case
from torch import Tensor, nn

WIDTH, TOKENS, SIDE = 6, 5, 8


class Net(nn.Module):
    """Raw parameters by name, and a forward function over them and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parameters: Any) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)
        self.outside = nn.Linear(WIDTH, 3)
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(*value)))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) through one layer, the function, and another."""
        h = self._forward(self, torch.tanh(self.inside(x)))
        return self.outside(h).flatten(1)


def _case(forward: Callable[[Any, Tensor], Tensor], **parameters: Any) -> Callable[[], Case]:
    def make() -> Case:
        torch.manual_seed(0)
        return Case(Net(forward, **parameters), _sequence, randomize=False)

    return make


def _sequence(generator: torch.Generator) -> Any:
    return (torch.randn((BATCH, TOKENS, WIDTH), generator=generator, dtype=torch.float64),), {}


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(
        query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), **options
    ).squeeze(1)


def _in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * 1.0
    y *= w
    y += w
    return y


def _index_put(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = m.p
    return y


def _masked(m: Any, x: Tensor) -> Tensor:
    scores = x @ x.mT + m.bias
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    infinite = torch.where(mask, float("-inf"), m.bias)
    return (scores.masked_fill(mask, float("-inf")) + infinite).softmax(-1) @ x


def _spectrum(m: Any, x: Tensor) -> Tensor:
    z = torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.p)
    return torch.fft.irfft(z, n=TOKENS, dim=1)


def _temporary(m: Any, x: Tensor) -> Tensor:
    table = m.p * 2
    table *= 16
    table[0] = 0.5
    return x + table


def _noisy(m: Any, x: Tensor) -> Tensor:
    return x + F.dropout(m.p, 0.5, m.training) + m.p * torch.rand_like(m.p)


def _inner_gradient(m: Any, x: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    force = torch.autograd.grad((y**2).sum(), y)[0]
    x.retain_grad()
    x.register_hook(lambda gradient: gradient * 1.0)
    return m.layer(x) + force


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.inside = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.queries.expand(len(x), -1, -1), self.inside(x))


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 4, dtype=torch.complex128))
        self.b = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(torch.complex128) @ self.w + self.b
        return torch.cat([z.real, z.imag], -1)


def _module(model: Callable[[], nn.Module]) -> Callable[[], Case]:
    def make() -> Case:
        torch.manual_seed(0)
        return Case(model(), _sequence, randomize=False)

    return make


T, W = TOKENS, WIDTH
CASES: dict[str, Callable[[], Case]] = {
    "attention: learned queries": _case(
        lambda m, x: x + _attend(m.q.expand(len(x), -1, -1), x, x), q=(T, W)
    ),
    "attention: learned bias": _case(lambda m, x: _attend(x, x, x, attn_mask=m.b), b=(T, T)),
    "attention: learned keys and values": _case(
        lambda m, x: _attend(
            x, m.k.expand(len(x), -1, -1), m.v.expand(len(x), -1, -1), scale=0.3, is_causal=True
        ),
        k=(T, W),
        v=(T, W),
    ),
    "attention: bias from a table": _case(
        lambda m, x: _attend(
            x,
            x,
            x,
            attn_mask=m.b[(torch.arange(T)[:, None] - torch.arange(T) + T - 1).flatten()].view(
                T, T
            ),
        ),
        b=(2 * T - 1,),
    ),
    "addcmul": _case(lambda m, x: torch.addcmul(m.b, m.w, x, value=2), b=(W,), w=(W,)),
    "addcdiv": _case(lambda m, x: torch.addcdiv(m.b, x, m.w**2 + 1), b=(W,), w=(W,)),
    "baddbmm": _case(
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1), alpha=0.5), b=(W,), w=(W, W)
    ),
    "addmv, addr, addbmm": _case(
        lambda m, x: x + torch.addmv(m.b, m.w, m.c) + torch.addr(m.w, m.b, m.c)[:1],
        b=(W,),
        w=(W, W),
        c=(W,),
    ),
    "tensordot": _case(lambda m, x: torch.tensordot(x, m.w, dims=([2], [0])), w=(W, W)),
    "inner, kron, outer": _case(
        lambda m, x: torch.inner(x, m.w) + torch.outer(m.b, m.b).sum(0), w=(W, W), b=(W,)
    ),
    "lerp": _case(lambda m, x: torch.lerp(x, m.b, m.w.sigmoid()), b=(W,), w=(W,)),
    "pow": _case(lambda m, x: (x.abs() + 0.1) ** m.w + m.w.abs().pow(x), w=(W,)),
    "generalised mean": _case(
        lambda m, x: (x.abs() + 0.1).pow(m.w).mean(1, keepdim=True).pow(1 / m.w), w=(1,)
    ),
    "maximum and clamp": _case(
        lambda m, x: torch.maximum(x, m.w) + x.clamp(min=m.b) + torch.minimum(m.w, x),
        w=(W,),
        b=(W,),
    ),
    "stack": _case(lambda m, x: torch.stack([x[:, 0], m.p.expand(len(x), -1)], 1), p=(W,)),
    "getitem by data": _case(lambda m, x: x + m.p[(x > 0).long().sum(-1)], p=(W + 1, W)),
    "index_select and gather": _case(
        lambda m, x: (
            x
            + m.p.index_select(0, (x > 0).long().sum(-1).flatten()).view_as(x)
            + m.p[:1].expand(len(x), -1).gather(1, (x[:, 0] > 0).long()).unsqueeze(1)
        ),
        p=(W + 1, W),
    ),
    "in-place multiplication": _case(lambda m, x: _in_place(x, m.p), p=(W,)),
    "rows overwritten": _case(_index_put, p=(W,)),
    "infinite masks": _case(_masked, bias=(T, T)),
    "masked_fill": _case(
        lambda m, x: x.masked_fill(x > 0.5, 0.0) + torch.where(x > 0, m.p, x), p=(W,)
    ),
    "complex filter": _case(_spectrum, p=(T // 2 + 1, W, 2)),
    "complex parameters": _module(lambda: _Complex().double()),
    "noise on parameters": _case(_noisy, p=(W,)),
    "written temporaries": _case(_temporary, p=(T, W)),
    "gradient and hooks inside": _case(_inner_gradient, layer=nn.Linear(W, W)),
    "decoder with learned queries": _module(_Decoder),
    "max pooling of parameters": _case(
        lambda m, x: x + F.max_pool2d(m.p, 2).flatten()[:W], p=(1, 1, 6, 8)
    ),
    "upsampled positions": _case(
        lambda m, x: (
            x + F.interpolate(m.p, size=T, mode="linear", align_corners=False).squeeze(0).mT
        ),
        p=(1, W, 3),
    ),
    "sine activation": _case(lambda m, x: torch.sin(m.w * x) + x * torch.exp(m.w), w=(W,)),
    "rational activation": _case(
        lambda m, x: x / (m.w.abs() + x.abs()) + torch.atan2(x, m.w), w=(W,)
    ),
    "softmax over parameter and data": _case(
        lambda m, x: torch.cat([x, m.p.expand(len(x), 1, -1)], 1).softmax(1), p=(1, W)
    ),
    "cosine classifier": _case(
        lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)), w=(W, W)
    ),
    "distances to prototypes": _case(lambda m, x: torch.exp(-torch.cdist(x, m.w)), w=(W, W)),
    "gated heads": _case(lambda m, x: torch.einsum("btw,wv,v->btv", x, m.w, m.g), w=(W, W), g=(W,)),
    "mixture of experts": _case(
        lambda m, x: torch.einsum("bte,ewv,btw->btv", (x @ m.r).softmax(-1), m.w, x),
        r=(W, 3),
        w=(3, W, W),
    ),
    "GRU by hand": _case(
        lambda m, x: torch.stack(_scan(m, x), 1), w=(W, W), u=(W, W), v=(W, W), b=(W,)
    ),
    "multihead attention": _case(
        lambda m, x: m.a(x, x, x, need_weights=False)[0],
        a=nn.MultiheadAttention(W, 2, batch_first=True),
    ),
    "encoder layer, tokens first": _case(
        lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.TransformerEncoderLayer(W, 2, 8)
    ),
    "weight norm": _case(
        lambda m, x: m.a(x), a=nn.utils.parametrizations.weight_norm(nn.Linear(W, W))
    ),
    "spectral norm": _case(
        lambda m, x: m.a(x), a=nn.utils.parametrizations.spectral_norm(nn.Linear(W, W))
    ),
    "flattened rows": _case(
        lambda m, x: (m.a(x.flatten(0, 1)) * m.p).view_as(x), a=nn.Linear(W, W), p=(W,)
    ),
    "split weights": _case(
        lambda m, x: sum(F.linear(x, w) for w in m.w.chunk(2)) + sum(torch.unbind(m.w)),
        w=(2 * W, W),
    ),
}


def _scan(m: Any, x: Tensor) -> list[Tensor]:
    state, states = torch.zeros_like(x[:, 0]), []
    for step in x.unbind(1):
        gate = torch.sigmoid(torch.addmm(m.b, step, m.w))
        state = torch.lerp(state, torch.tanh(step @ m.v + state @ m.u), gate)
        states.append(state)
    return states
