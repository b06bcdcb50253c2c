"""DataLoader workers augment whole batches; they draw with the logits as they are by then.

Every batch is augmented here, the one that gives the reference gradient too.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import OLAAugment, OLALearner
from ola_augment.training import fit


def data(size=160):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return images, labels


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fit", action="store_true", help="by fit instead of a loop of one's own")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2)
    )
    augment = OLAAugment("wide_long", strength=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images, labels = data()
    held_out = [(images[:32], labels[:32])]
    loader = DataLoader(
        TensorDataset(images[32:], labels[32:]), batch_size=8, shuffle=True,
        num_workers=options.workers, collate_fn=augment.collate,
        persistent_workers=options.workers > 0,
    )  # fmt: skip
    learner = OLALearner(model, augment, reference=held_out)
    if options.fit:
        fit(model, loader, optimizer, epochs=options.epochs, learner=learner, progress=False)
    else:
        for _ in range(options.epochs):
            for images, labels, actions in loader:
                with learner.step(images, actions=actions) as step:
                    F.cross_entropy(model(step.images.float() / 255), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    print(f"{learner.pairs} pairs; {augment.policy}")
    return learner


if __name__ == "__main__":
    main()
