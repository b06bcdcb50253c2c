"""Cost of learning on many ranks: a pair of steps that teaches the policy against a plain one.

One pair: an augmented step and a plain one. A pair that teaches and a plain pair (two steps without
augmentation or capture) alternate, on one process and on two gloo ranks of one thread each under
DistributedDataParallel; the ratio is that of the medians of rank 0. Augmentation takes part in both
ratios alike. Messages are those that the policy adds to DDP's own: calls of torch.distributed.

    python examples/benchmarks/ranks.py --model small_cnn --pairs 20
    python examples/benchmarks/ranks.py --model wrn-10-1 --pairs 6
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from networks import make_network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ola_augment import OLAAugment, OLALearner

REFERENCES = ("next", "held out")
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SENDING = ("all_reduce", "all_gather", "broadcast", "reduce", GATHER)


def messages(run: Callable[[], object]) -> int:
    with ExitStack() as stack:
        sent = [
            stack.enter_context(patch.object(dist, name, wraps=getattr(dist, name)))
            for name in SENDING
        ]
        run()
        return sum(one.call_count for one in sent)


def pair(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    learner: Any,
) -> float:
    started = time.perf_counter()
    for augmented in (True, False):
        if learner is None:
            F.cross_entropy(model(images.float() / 255), targets).backward()
        else:
            with learner.augmented_step() if augmented else learner.plain_step():
                seen = learner.augment(images) if augmented else images
                F.cross_entropy(model(seen.float() / 255), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def measure(rank: int, ranks: int, port: int, options: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    images = torch.randint(0, 256, (options["batch"], 3, 32, 32), dtype=torch.uint8)
    targets = torch.randint(0, 10, (options["batch"],))
    found = {}
    for reference in REFERENCES:
        torch.manual_seed(0)
        model = make_network(options["model"], 10)
        model = DistributedDataParallel(model) if ranks > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        given = "next" if reference == "next" else [(images, targets)]
        learner = OLALearner(model, OLAAugment(strength=1.0), reference=given)
        for one in (learner, None, learner):
            pair(model, optimizer, images, targets, one)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(options["pairs"]):
            for kept, one in zip(times, (learner, None), strict=True):
                if ranks > 1:
                    dist.barrier()
                kept.append(pair(model, optimizer, images, targets, one))
        sent = messages(lambda: pair(model, optimizer, images, targets, learner))  # noqa: B023
        found[reference] = [*(statistics.median(kept) for kept in times), sent]
    if rank == 0:
        torch.save(found, out)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small_cnn", help="small_cnn, or wrn-DEPTH-WIDTH")
    parser.add_argument("--batch", type=int, default=64, help="a rank")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    options = vars(parser.parse_args(arguments))
    print("| network | reference | ranks | plain, ms | teaches, ms | ratio | messages |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for ranks in options["ranks"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "found.pt")
            given = (ranks, port, options, out)
            mp.start_processes(measure, given, nprocs=ranks, start_method="fork")  # type: ignore[no-untyped-call]
            found = torch.load(out, weights_only=True)
        for reference, (teaches, plain, sent) in found.items():
            print(
                f"| {options['model']} | {reference} | {ranks} | {1e3 * plain:.0f} | "
                f"{1e3 * teaches:.0f} | {teaches / plain:.2f} | {sent} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
