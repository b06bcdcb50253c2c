"""Lightning: one callback, the module stays as it is.

Run it as `python lightning_trainer.py`, or on two processes as
`torchrun --nproc-per-node 2 lightning_trainer.py --devices 2`.
"""

import argparse
import os
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import OLAAugment, OLALearner
from ola_augment.integrations.lightning import OLACallback


def data(size=256):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return TensorDataset(images, labels)


class Classifier(LightningModule):
    """Anybody's module; it knows nothing of augmentation."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 49, 2),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.network(images.float() / 255), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")

    torch.manual_seed(0)  # the same weights in every process
    module, augment = Classifier(), OLAAugment("wide_long")
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # draws of its own in each
    callback = OLACallback(OLALearner(module.network, augment))
    trainer = Trainer(
        max_epochs=options.epochs, accelerator="cpu", devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto", precision=options.precision,
        accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=[callback],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=16, shuffle=True))
    if trainer.is_global_zero:
        keep = augment.policy.log_probs().keep.exp()
        invert = next(i for i, op in enumerate(augment.space.operations) if op.name == "invert")
        print(f"{callback.learner.pairs} pairs; invert is kept with {keep[invert]:.2f}")
    return module, callback


if __name__ == "__main__":
    main()
