"""A data set of photographs for a target domain that differs: another light, another angle.

    python examples/photographs.py PATH
    python examples/train.py --data imagefolder:PATH --method none uniform ola

Crops of five photographs that scikit-learn and scikit-image ship are to be told apart. Those to
train on are upright and well lit; those of the target domain are rotated by up to 60 degrees and
darkened to 0.25 to 0.6 of their light. Training and target crops come from different parts of
each photograph. Writes ``train/CLASS``, ``test/CLASS`` (target domain) and ``reference/CLASS``
(labelled images of the target domain).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

#: Where the photographs come from, all of them free to use: "China" by Arvind Balaraman and
#: "Flower" by dotMorten (CC BY, scikit-learn); NASA's portrait of Eileen Collins (public domain),
#: "Chelsea" by Stefan van der Walt and "Coffee" by Rachel Michetti (CC0, scikit-image).
PHOTOGRAPHS = ("china", "flower", "astronaut", "chelsea", "coffee")


def photographs() -> dict[str, Image.Image]:
    """The photographs by name."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    found = (china, flower, data.astronaut(), data.chelsea(), data.coffee())
    return {
        name: Image.fromarray(np.asarray(image)[..., :3])
        for name, image in zip(PHOTOGRAPHS, found, strict=True)
    }


def crop(image: Image.Image, rng: np.random.Generator, side: int, size: int, shifted: bool):
    """A random square of ``side`` pixels, scaled to ``size``; of the target domain if shifted.

    The left 60 % of a photograph are for training, the rest is the target domain's; a rotated
    square is cut out of the photograph whole, so that it has no empty corners.
    """
    border = int(image.width * 0.6)
    left, right = (border, image.width) if shifted else (0, border)
    angle = rng.uniform(-60, 60) if shifted else 0.0
    reach = side / 2 * (abs(np.cos(np.radians(angle))) + abs(np.sin(np.radians(angle))))
    x = rng.uniform(left + reach, right - reach)
    y = rng.uniform(reach, image.height - reach)
    turned = image.rotate(angle, Image.Resampling.BICUBIC, center=(x, y)) if shifted else image
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    picture = turned.resize((size, size), Image.Resampling.BICUBIC, box=box)
    light = rng.uniform(0.25, 0.6) if shifted else 1.0
    return picture.point(lambda level: round(level * light))


def write(
    path: Path, *, train: int, test: int, reference: int, side: int, size: int, seed: int
) -> None:
    """Write the data set; the numbers are those of crops a class."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test), ("reference", reference)):
        for name, image in photographs().items():
            folder = path / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                picture = crop(image, rng, side, size, part != "train")
                picture.save(folder / f"{index:03}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", type=Path)
    add("--train", type=int, default=81, help="crops a class")
    add("--test", type=int, default=120, help="crops a class")
    add("--reference", type=int, default=12, help="crops a class")
    add("--side", type=int, default=96, help="pixels a side that a crop covers")
    add("--size", type=int, default=32, help="pixels a side of the files")
    add("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    write(options.pop("path"), **options)


if __name__ == "__main__":
    main()
