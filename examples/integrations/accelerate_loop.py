"""Hugging Face accelerate: prepare as always, give the learner the prepared model.

`accelerate launch accelerate_loop.py` or `torchrun --nproc-per-node 2 accelerate_loop.py`.
"""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import OLAAugment, OLALearner


def data(size=160):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return images, labels


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:12]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--mixed-precision", default="bf16")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=True, mixed_precision=options.mixed_precision)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    images, labels = data()
    held_out = [(images[:32], labels[:32])]
    loader = DataLoader(TensorDataset(images[32:], labels[32:]), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    augment = OLAAugment("wide_long", strength=1)
    pairs = options.epochs * len(loader) // 2
    learner = OLALearner.recommended(model, augment, held_out, pairs)

    for _ in range(options.epochs):
        for x, y in loader:
            with learner.step(x) as step:
                accelerator.backward(F.cross_entropy(model(step.images.float() / 255), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    line = f"rank {accelerator.process_index}: {learner.pairs} pairs"
    line += f", weights {digest(model.parameters())}"
    line += f", policy {digest(augment.policy.named_logits().values())}"
    print(f"{line}, draws {digest(augment.augment(images)[1])}", flush=True)
    accelerator.end_training()
    return learner


if __name__ == "__main__":
    main()
