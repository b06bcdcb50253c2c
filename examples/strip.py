"""Draw the front page's picture: photographs, the target domain, and what policies make of them.

    python examples/train.py --data digits-rotated --train-size 300 --epochs 500 --method ola
    python examples/strip.py --seed 3 --policy runs/train/ola-seed0/policy.json

Four rows: training images, images of the target domain, training images as the learned policy
augments them, and as a uniform policy does. Both apply as many operations to an image
(``--strength``), so that they differ in which. The policy is one of handwritten digits whose target
domain is rotated by up to 60 degrees, and so are the photographs of the second row. Without
``--policy`` one is learned first, by ``train.py``. With ``--light`` the target domain is dark too,
as that of ``photographs.py``, for a policy that was learned there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import train
from matplotlib.figure import Figure
from photographs import photographs
from PIL import Image
from torch import Tensor

from ola_augment import OLAAugment, PolicyTransform
from ola_augment.files import load_policy

#: Pixels a side of what is shown.
SIZE = 224
#: Degrees by which the photographs of the target domain are rotated.
ANGLES = (-55, 35, 45, -40, 60)


def square(image: Image.Image, angle: float, light: float) -> Tensor:
    """The middle of a photograph, rotated, without empty corners: (3, SIZE, SIZE) uint8."""
    x, y = image.width / 2, image.height / 2
    side = min(image.size) / 2 / 2**0.5
    rotated = image.rotate(angle, Image.Resampling.BICUBIC)
    box = (x - side, y - side, x + side, y + side)
    picture = rotated.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    levels = np.array(picture.point(lambda level: round(level * light)))
    return torch.from_numpy(levels).permute(2, 0, 1)


def draw(rows: dict[str, Tensor]) -> Figure:
    """One row of images under the other, each with its title."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.7 * columns + 0.9, 1.75 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (title, images) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(title, fontsize=12)
        for ax, image in zip(axes, images, strict=True):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--policy", type=Path, help="policy.json of a run; without one a policy is learned")
    add("--epochs", type=int, default=500, help="of that training")
    add("--light", type=float, default=1.0, help="of the target domain, in (0, 1]")
    add("--strength", type=float, default=2.0, help="operations an image")
    add("--columns", type=int, default=5, help="photographs, at most five")
    add("--seed", type=int, default=0, help="of the angles and of the draws")
    add("--out", type=Path, default=Path("docs/figures/photographs.jpg"))
    options = parser.parse_args(arguments)
    path = options.policy
    if path is None:
        runs = options.out.parent / "strip-run"
        train.main(
            ["--data", "digits-rotated", "--train-size", "300", "--epochs", str(options.epochs),
             "--method", "ola", "--quiet", "--out", str(runs)]
        )  # fmt: skip
        path = runs / "ola-seed0" / "policy.json"
    generator = torch.Generator().manual_seed(options.seed)
    learned = load_policy(path)
    learned.strength = options.strength
    uniform = OLAAugment(
        learned.space, max_ops=learned.max_ops, strength=options.strength, generator=generator
    )
    pictures = list(photographs().values())[: options.columns]
    images = torch.stack([square(picture, 0, 1) for picture in pictures])
    rows = {
        "training": images,
        "target domain": torch.stack(
            [square(p, a, options.light) for p, a in zip(pictures, ANGLES, strict=False)]
        ),
        "learned": PolicyTransform(learned, generator=generator).augment(images)[0],
        "uniform": uniform.augment(images)[0],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows).savefig(options.out, dpi=110)
    print(f"{options.out}: {path}")


if __name__ == "__main__":
    main()
