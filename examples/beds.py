"""Test beds: small problems on which augmentation helps, hurts, or meets other images."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from data import ImageData, load_data
from shifts import SHIFTS, shift

_whole = functools.lru_cache(maxsize=2)(load_data)


@dataclass(frozen=True)
class Bed:
    """A data set cut to a size, and how long a network is trained on it.

    Attributes:
        source: for ``load_data``; "cifar10", "omniglot" and "photographs" are read from the paths
            given.
        train_size: random training images, another draw for each seed; None is all.
        epochs: passes over them in batches of 64.
        shift: of the target domain, one of ``SHIFTS``.
        model: for ``make_network``.
    """

    source: str
    train_size: int | None
    epochs: int
    shift: str | None = None
    model: str = "small_cnn"

    def load(self, paths: dict[str, str | None], seed: int) -> ImageData:
        """Read it; ``paths`` has folders or zips by source, or None."""
        path = paths.get(self.source)
        data = _whole(f"imagefolder:{path}" if path else self.source)
        if self.source == "omniglot":
            # One channel is all there is; a mirrored character is another one.
            data = replace(
                data,
                train_images=data.train_images[:, :1].contiguous(),
                test_images=data.test_images[:, :1].contiguous(),
                mirror=False,
            )
        if self.shift:
            # A folder's images lie class by class; those that are known are to have some of all.
            data = shift(shuffled(data) if path else data, self.shift)
        return data if self.train_size is None else data.subset(self.train_size, seed)


def shuffled(data: ImageData) -> ImageData:
    """The same test images in another order."""
    order = torch.randperm(len(data.test_labels), generator=torch.Generator().manual_seed(0))
    return replace(data, test_images=data.test_images[order], test_labels=data.test_labels[order])


#: Some 2,000 steps each, but for the characters, which take longer to leave their plateau.
BEDS = {
    "digits-300": Bed("digits", 300, 500),
    "digits-1000": Bed("digits", 1000, 130),
    "rotated": Bed("digits", 300, 500, "rotated"),
    "dark": Bed("digits", 300, 500, "dark"),
    "photographs-60": Bed("photographs", None, 60),
    "photographs-240": Bed("photographs", None, 240),
    "cifar-300": Bed("cifar10", 300, 500),
    "cifar-1000": Bed("cifar10", 1000, 130),
    "cifar-3000": Bed("cifar10", 3000, 44),
    "cifar-10000": Bed("cifar10", 10000, 13),
    "omniglot": Bed("omniglot", None, 140),
    "cifar-4000-resnet18": Bed("cifar10", 4000, 30, model="resnet18"),
    "cifar-4000-wrn": Bed("cifar10", 4000, 30, model="wrn-16-4"),
}
#: Twenty more target domains, of some 1,200 steps each.
SHIFTED = {
    **{f"digits-{name}": Bed("digits", 300, 240, name) for name in list(SHIFTS)[2:]},
    **{f"cifar-{name}": Bed("cifar10", 1000, 75, name) for name in list(SHIFTS)[2:]},
}
BEDS |= SHIFTED

#: What a run of OLA costs over one of the same steps without augmentation, and over one with
#: UniformAugment: where operations are learned, where they stay alike, and where a run is too
#: short for anything.
COST = {"target": (1.15, 1.08), "own": (1.05, 1.0), "short": (1.0, 1.0)}
