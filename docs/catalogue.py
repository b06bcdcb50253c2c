"""Explain every built-in operation with a picture, for the page on operations.

Called by the documentation's build; the rows are those of ``ola_augment.kernels.table``, the
magnitudes WideLong's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from operations_table import magnitudes
from PIL import Image
from sklearn.datasets import load_sample_image

from ola_augment import Actions, SearchSpace
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions
from ola_augment.summary import magnitude_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

#: Of WideLong's 0 .. 30: what a policy draws often, not the end of the range.
BINS = (6, 14)
WHAT = {
    "identity": "Changes nothing; a policy that draws it augments less.",
    "auto_contrast": "Stretches the levels of each channel to the full range.",
    "equalize": "Spreads the levels of each channel so that all are about equally frequent.",
    "rotate": "Turns the image about its centre.",
    "solarize": "Inverts the levels from a threshold on; a threshold of 256 changes nothing.",
    "color": "Blends with the grey image: below 1 paler, above 1 more saturated.",
    "posterize": "Keeps the highest bits of each level; 8 bits change nothing.",
    "contrast": "Blends with the mean grey: below 1 flatter, above 1 stronger.",
    "brightness": "Multiplies the levels: below 1 darker, above 1 brighter.",
    "sharpness": "Blends with a smoothed image: below 1 blurred, above 1 sharpened.",
    "shear_x": "Moves each row sideways, the farther the lower it lies.",
    "shear_y": "Moves each column up or down, the farther the more to the right it lies.",
    "translate_x": "Moves the image sideways.",
    "translate_y": "Moves the image up or down.",
    "blur": "The mean of the 16 pixels around each 3 x 3 pixels; two pixels at the border stay.",
    "invert": "The negative.",
    "flip_lr": "Mirrors left and right.",
    "flip_ud": "Mirrors top and bottom.",
    "cutout": "Blackens a square at a random place.",
}


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


def ranges(name: str) -> str:
    """What a magnitude may be in the two spaces."""
    spaces = {"RandAugment": SearchSpace.rand_augment(), "WideLong": SearchSpace.wide_long()}
    texts = {title: magnitudes(TABLE[name], space) for title, space in spaces.items()}
    if set(texts.values()) <= {"-", ""}:
        return "" if "" not in texts.values() else " In WideLong only."
    named = [f"{title} {text.removesuffix(', whole')}" for title, text in texts.items() if text]
    return f" Range: {'; '.join(named)}."


def write(folder: Path) -> None:
    """Write a picture for each operation, and ``catalogue.md`` that shows them."""
    from pillow_reference import PILLOW

    folder.mkdir(parents=True, exist_ok=True)
    photograph = Image.fromarray(load_sample_image("china.jpg")[60:380, 120:440]).resize((96, 96))
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]
    space = SearchSpace.wide_long()
    lines, differ = [], 0
    for index, operation in enumerate(space.operations):
        bins = BINS if operation.low is not None else BINS[-1:]
        sheet = Image.new("RGB", (100 * (len(bins) + 1), 96), "white")
        sheet.paste(photograph, (0, 0))
        texts = []
        for column, magnitude_bin in enumerate(bins, start=1):
            ours = apply_actions(pixels, space, actions(index, magnitude_bin))[0]
            picture = Image.fromarray(ours.permute(1, 2, 0).numpy())
            magnitude = operation.magnitude(magnitude_bin, space.num_magnitude_bins, 96, 96)
            theirs = PILLOW[operation.name](
                photograph, magnitude, (0.5, 0.5), Image.Resampling.NEAREST, (0, 0, 0)
            )
            sheet.paste(picture, (100 * column, 0))
            differ += int((np.array(picture) != np.array(theirs)).sum())
            texts.append(magnitude_text(operation, magnitude))
        sheet.save(folder / f"{operation.name}.png")
        shown = f" with {', '.join(texts)}" if any(texts) else ""
        lines.append(
            f"### {operation.name}\n\n{WHAT[operation.name]}{ranges(operation.name)}\n\n"
            f"![{operation.name}: the original, then{shown or ' the result'}]"
            f"(generated/{operation.name}.png)\n\n" + (f"Shown{shown}.\n" if shown else "")
        )
    text = f"Of the values in the pictures above, {differ} differ from Pillow's.\n"
    (folder / "pillow.md").write_text(text, encoding="utf-8")
    (folder / "catalogue.md").write_text("\n".join(lines), encoding="utf-8")
