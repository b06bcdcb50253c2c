"""Draw every built-in operation, ours beside Pillow's, for the page of that name.

Called by the documentation's build; the rows are those of ``ola_augment.kernels.table``, the
magnitudes WideLong's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from ola_augment import Actions, SearchSpace
from ola_augment.operations import apply_actions
from ola_augment.summary import magnitude_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

BINS = (8, 19, 30)


def actions(op: int, magnitude_bin: int) -> Actions:
    """One image, one operation, in the middle of the image."""
    one = torch.ones(1, dtype=torch.int64)
    return Actions(
        num_ops=one,
        ops=op * one[:, None],
        keep=torch.ones(1, 1, dtype=torch.bool),
        magnitude_bins=magnitude_bin * one[:, None],
        signs=torch.ones(1, 1, dtype=torch.int8),
        centers=torch.full((1, 1, 2), 0.5),
        log_prob=torch.zeros(1),
    )


def write(folder: Path) -> None:
    """Write a picture for each operation, and ``catalogue.md`` that shows them."""
    from pillow_reference import PILLOW

    folder.mkdir(parents=True, exist_ok=True)
    photograph = Image.fromarray(load_sample_image("china.jpg")[60:380, 120:440]).resize((96, 96))
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]
    space = SearchSpace.wide_long()
    lines = []
    for index, operation in enumerate(space.operations):
        bins = BINS if operation.low is not None else BINS[-1:]
        sheet = Image.new("RGB", (100 * (len(bins) + 1), 200), "white")
        sheet.paste(photograph, (0, 0))
        texts, differ = [], 0
        for column, magnitude_bin in enumerate(bins, start=1):
            ours = apply_actions(pixels, space, actions(index, magnitude_bin))[0]
            picture = Image.fromarray(ours.permute(1, 2, 0).numpy())
            magnitude = operation.magnitude(magnitude_bin, space.num_magnitude_bins, 96, 96)
            theirs = PILLOW[operation.name](
                photograph, magnitude, (0.5, 0.5), Image.Resampling.NEAREST, (0, 0, 0)
            )
            sheet.paste(picture, (100 * column, 0))
            sheet.paste(theirs, (100 * column, 100))
            differ += int((np.array(picture) != np.array(theirs)).sum())
            texts.append(magnitude_text(operation, magnitude))
        sheet.save(folder / f"{operation.name}.png")
        shown = f" {', '.join(texts)}" if any(texts) else ""
        lines.append(
            f"## {operation.name}\n\n"
            f"![{operation.name}: original, then ours{shown}; below, Pillow's]"
            f"(generated/{operation.name}.png)\n\n"
            + (f"Magnitudes{shown}. " if any(texts) else "")
            + f"Values that differ from Pillow's: {differ}.\n"
        )
    (folder / "catalogue.md").write_text("\n".join(lines), encoding="utf-8")
