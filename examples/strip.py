"""Draw the front page's strip: images, what a policy makes of them before learning, and after.

    python examples/comparison.py --bed rotated --seeds 1 --method ola
    python examples/strip.py --photographs --policy \\
        runs/comparison/rotated/runs/ola-seed0/policy.json

draws the front page's, whose policy was learned for a model whose target domain is rotated digits.
Without ``--policy`` one is learned first, by ``train.py``. Both rows apply as many operations to an
image (``--strength``), so that they differ in which.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import train
from data import load_data
from PIL import Image
from torch import Tensor

from ola_augment import OLAAugment, PolicyTransform
from ola_augment.files import load_policy
from ola_augment.plots import sample_strip


def photographs(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Crops of scikit-learn's two photographs in turn, (count, 3, size, size) uint8."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    crops = []
    for number in range(count):
        picture = Image.fromarray(pictures[number % len(pictures)])
        share, x, y = torch.rand(3, generator=generator).tolist()
        side = int((0.6 + 0.4 * share) * min(picture.size))
        left, top = int(x * (picture.width - side)), int(y * (picture.height - side))
        crop = picture.resize((size, size), box=(left, top, left + side, top + side))
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(crops)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits-rotated", help="what a policy is learned on; see train.py")
    add("--image-size", type=int, default=32, help="pixels a side for imagefolder")
    add("--photographs", action="store_true", help="show photographs, not images of --data")
    add("--policy", type=Path, help="policy.json of a run; None trains one")
    add("--train-size", type=int, default=300, help="images of that training")
    add("--epochs", type=int, default=400, help="of that training")
    add("--strength", type=float, default=1.5, help="operations an image, if it is given")
    add("--images", type=int, default=9, help="how many columns")
    add("--seed", type=int, default=0, help="of the choice of images and of the draws")
    add("--out", type=Path, default=Path("docs/figures/strip.png"))
    options = parser.parse_args(arguments)
    path = options.policy
    if path is None:
        runs = options.out.parent / "strip-run"
        train.main(
            ["--data", options.data, "--image-size", str(options.image_size), "--method", "ola",
             "--train-size", str(options.train_size), "--epochs", str(options.epochs), "--quiet",
             "--out", str(runs)]
        )  # fmt: skip
        path = runs / "ola-seed0" / "policy.json"
    generator = torch.Generator().manual_seed(options.seed)
    if options.photographs:
        images = photographs(options.images, 112, generator)
    else:
        images = load_data(options.data, options.image_size).test_images
        images = images[torch.randperm(len(images), generator=generator)[: options.images]]
    learned = load_policy(path)
    given = getattr(learned, "strength", None) is not None
    if given:
        learned.strength = options.strength
    before = OLAAugment(
        learned.space,
        max_ops=learned.max_ops,
        generator=generator,
        strength=options.strength if given else None,
    )
    after = PolicyTransform(learned, generator=generator)
    figure = sample_strip({"before learning": before, "after learning": after}, images)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    print(f"{options.out}: {path}")


if __name__ == "__main__":
    main()
