"""Two gloo processes under DistributedDataParallel against one process on the whole batch.

The alignments, and the logits that an updater moves with them.
Processes that communicate inside forward verify as often as each other, whatever their own data.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from alignment_oracles import capture, relative_error
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ola_augment import GARUpdater, OLAPolicy
from ola_augment.alignment import GradientAlignment

B = 8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    ).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (B,), generator=generator)


def alignments(model: nn.Module, part: slice) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = GradientAlignment(model, reduction="mean")
    (x, y), (x2, y2) = batch(1), batch(2)
    capture(engine, model, x[part], y[part], F.cross_entropy)
    optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(x2[part]), y2[part]).backward()
    return engine.align()


def updated_logits(found: Tensor, part: slice) -> Tensor:
    """Two updates of a policy, of two batches each."""
    policy = OLAPolicy("rand_augment").double()
    updater = GARUpdater(policy, accumulate=2, entropy_weight=0.01)
    drawn = OLAPolicy("rand_augment").double().sample(B, torch.Generator().manual_seed(0))
    for values in (found, found.exp(), found.square(), found.sin()):
        updater.step(drawn.select(part), values)
    return torch.nn.utils.parameters_to_vector(policy.named_logits().values()).detach()


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        world_size=2,
        rank=rank,
        timeout=timedelta(seconds=60),
    )
    half = slice(rank * B // 2, (rank + 1) * B // 2)
    own = alignments(DistributedDataParallel(network()), half)
    torch.save((own, updated_logits(own, half)), Path(folder) / f"{rank}.pt")
    momentum_contrast(rank)
    dist.destroy_process_group()


class Queue(nn.Module):
    """Keeps the features of all processes; its path depends on its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("queue", torch.zeros(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if float(x.sum()) > 0:
            h = h.tanh()
        features = [torch.empty_like(h) for _ in range(2)]
        dist.all_gather(features, h.detach())
        self.queue.copy_(torch.cat(features))
        return self.last(h)


def momentum_contrast(rank: int) -> None:
    torch.manual_seed(0)
    model = Queue()
    engine = GradientAlignment(model)
    torch.manual_seed(rank)
    for _ in range(8):
        with engine.capture() as captured:
            F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
        g = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        square = sum(value.square().sum() for value in g.values())
        torch.testing.assert_close(captured.align(g).sum(), square)


def test_each_process_aligns_its_own_examples_with_the_averaged_gradient(tmp_path: Path) -> None:
    run_ranks(worker, str(tmp_path))
    (first, first_logits), (second, second_logits) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    found = torch.cat((first, second))
    assert relative_error(found, alignments(network(), slice(0, B))) < 1e-10
    assert torch.equal(first_logits, second_logits)
    assert relative_error(first_logits, updated_logits(found, slice(0, B))) < 1e-10
