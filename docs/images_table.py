"""Write the tables of which images there are, and what each operation does with their channels.

    python docs/images_table.py

Dtypes and modes are those of the package; what an operation does is seen by running it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ola_augment import Operation, PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.kernels.pixel_format import DTYPES
from ola_augment.kernels.table import TABLE, Row
from ola_augment.operations import apply_actions
from ola_augment.transforms.inputs import MODES, WithAlpha

TARGET = Path(__file__).with_name("_images_table.md")
#: Magnitudes that change something, by unit.
SOME = {"": 0.4, "degrees": 90.0, "bits": 3.0, "px": 3.0}
RANGES = {torch.int16: (-1000, 2000)}


def rows(*cells: tuple[str, ...]) -> str:
    """A table in Markdown."""
    head, *rest = cells
    lines = [head, ("---",) * len(head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def images(dtype: torch.dtype, channels: int = 4) -> Tensor:
    """Two images of noise over the whole range."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, channels, 24, 24)
    low, high = RANGES.get(dtype) or DTYPES[dtype]
    values = torch.rand(shape, generator=generator) * (high - low) + low
    return values.to(torch.int32).to(dtype) if not dtype.is_floating_point else values.to(dtype)


def transform(row: Row, **settings: object) -> PolicyTransform:
    """The operation alone, at a magnitude that changes something."""
    magnitude = 100.0 if row.name == "solarize" else SOME[row.unit]
    ends = (magnitude, magnitude) if row.domain else ()
    return PolicyTransform(UniformPolicy(SearchSpace((Operation(row.name, *ends),)), 1), **settings)


def bands(row: Row) -> str:
    """Whether a band of four comes out as it would alone."""
    augment, four = transform(row), images(torch.uint8)
    actions = augment.policy.sample(2, torch.Generator().manual_seed(0))
    actions.keep.fill_(True)
    together = augment.replay(four, actions)
    alone = [augment.replay(four[:, c : c + 1], actions) for c in range(4)]
    if torch.equal(together, torch.cat(alone, 1)):
        return "each as if alone"
    return "all by one grey image"


def alpha(row: Row) -> str:
    """Whether an alpha channel changes."""
    augment, four = transform(row), images(torch.uint8)
    actions = augment.policy.sample(2, torch.Generator().manual_seed(0))
    actions.keep.fill_(True)
    params = {"actions": actions, "batch": (2,)}
    result = augment.transform(four.as_subclass(WithAlpha), params)
    same = torch.equal(result[:, -1].as_subclass(Tensor), four[:, -1])
    return "stays" if same else "follows"


def depths(row: Row) -> str:
    """The dtypes that it runs on."""
    names = []
    for dtype in DTYPES:
        given = RANGES.get(dtype)
        augment = transform(row, value_range=given)
        actions = augment.policy.sample(2)
        apply_actions(images(dtype), augment.space, actions, value_range=given)
        names.append(str(dtype).removeprefix("torch."))
    return "all" if len(names) == len(DTYPES) else ", ".join(names)


def table() -> str:
    """Both tables, in Markdown."""
    kinds = [("images", "black .. white", "channels")]
    for dtype, ends in DTYPES.items():
        shown = "as `value_range` says" if ends is None else f"{ends[0]:g} .. {ends[1]:g}"
        kinds.append((str(dtype).removeprefix("torch."), shown, "any"))
    for mode, (dtype, with_alpha) in MODES.items():
        low, high = DTYPES[dtype]
        bands_of = f"{len(mode)}, the last is alpha" if with_alpha else str(len(mode))
        count = "1" if mode == "I;16" else bands_of
        kinds.append((f"PIL `{mode}`", f"{low:g} .. {high:g}", count))
    operations = [("operation", "bands", "alpha", "depths")]
    operations += [(row.name, bands(row), alpha(row), depths(row)) for row in TABLE.values()]
    return f"{rows(*kinds)}\n{rows(*operations)}"


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
