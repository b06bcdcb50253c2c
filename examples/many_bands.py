"""Train with OLA on images that are no photographs: 13 bands, and 12 bits of grey.

    python examples/many_bands.py

Paste it and replace the two functions that make data by your own arrays. Nothing else
depends on the kind of image but ``value_range=``, which says what is black and what is white.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ola_augment import OLAAugment, OLALearner

CLASSES, SIDE, BATCH = 4, 24, 32


def thirteen_bands(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Reflectance of 13 bands in [0, 1.6], float32: each class has a spectrum of its own."""
    generator = np.random.default_rng(seed)
    spectra = np.random.default_rng(0).uniform(0.1, 1.2, (CLASSES, 13))
    targets = generator.integers(CLASSES, size=count)
    light = generator.uniform(0.7, 1.2, (count, 1, 1, 1))
    noise = generator.normal(0, 0.15, (count, 13, SIDE, SIDE))
    images = (spectra[targets][:, :, None, None] * light + noise).clip(0, 1.6)
    return torch.from_numpy(images).float(), torch.from_numpy(targets)


def twelve_bits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Grey levels 0 .. 4095 in uint16: each class has a stripe of its own width."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(CLASSES, size=count)
    columns = np.arange(SIDE) + generator.integers(SIDE, size=(count, 1))
    stripes = (columns // (2 + 2 * targets[:, None])) % 2
    noise = generator.normal(0, 250, (count, 1, SIDE, SIDE))
    levels = 600 + 1800 * stripes[:, None, None, :] + noise
    return torch.from_numpy(levels.clip(0, 4095).astype(np.uint16)), torch.from_numpy(targets)


def train(images: Tensor, targets: Tensor, value_range: tuple[float, float], epochs: int) -> float:
    """Train a small network and its augmentation; return the accuracy on plain batches."""
    torch.manual_seed(0)
    low, high = value_range
    model = nn.Sequential(
        *(nn.Conv2d(images.shape[1], 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        nn.Linear(32 * 16, CLASSES),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    learner = OLALearner(model, OLAAugment(value_range=value_range))

    def step(images: Tensor, targets: Tensor) -> Tensor:
        outputs = model((images.float() - low) / (high - low))
        nn.functional.cross_entropy(outputs, targets).backward()
        return outputs

    right = seen = 0
    for epoch in range(epochs):
        batches = torch.randperm(len(images)).split(BATCH)
        for first, second in zip(batches[::2], batches[1::2], strict=False):
            with learner.augmented_step():
                step(learner.augment(images[first]), targets[first])
            optimizer.step()
            optimizer.zero_grad()
            with learner.plain_step():
                outputs = step(images[second], targets[second])
            optimizer.step()
            optimizer.zero_grad()
            if epoch == epochs - 1:
                right += int((outputs.argmax(1) == targets[second]).sum())
                seen += len(second)
    print(learner.policy)
    return right / seen


if __name__ == "__main__":
    print(f"13 bands: {train(*thirteen_bands(512, 1), (0.0, 1.6), epochs=6):.2f} right\n")
    print(f"12 bits: {train(*twelve_bits(512, 1), (0, 4095), epochs=6):.2f} right")
