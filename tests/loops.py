"""One small task and the plain loop that every integration has to reproduce."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import GARUpdater, OLAAugment, OLALearner

CLIP = 0.5
LR = 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


def dataset(size=48):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorDataset(images, torch.randint(0, 3, (size,), generator=generator))


def loader(size=48, batch_size=4, **options):
    return DataLoader(dataset(size), batch_size=batch_size, **options)


def learner_of(model, seed=2, **options):
    augment = OLAAugment("rand_augment", max_ops=2, generator=torch.Generator().manual_seed(seed))
    updater = GARUpdater(augment.policy, lr=0.1)
    return OLALearner(model, augment, updater=updater, **options)


def rejoining_learner(model, loss=None):
    """Of 16 held-out images, all of class 2, which join the training after two pairs."""
    images, _ = dataset(64)[48:]
    held_out = [{"label": torch.full((8,), 2), "image": part} for part in images.split(8)]
    return OLALearner(
        model, OLAAugment("rand_augment", strength=1.0), reference=held_out, learn_pairs=2,
        rejoin=True, loss=loss,
    )  # fmt: skip


def two_classes(size=48):
    images, targets = dataset(size)[:]
    return TensorDataset(images, targets % 2)


def check_joined(labels, size=48):
    """Labels of each batch of 4 that was trained on, two epochs: 16 of 64 are of class 2."""
    joined = [int((part == 2).sum()) for part in labels]
    assert joined[:4] == [0] * 4
    assert sum(joined) == (len(joined) - 4) * 4 * 16 // (16 + size)
    assert all(len(part) == 4 for part in labels)


def optimizer_of(model, lr=LR):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def loss_of(model, images, targets):
    return F.cross_entropy(model(images.float() / 255), targets)


def logits(learner):
    values = learner.policy.named_logits().values()
    return torch.cat([value.detach().flatten() for value in values])


def plain_loop(model, learner, batches, accumulate=1, epochs=1):
    """Updates of that many batches each, augmented ones and plain ones in turns."""
    optimizer = optimizer_of(model)
    current = learner.plain_first
    learner.micro_batches = accumulate // 2 if current else accumulate
    ran = 0
    for _ in range(epochs):
        for images, targets in batches:
            window, position = divmod(ran, accumulate)
            augmented = position >= accumulate // 2 if current else window % 2 == 0
            with learner.augmented_step() if augmented else learner.plain_step():
                seen = learner.augment(images) if augmented else images
                (loss_of(model, seen, targets) / accumulate).backward()
            ran += 1
            if ran % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
