"""timm: the parts of its training script around a learner; mixup on the plain batches.

On augmented ones a CreditedMixup would share out each reward. Learned over a timm string's space.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import InterpolationMode

from ola_augment import OLAAugment, OLALearner
from ola_augment.integrations.timm import TimmRandAugmentPolicy


def data(size=96):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return images, labels


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--model", default="test_vit")
    parser.add_argument("--space", default="rand-m9-mstd0.5-inc1")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=2, img_size=32)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    images, labels = data()
    held_out = [(images[:32], labels[:32])]
    loader = DataLoader(TensorDataset(images[32:], labels[32:]), batch_size=8, shuffle=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.epochs, updates_per_epoch=len(loader),
        step_on_epochs=False,
    )  # fmt: skip
    ema = ModelEmaV3(model, decay=0.99)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=2)
    augment = OLAAugment(
        TimmRandAugmentPolicy(options.space).space, strength=1,
        interpolation=InterpolationMode.BILINEAR, fill=128,
    )  # fmt: skip
    pairs = options.epochs * len(loader) // 2
    learner = OLALearner.recommended(model, augment, held_out, pairs)

    for update in range(options.epochs * len(loader)):
        if update % len(loader) == 0:
            batches = iter(loader)
        images, labels = next(batches)
        with learner.step(images) as step:
            seen = step.images.float() / 255
            if step.augmented:
                loss = F.cross_entropy(model(seen), labels, label_smoothing=0.1)
            else:
                mixed, targets = mixup(seen, labels)
                loss = SoftTargetCrossEntropy()(model(mixed), targets)
            loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step=update)
        scheduler.step_update(update + 1)
    print(f"{learner.pairs} pairs; {augment.policy}")
    return learner


if __name__ == "__main__":
    main()
