"""DistributedDataParallel in a process group of one: NCCL on a GPU, Gloo on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from engine import CLASSES, logits, pairs_of_steps
from networks import make_network
from rows import check
from torch.nn.parallel import DistributedDataParallel

from ola_augment import OLAAugment, OLALearner


def policy_of(device: str, distributed: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = make_network("small_cnn", CLASSES).to(device)
    model = DistributedDataParallel(model) if distributed else model
    augment = OLAAugment(generator=torch.Generator().manual_seed(0))
    pairs_of_steps(model, OLALearner(model, augment), device, 5)
    return logits(augment)


def same_policy(device: str) -> tuple[bool, str]:
    alone = policy_of(device, distributed=False)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            together = policy_of(device, distributed=True)
        finally:
            dist.destroy_process_group()
    error = float((together - alone).abs().max() / alone.abs().max())
    return error <= 0.05, f"logits differ by {error:.1e} of the largest"


def main(device: str, quick: bool) -> None:
    backend = "NCCL" if device == "cuda" else "Gloo"
    check("ranks", f"DDP with {backend} and one rank learns the policy of a plain loop", "<= 0.05",
          lambda: same_policy(device))  # fmt: skip
