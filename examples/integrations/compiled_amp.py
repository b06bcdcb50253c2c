"""torch.compile and mixed precision, in a loop of one's own and through `fit`.

On a GPU the dtype is float16 with a GradScaler; here, on the CPU, float16 gradients are scaled too.
The augmented step runs the model as it was written, the plain step runs it compiled.
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
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--fit", action="store_true", help="by fit instead of a loop of one's own")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2)
    ).to(options.device)
    model = torch.compile(network, backend=options.backend)
    augment = OLAAugment("wide_long", strength=1)
    images, labels = data()
    held_out = [(images[:32], labels[:32])]
    loader = DataLoader(TensorDataset(images[32:], labels[32:]), batch_size=8, shuffle=True)
    pairs = options.epochs * len(loader) // 2
    learner = OLALearner.recommended(model, augment, held_out, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(options.device)
    if options.fit:
        fit(
            model, loader, optimizer, epochs=options.epochs, learner=learner,
            autocast=torch.float16, scaler=scaler, clip_norm=1.0, progress=False,
        )  # fmt: skip
    else:
        for _ in range(options.epochs):
            for images, labels in learner.loader(loader):
                images, labels = images.to(options.device), labels.to(options.device)
                with learner.step(images, loss_scale=scaler.get_scale()) as step:
                    with torch.autocast(options.device, torch.float16):
                        loss = F.cross_entropy(model(step.images.float() / 255), labels)
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    print(f"{learner.pairs} pairs, {learner.skipped.total()} of them without a reward")
    return learner


if __name__ == "__main__":
    main()
