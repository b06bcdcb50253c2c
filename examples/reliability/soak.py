"""Learn for thousands of steps and many image sizes: memory, files, hooks and threads stay.

    python examples/reliability/soak.py --steps 20000 --sizes 500 --batches 2000

Exits with 1 if resident memory grows by more than 1 % after the first half, or anything else is
left behind.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time

import torch
import torch.nn.functional as F
from torch import nn

from ola_augment import OLAAugment, OLALearner


def resident() -> float:
    """MiB."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def held(model: nn.Module) -> dict[str, int]:
    modules = list(model.modules())
    return {
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "hooks of modules": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in modules
        ),
        "hooks of parameters": sum(len(p._backward_hooks or ()) for p in model.parameters()),
    }


def soak(steps: int, sizes: list[tuple[int, int]]) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    learner = OLALearner(model, OLAAugment("wide_long"))
    before, memory, start = held(model), [], time.perf_counter()
    for step in range(steps):
        size = sizes[step % len(sizes)]
        images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8)
        targets = torch.randint(0, 3, (4,))
        augmented = step % 2 == 0
        with learner.augmented_step() if augmented else learner.plain_step():
            images = learner.augment(images) if augmented else images
            F.cross_entropy(model(images / 255), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == steps // 10 - 1:
            memory.append(resident())
    gc.collect()
    after = held(model)
    growth = memory[-1] / memory[len(memory) // 2 - 1] - 1
    print(
        f"{steps} steps, {len(sizes)} sizes, {time.perf_counter() - start:.0f} s: "
        f"{memory[0]:.1f}, {memory[len(memory) // 2 - 1]:.1f}, {memory[-1]:.1f} MiB after a tenth, "
        f"half and all ({100 * growth:+.2f} % in the second half); {after}",
        flush=True,
    )
    return growth <= 0.01 and before == after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, default=500)
    parser.add_argument("--batches", type=int, default=2_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    many = [(8 + size // 25, 8 + size % 25) for size in range(options.sizes)]
    same = soak(options.steps, [(8, 8)])
    return 0 if soak(options.batches, many) and same else 1


if __name__ == "__main__":
    sys.exit(main())
