"""Hugging Face: OLATrainer instead of Trainer, images from `datasets.with_transform`.

`torchrun --nproc-per-node 2 huggingface_trainer.py` trains on two processes.
"""

import argparse
import tempfile

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import default_collate
from torchvision.transforms import v2
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from ola_augment import OLAAugment, OLALearner
from ola_augment.integrations.huggingface import OLATrainer


def data(size=160):
    """Dark squares and light ones, on noise: inverting an image changes its class."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, size)
    images = generator.integers(96, 160, (size, 16, 16, 3), dtype=np.uint8)
    images[:, 4:12, 4:12] = 255 * labels[:, None, None, None]
    return Dataset.from_dict({"image": images.tolist(), "label": labels.tolist()})


def to_uint8(examples):
    """For with_transform: pixel_values stay uint8, they are augmented before normalisation."""
    pixels = [torch.tensor(image, dtype=torch.uint8) for image in examples["image"]]
    return {
        "pixel_values": [image.permute(2, 0, 1) for image in pixels],
        "labels": examples["label"],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", default=None, help="for checkpoints; none are kept without")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)  # the same weights in every process
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_labels=2,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    augment = OLAAugment("wide_long", strength=1)
    whole = data().with_transform(to_uint8)
    held_out = [default_collate([whole[i] for i in range(32)])]
    preprocess = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    )

    pairs = 4 * options.epochs
    learner = OLALearner.recommended(model, augment, held_out, pairs, preprocess=preprocess)
    args = TrainingArguments(
        options.out or tempfile.mkdtemp(), num_train_epochs=options.epochs, use_cpu=True,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, max_grad_norm=1.0,
        learning_rate=1e-2, bf16=options.bf16, remove_unused_columns=False, disable_tqdm=True,
        save_strategy="epoch" if options.out else "no", report_to="none",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OLATrainer(
        model=model,
        args=args,
        train_dataset=data().select(range(32, 160)).with_transform(to_uint8),
        learner=learner,
        preprocess=preprocess,
    )
    result = trainer.train(resume_from_checkpoint=options.resume)
    print(f"{learner.pairs} pairs, loss {result.training_loss:.3f}; {augment.policy}")
    return trainer


if __name__ == "__main__":
    main()
