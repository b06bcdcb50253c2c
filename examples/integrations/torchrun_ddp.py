"""DistributedDataParallel: `torchrun --nproc-per-node 2 torchrun_ddp.py`, with --fit by `fit`.

Every process draws for its own images; rewards are normalised over all of them, and weights and
policy stay equal to the last bit. Give the learner the wrapped model.
"""

import argparse
import hashlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ola_augment import OLAAugment, OLALearner
from ola_augment.training import fit


def data(size=160):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return images, labels


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2)
    )


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:12]


def loop(model, learner, loader, optimizer, epochs):
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in learner.loader(loader):
            with learner.step(images) as step:
                F.cross_entropy(model(step.images.float() / 255), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--fit", action="store_true", help="by fit instead of a loop of one's own")
    options = parser.parse_args(arguments)

    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank()
    torch.manual_seed(0)  # in every process: they draw differently all the same
    model = DistributedDataParallel(network())
    augment = OLAAugment("wide_long", strength=1)
    images, labels = data()
    dataset, held_out = TensorDataset(images[32:], labels[32:]), [(images[:32], labels[:32])]
    loader = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset))
    pairs = options.epochs * len(loader) // 2
    learner = OLALearner.recommended(model, augment, held_out, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    if options.fit:
        fit(
            model, loader, optimizer, epochs=options.epochs, learner=learner, progress=rank == 0
        )  # fmt: skip
    else:
        loop(model, learner, loader, optimizer, options.epochs)
    line = f"rank {rank}: {learner.pairs} pairs, weights {digest(model.parameters())}"
    line += f", policy {digest(augment.policy.named_logits().values())}"
    print(f"{line}, draws {digest(augment.augment(images)[1])}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
