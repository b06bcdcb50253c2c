"""Lightning: one callback, the module stays as it is.

Run it as `python lightning_trainer.py`, or on two processes as
`torchrun --nproc-per-node 2 lightning_trainer.py --devices 2`.
"""

import argparse
import hashlib
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import OLAAugment, OLALearner
from ola_augment.integrations.lightning import OLACallback


def data(size=288):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (size,), generator=generator)
    images = torch.randint(96, 160, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = (255 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
    return images, labels


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:12]


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
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")

    torch.manual_seed(0)  # in every process: they draw differently all the same
    module, augment = Classifier(), OLAAugment("wide_long", strength=1)
    images, labels = data()
    held_out = [(images[:32], labels[:32])]
    loader = DataLoader(TensorDataset(images[32:], labels[32:]), batch_size=16, shuffle=True)
    pairs = options.epochs * len(loader) // (4 * options.devices)  # of updates of two batches
    learner = OLALearner.recommended(module.network, augment, held_out, pairs)
    callback = OLACallback(learner)
    trainer = Trainer(
        max_epochs=options.epochs, accelerator="cpu", devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto", precision=options.precision,
        accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=[callback],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    line = f"rank {trainer.global_rank}: {learner.pairs} pairs"
    line += f", weights {digest(module.parameters())}"
    line += f", policy {digest(augment.policy.named_logits().values())}"
    print(f"{line}, draws {digest(augment.augment(images)[1])}", flush=True)
    return module, callback


if __name__ == "__main__":
    main()
