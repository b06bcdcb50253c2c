"""Test beds: small problems on which augmentation helps, hurts, or meets other images."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from data import ImageData, load_data

_whole = functools.lru_cache(maxsize=1)(load_data)


@dataclass(frozen=True)
class Bed:
    """A data set cut to a size, and how long the small network is trained on it.

    Attributes:
        source: for ``load_data``; "cifar10" and "omniglot" are read from the paths given.
        train_size: random training images, another draw for each seed; None is all.
        epochs: passes over them in batches of 64.
    """

    source: str
    train_size: int | None
    epochs: int

    def load(self, paths: dict[str, str | None], seed: int) -> ImageData:
        """Read it; ``paths`` has a folder or zip for "cifar10" and "omniglot", or None."""
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
        return data if self.train_size is None else data.subset(self.train_size, seed)


#: Some 2,000 steps each, but for the characters, which take longer to leave their plateau.
BEDS = {
    "digits-300": Bed("digits", 300, 500),
    "digits-1000": Bed("digits", 1000, 130),
    "rotated": Bed("digits-rotated", 300, 500),
    "dark": Bed("digits-dark", 300, 500),
    "cifar-300": Bed("cifar10", 300, 500),
    "cifar-1000": Bed("cifar10", 1000, 130),
    "cifar-3000": Bed("cifar10", 3000, 44),
    "cifar-10000": Bed("cifar10", 10000, 13),
    "omniglot": Bed("omniglot", None, 140),
}
