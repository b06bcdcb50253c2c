"""Draw the front page's strip: images, what a policy makes of them before learning, and after.

    python examples/strip.py --data imagefolder:cifar10-jpeg.zip --policy runs/policy.json

Without ``--policy`` one is learned first, by ``train.py`` with its own defaults on ``--data``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import train
from data import load_data

from ola_augment import OLAAugment, PolicyTransform
from ola_augment.files import load_policy
from ola_augment.plots import sample_strip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, cifar100 or imagefolder:PATH")
    add("--image-size", type=int, default=32, help="pixels a side for imagefolder")
    add("--policy", type=Path, help="policy.json of a run; None trains one")
    add("--epochs", type=int, default=60, help="of that training")
    add("--images", type=int, default=9, help="how many columns")
    add("--seed", type=int, default=0, help="of the choice of images and of the draws")
    add("--out", type=Path, default=Path("docs/figures/strip.png"))
    options = parser.parse_args(arguments)
    path = options.policy
    if path is None:
        runs = options.out.parent / "strip-run"
        train.main(
            ["--data", options.data, "--image-size", str(options.image_size), "--method", "ola",
             "--epochs", str(options.epochs), "--quiet", "--out", str(runs)]
        )  # fmt: skip
        path = runs / "ola-seed0" / "policy.json"
    data = load_data(options.data, options.image_size)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(data.test_images), generator=generator)[: options.images]
    learned = load_policy(path)
    before = OLAAugment(learned.space, max_ops=learned.max_ops, generator=generator)
    after = PolicyTransform(learned, generator=generator)
    figure = sample_strip(
        {"before learning": before, "after learning": after}, data.test_images[chosen]
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    print(f"{options.out}: {data.name}, {path}")


if __name__ == "__main__":
    main()
