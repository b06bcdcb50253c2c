"""Real images for the examples, held in memory as uint8 tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from folders import read_folder
from shifts import SHIFTS, shift
from torch import Tensor
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class ImageData:
    """A data set: uint8 images (N, C, H, W), int64 labels (N,), and whether mirroring is safe.

    ``reference``: labelled images of the target domain, if there are any; ``classes``: their names,
    if they have any; ``notes``: what was done to the images, in sentences.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mirror: bool
    reference: tuple[Tensor, Tensor] | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def with_reference(self) -> ImageData:
        """Train on the reference images as well."""
        if self.reference is None:
            return self
        images, labels = self.reference
        return replace(
            self,
            train_images=torch.cat((self.train_images, images)),
            train_labels=torch.cat((self.train_labels, labels)),
        )

    def subset(self, size: int, seed: int) -> ImageData:
        """Keep ``size`` random training images, the same ones for the same seed."""
        if not 1 <= size <= len(self.train_images):
            raise ValueError(f"train size must be in 1 .. {len(self.train_images)}, got {size}")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train_images), generator=generator)[:size]
        return replace(
            self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen]
        )


def load_data(source: str, image_size: int = 32, root: str = "runs/data") -> ImageData:
    """Load ``digits``, ``digits-SHIFT``, ``cifar10``, ``cifar100`` or a folder.

    Args:
        source: which; ``imagefolder:PATH`` is a directory or a zip with train/CLASS/*.jpg and
            test/CLASS/*.jpg and, with labelled images of the target domain,
            reference/CLASS/*.jpg.
        image_size: images of a folder are scaled and centre-cropped to this many pixels a side.
        root: where torchvision keeps its own downloads.

    Raises:
        ValueError: an unknown source, or a folder without images.
        FileNotFoundError: no such path.
    """
    if source == "digits":
        return _digits()
    if source.startswith("digits-") and source.removeprefix("digits-") in SHIFTS:
        return shift(_digits(), source.removeprefix("digits-"))
    if source in ("cifar10", "cifar100"):
        return _cifar(source, root)
    if source.startswith("imagefolder:"):
        path = Path(source.removeprefix("imagefolder:"))
        return _image_folder(path.expanduser(), image_size)  # no shell does so after a colon
    if Path(source).exists():
        raise ValueError(f"a path needs its kind before it: --data imagefolder:{source}")
    names = ", ".join(("digits", *(f"digits-{name}" for name in SHIFTS), "cifar10", "cifar100"))
    raise ValueError(f"data must be {names} or imagefolder:PATH, got {source!r}")


def _digits() -> ImageData:
    """1,797 handwritten digits of 8x8 pixels from scikit-learn, up-sampled to 32x32; test: 797."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images, labels = large.round().to(torch.uint8), torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return ImageData("digits", images[train], labels[train], images[test], labels[test], 10, False)


def _cifar(source: str, root: str) -> ImageData:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source]
    parts = []
    for train in (True, False):
        data = kind(root, train=train, download=True)
        parts += [torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()]
        parts += [torch.tensor(data.targets)]
    return ImageData(source, *parts, num_classes=len(data.classes), mirror=True)


def _image_folder(path: Path, size: int) -> ImageData:
    parts, classes, notes = read_folder(path, size)
    return ImageData(
        path.stem,
        *parts["train"],
        *parts["test"],
        num_classes=len(classes),
        mirror=True,
        reference=parts.get("reference"),
        classes=classes,
        notes=notes,
    )


class Batches:
    """Shuffled batches of tensors in memory, another order on every pass.

    The last, smaller batch is left out unless it is the only one. Images come several times in a
    batch where others are counted that make it larger.

    Args:
        others: images that a learner holds out for a while: the number of batches of a pass is that
            of all images from the start.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        others: int = 0,
    ) -> None:
        self.dataset = TensorDataset(images, labels)
        self.batch_size = min(batch_size, len(images) + others)
        self.generator = torch.Generator().manual_seed(seed)
        self.others = others

    def __len__(self) -> int:
        return (len(self.dataset) + self.others) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(self.dataset)
        needed = len(self) * self.batch_size
        orders = [torch.randperm(size, generator=self.generator) for _ in range(-(-needed // size))]
        for index in torch.cat(orders)[:needed].split(self.batch_size):
            yield self.dataset[index]


class Preprocess:
    """The default pre-processing: pad-4 random crop, a mirror where safe, then normalisation.

    Each image of a batch gets its own. With ``cutout`` a square of that many pixels becomes 0 after
    normalisation. ``test`` only normalises.
    """

    def __init__(self, data: ImageData, seed: int, padding: int = 4, cutout: int = 0) -> None:
        pixels = data.train_images.float() / 255
        self.mean = pixels.mean((0, 2, 3))[:, None, None]
        self.std = pixels.std((0, 2, 3))[:, None, None]
        self.mirror = data.mirror
        self.padding = padding
        self.cutout = cutout
        self.generator = torch.Generator().manual_seed(seed)

    def test(self, images: Tensor) -> Tensor:
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() / 255 - mean) / std

    def __call__(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        shifts = torch.randint(2 * self.padding + 1, (2, n, 1), generator=self.generator)
        rows = shifts[0] + torch.arange(height)
        columns = shifts[1] + torch.arange(width)
        if self.mirror:
            mirrored = torch.rand(n, 1, generator=self.generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (self.padding,) * 4)
        examples = torch.arange(n)[:, None, None]
        index = (examples, rows[:, :, None], columns[:, None, :])
        index = tuple(part.to(images.device) for part in index)
        cropped = padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2)
        normalised = self.test(cropped.contiguous())
        if not self.cutout:
            return normalised
        inside = []
        for side in (height, width):
            centers = torch.randint(side, (n, 1), generator=self.generator)
            offsets = torch.arange(side) - centers + self.cutout // 2
            inside.append((offsets >= 0) & (offsets < self.cutout))
        hole = (inside[0][:, :, None] & inside[1][:, None, :]).to(images.device)
        return normalised.masked_fill(hole[:, None], 0)
