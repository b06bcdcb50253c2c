"""Per-example alignments by other means, for the tests of the engine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor, Tensor], Tensor]


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def random_direction(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def per_example(model: nn.Module, x: Tensor, y: Tensor, g: dict[str, Tensor]) -> Tensor:
    """One backward per example: needs a model in which examples do not meet."""
    model = copy.deepcopy(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(x)):
        loss = sum_loss(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        rows.append(sum((d * g[n]).sum() for n, d in zip(parameters, gradients, strict=True)))
    return torch.stack(rows)


def by_jvp(model: nn.Module, x: Tensor, y: Tensor, g: dict[str, Tensor]) -> Tensor:
    """Forward-mode derivative of every example's own loss along g."""
    model = copy.deepcopy(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward derivative
    with (
        warnings.catch_warnings(),
        forward_ad.dual_level(),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # torch builds its table with jit.script
        duals = {n: forward_ad.make_dual(p.detach(), g[n]) for n, p in model.named_parameters()}
        outputs = torch.func.functional_call(model, duals, (x,))
        losses = F.cross_entropy(outputs, y, reduction="none")
        torch.backends.mha.set_fastpath_enabled(fast)
        return forward_ad.unpack_dual(losses).tangent


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def capture(engine, model: nn.Module, x: Tensor, y: Tensor, loss: Loss = sum_loss) -> None:
    with engine.capture():
        loss(model(x), y).backward()


def cdist_has_a_second_derivative() -> bool:
    """Whether torch's can be differentiated along a direction by two reverse passes."""
    points = torch.randn(3, 2, requires_grad=True)
    weights = torch.ones(4, 3, requires_grad=True)
    distances = torch.cdist(torch.randn(4, 2), points)
    (gradient,) = torch.autograd.grad(distances, points, weights, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), weights)
    except NotImplementedError:
        return False
    return True
