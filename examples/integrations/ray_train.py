"""Ray Train: a TorchTrainer with two workers on the CPU, and the loop of DDP inside.

`python ray_train.py` starts Ray on this machine; on a cluster it joins that.
"""

import argparse
import hashlib
from pathlib import Path

import ray
import torch
import torch.nn.functional as F
from ray.train import ScalingConfig, get_context
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
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


def train(config):
    torch.manual_seed(0)  # on all workers: they draw differently all the same
    model = prepare_model(nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2)
    ))  # fmt: skip
    images, labels = data()
    loader = DataLoader(TensorDataset(images[32:], labels[32:]), batch_size=8, shuffle=True)
    loader = prepare_data_loader(loader)
    augment = OLAAugment("wide_long", strength=1)
    held_out = [(images[:32], labels[:32])]
    pairs = config["epochs"] * len(loader) // 2
    learner = OLALearner.recommended(model, augment, held_out, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(config["epochs"]):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            with learner.step(x) as step:
                F.cross_entropy(model(step.images.float() / 255), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    drawn = augment.augment(images)[1]
    line = f"rank {get_context().get_world_rank()}: {learner.pairs} pairs"
    logits = augment.policy.named_logits().values()
    line += f", weights {digest(model.parameters())}, policy {digest(logits)}"
    path = Path(config["out"], str(get_context().get_world_rank()))
    path.write_text(f"{line}, draws {digest(drawn)}\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", default="/tmp", help="a folder that all workers see")
    options = parser.parse_args(arguments)
    ray.init(ignore_reinit_error=True)
    TorchTrainer(
        train, train_loop_config=vars(options), scaling_config=ScalingConfig(num_workers=2)
    ).fit()
    for rank in range(2):
        print(Path(options.out, str(rank)).read_text(), end="")


if __name__ == "__main__":
    main()
