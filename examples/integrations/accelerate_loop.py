"""Hugging Face accelerate: prepare as always, give the learner the prepared model.

`accelerate launch accelerate_loop.py` or `torchrun --nproc-per-node 2 accelerate_loop.py`.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import OLAAugment, OLALearner


def data(size=128):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--mixed-precision", default="bf16")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=True, mixed_precision=options.mixed_precision)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    loader = DataLoader(data(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    torch.manual_seed(accelerator.process_index)  # draws of its own in each process
    augment = OLAAugment("wide_long")
    learner = OLALearner(model, augment)

    for _ in range(options.epochs):
        for index, (images, labels) in enumerate(loader):
            augmented = index % 2 == 0
            with learner.augmented_step() if augmented else learner.plain_step():
                images = learner.augment(images) if augmented else images
                accelerator.backward(F.cross_entropy(model(images.float() / 255), labels))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    digest = torch.cat([v.detach().flatten() for v in augment.policy.named_logits().values()])
    print(
        f"rank {accelerator.process_index}: {learner.pairs} pairs, "
        f"logits {digest.double().norm():.9f}",
        flush=True,
    )
    accelerator.end_training()
    return learner


if __name__ == "__main__":
    main()
