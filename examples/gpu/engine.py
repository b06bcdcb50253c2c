"""The alignment engine and the learner on the device, against double precision on the CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from networks import make_network
from rows import check, pictures
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ola_augment import GradientAlignment, OLAAugment, OLALearner

CLASSES = 10
#: name -> (autocast's dtype, TF32, channels_last, compiled, largest relative error)
CASES: dict[str, tuple[torch.dtype | None, bool, bool, bool, float]] = {
    "float32": (None, False, False, False, 1e-4),
    "float32 with TF32": (None, True, False, False, 2e-2),
    "bfloat16 autocast": (torch.bfloat16, True, False, False, 1e-1),
    "float16 autocast": (torch.float16, True, False, False, 2e-2),
    "float32, channels_last": (None, False, True, False, 1e-4),
    "float32, torch.compile": (None, False, False, True, 1e-4),
}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def in_double(model: nn.Module, images: Tensor, labels: Tensor, g: dict[str, Tensor]) -> Tensor:
    """<grad of each example's share of the mean loss, g>, on the CPU."""
    model = copy.deepcopy(model).double()

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), (None, 0, 0))(parameters, images.double(), labels)
    pairs = [gradients[name].flatten(1) @ g[name].double().flatten() for name in gradients]
    return torch.stack(pairs).sum(0) / len(images)


def alignments(case: str, device: str, quick: bool) -> tuple[bool, str]:
    dtype, with_tf32, last, compiled, most = CASES[case]
    torch.manual_seed(0)
    network = make_network("small_cnn", CLASSES)
    images, labels = pictures(16, 32) / 255, torch.arange(16) % CLASSES
    g = {name: torch.randn(p.shape) for name, p in network.named_parameters()}
    expected = in_double(network, images, labels, g)
    network, images, labels = network.to(device), images.to(device), labels.to(device)
    if last:
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    model = (
        torch.compile(network, backend="eager" if quick else "inductor") if compiled else network
    )
    scale = 1024.0 if dtype is torch.float16 else 1.0
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)
    engine = GradientAlignment(model)
    there = {name: tensor.to(device) for name, tensor in g.items()}
    with tf32(with_tf32):
        for _ in range(2):
            network.zero_grad()
            with engine.capture(gradients=there, loss_scale=scale) as captured:
                with autocast:
                    loss = F.cross_entropy(model(images).float(), labels)
                (scale * loss).backward()
        found = captured.align().double().cpu()
    error = float((found - expected).norm() / expected.norm())
    return error <= most, f"relative error {error:.1e}"


def with_batch_norm(device: str, quick: bool) -> tuple[bool, str]:
    """No formula of each example's own, but the shares must add up to the batch's derivative."""
    torch.manual_seed(0)
    network = make_network("wrn-10-1" if quick else "wrn-16-4", CLASSES).to(device)
    images = (pictures(16 if quick else 64, 32) / 255).to(device)
    labels = torch.arange(len(images), device=device) % CLASSES
    g = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    engine = GradientAlignment(network)
    with tf32(False), engine.capture(gradients=g) as captured:
        F.cross_entropy(network(images), labels).backward()
    whole = sum(float((p.grad * g[n]).sum()) for n, p in network.named_parameters())
    shares = captured.align().double()
    error = abs(float(shares.sum()) - whole) / float(shares.abs().sum())
    return error <= 1e-4, f"relative error {error:.1e}"


def pairs_of_steps(
    model: nn.Module, learner: OLALearner, device: str, count: int, scaled: bool = False
) -> None:
    """The loop of the guides, with a GradScaler in half precision where ``scaled``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=scaled, init_scale=1024.0)
    labels = torch.arange(32, device=device) % CLASSES
    for index in range(2 * count):
        images = pictures(32, 32, seed=index).to(device)
        step = learner.plain_step if index % 2 else learner.augmented_step
        with step(loss_scale=scaler.get_scale()):
            images = images if index % 2 else learner.augment(images)
            with torch.autocast(device, torch.float16, enabled=scaled):
                outputs = model(images.float() / 255)
            scaler.scale(F.cross_entropy(outputs.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def logits(augment: OLAAugment) -> Tensor:
    return torch.cat([v.detach().flatten().cpu() for v in augment.policy.named_logits().values()])


def learns(device: str, scaled: bool) -> tuple[bool, str]:
    torch.manual_seed(0)
    model = make_network("small_cnn", CLASSES).to(device)
    augment = OLAAugment()
    learner = OLALearner(model, augment)
    pairs_of_steps(model, learner, device, 5, scaled)
    moved = logits(augment).abs().max()
    ok = bool(moved > 0) and bool(moved.isfinite()) and learner.pairs == 5
    return ok, f"{learner.pairs} pairs, {learner.skipped} skipped, logits moved by {moved:.2f}"


def as_default(device: str) -> tuple[bool, str]:
    """Everything is made while the device is torch's default one."""
    torch.set_default_device(device)
    try:
        return learns(device, scaled=False)
    finally:
        torch.set_default_device(None)


def main(device: str, quick: bool) -> None:
    for case, (*_, most) in CASES.items():
        check("engine", f"alignments of 16 examples, {case}", f"<= {most:g}",
              lambda case=case: alignments(case, device, quick))  # fmt: skip
    check("engine", "sum of the alignments of a network with BatchNorm", "<= 1e-4",
          lambda: with_batch_norm(device, quick))  # fmt: skip
    check("engine", "a loop in float32", "learns", lambda: learns(device, False))
    check("engine", "a loop in float16 with a GradScaler", "learns", lambda: learns(device, True))
    check("engine", f'torch.set_default_device("{device}")', "learns", lambda: as_default(device))
