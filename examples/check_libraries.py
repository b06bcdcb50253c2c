"""Hold the augmentations of other libraries, and ours, to ``ola_augment.testing.check_transform``.

    python examples/check_libraries.py
    python examples/check_libraries.py --library albumentations --examples 200

Every transform gets the images that its library documents: floats for kornia, single uint8 or
float32 images for albumentations, which is left out where it is not installed. All checks that
apply are made on colour images of 12 to 24 pixels; then, whether it runs at all on what is rare: a
side of one pixel, one channel, an empty batch. The table says what failed, with the smallest image
that shows it. A finding is not always a bug, some are what the library documents.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

import ola_augment
from ola_augment.testing import CHECKS, check_transform, images

UINT8, FLOATS = (torch.uint8,), (torch.float32,)


@dataclass
class Case:
    name: str
    transform: Callable[[Tensor], Any]
    images: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def by_pillow(function: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    """A reference: each image through Pillow."""

    def run(x: Tensor) -> Tensor:
        flat = [tvf.pil_to_tensor(function(tvf.to_pil_image(image)))
                for image in x.reshape(-1, *x.shape[-3:])]  # fmt: skip
        return torch.stack(flat).reshape(x.shape) if flat else x.clone()

    return run


def ours() -> Iterator[Case]:
    for name in ("OLAAugment", "UniformAugment", "RandAugment", "TrivialAugment"):
        yield Case(name, getattr(ola_augment, name)(), {"dtypes": UINT8 + FLOATS})


def torchvision() -> Iterator[Case]:
    any_image, uint8 = {"dtypes": UINT8 + FLOATS}, {"dtypes": UINT8}
    for name in ("RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix"):
        yield Case(name, getattr(v2, name)(), any_image)
    neutral: dict[str, tuple[v2.Transform, v2.Transform]] = {
        "ColorJitter": (v2.ColorJitter(0.5, 0.5, 0.5, 0.2), v2.ColorJitter((1, 1), (1, 1), (1, 1))),
        "RandomRotation": (v2.RandomRotation(30), v2.RandomRotation((0, 0))),
        "RandomAffine": (v2.RandomAffine(30, (0.1, 0.1), shear=10), v2.RandomAffine(0)),
        "RandomAdjustSharpness": (
            v2.RandomAdjustSharpness(1.5, p=1),
            v2.RandomAdjustSharpness(1, p=1),
        ),
    }
    for name, (transform, identity) in neutral.items():
        yield Case(name, transform, any_image, {"neutral": identity})
    pillow: dict[str, tuple[v2.Transform, Callable[[Image.Image], Image.Image]]] = {
        "RandomEqualize": (v2.RandomEqualize(1), ImageOps.equalize),
        "RandomAutocontrast": (v2.RandomAutocontrast(1), ImageOps.autocontrast),
        "RandomInvert": (v2.RandomInvert(1), ImageOps.invert),
        "RandomSolarize": (v2.RandomSolarize(100, 1), lambda im: ImageOps.solarize(im, 100)),
        "RandomPosterize": (v2.RandomPosterize(3, 1), lambda im: ImageOps.posterize(im, 3)),
    }
    for name, (transform, function) in pillow.items():
        yield Case(name, transform, uint8, {"reference": by_pillow(function)})
    for transform in (
        v2.GaussianBlur(3),
        v2.ElasticTransform(),
        v2.RandomPerspective(p=1),
        v2.RandomErasing(p=1),
        v2.RandomGrayscale(1),
        v2.RandomPhotometricDistort(p=1),
    ):
        yield Case(type(transform).__name__, transform, any_image)


class Replayed:
    """A kornia augmentation that remembers what it drew."""

    def __init__(self, augmentation: K.AugmentationBase2D) -> None:
        self.augmentation = augmentation
        self.drawn: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        out = self.augmentation(x)
        self.drawn = dict(self.augmentation._params)
        return out

    def replay(self, x: Tensor, index: int | None) -> Tensor:
        drawn = dict(self.drawn)
        if index is not None:
            batch = len(drawn["batch_prob"])
            drawn = {
                key: value[index : index + 1] if value.ndim and len(value) == batch else value
                for key, value in drawn.items()
            }
            drawn["forward_input_shape"] = torch.tensor([1, *x.shape])
        return self.augmentation(x, params=drawn)


def kornia() -> Iterator[Case]:
    neutral: dict[str, K.AugmentationBase2D] = {
        "RandomBrightness": K.RandomBrightness((1.0, 1.0), p=1, keepdim=True),
        "RandomContrast": K.RandomContrast((1.0, 1.0), p=1, keepdim=True),
        "RandomSaturation": K.RandomSaturation((1.0, 1.0), p=1, keepdim=True),
        "RandomRotation": K.RandomRotation(0.0, p=1, keepdim=True),
        "RandomAffine": K.RandomAffine(0.0, p=1, keepdim=True),
        "RandomShear": K.RandomShear(0.0, p=1, keepdim=True),
    }
    needed: dict[str, dict[str, Any]] = {
        "RandomBrightness": {"brightness": (0.5, 1.5)},
        "RandomContrast": {"contrast": (0.5, 1.5)},
        "RandomSaturation": {"saturation": (0.5, 1.5)},
        "RandomRotation": {"degrees": 30.0},
        "RandomAffine": {"degrees": 30.0, "translate": (0.1, 0.1)},
        "RandomShear": {"shear": 10.0},
        "RandomTranslate": {"translate_x": (0.0, 0.2)},
        "RandomGaussianBlur": {"kernel_size": (3, 3), "sigma": (0.1, 2.0)},
        "RandomMotionBlur": {"kernel_size": (3, 7), "angle": 30.0, "direction": 0.5},
    }
    for name in (
        *needed,
        "RandomAutoContrast",
        "RandomBoxBlur",
        "RandomChannelDropout",
        "RandomChannelShuffle",
        "RandomElasticTransform",
        "RandomEqualize",
        "RandomErasing",
        "RandomGaussianNoise",
        "RandomHorizontalFlip",
        "RandomHue",
        "RandomInvert",
        "RandomMedianBlur",
        "RandomPerspective",
        "RandomPosterize",
        "RandomSharpness",
        "RandomSolarize",
        "ColorJiggle",
    ):
        made = Replayed(getattr(K, name)(**needed.get(name, {}), p=1.0, keepdim=True))
        arguments: dict[str, Any] = {"replay": made.replay}
        if name in neutral:
            arguments["neutral"] = neutral[name]
        yield Case(name, made, {"dtypes": FLOATS}, arguments)


class Albumentation:
    """An albumentations transform on tensors (C, H, W), and what it drew."""

    def __init__(self, transform: Any) -> None:
        import albumentations

        self.replay_from = albumentations.ReplayCompose.replay
        self.compose = albumentations.ReplayCompose([transform])
        self.drawn: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        out = self.compose(image=np.ascontiguousarray(x.permute(1, 2, 0).numpy()))
        self.drawn = out["replay"]
        return _tensor(out["image"])

    def replay(self, x: Tensor, index: int | None) -> Tensor:
        array = np.ascontiguousarray(x.permute(1, 2, 0).numpy())
        return _tensor(self.replay_from(self.drawn, image=array)["image"])


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)


def albumentations() -> Iterator[Case]:
    try:
        import albumentations as A
    except ImportError:
        return
    single = {"dtypes": UINT8 + FLOATS, "batch": False}
    limits = {"brightness_limit": (0, 0), "contrast_limit": (0, 0)}
    neutral = {
        "RandomBrightnessContrast": A.RandomBrightnessContrast(**limits, p=1),
        "Rotate": A.Rotate((0, 0), p=1),
        "Affine": A.Affine(scale=1, p=1),
    }
    for transform in (
        A.RandomBrightnessContrast(p=1),
        A.Rotate(30, p=1),
        A.Affine(rotate=(-30, 30), shear=(-10, 10), p=1),
        A.HueSaturationValue(p=1),
        A.ColorJitter(p=1),
        A.Equalize(p=1),
        A.AutoContrast(p=1),
        A.CLAHE(p=1),
        A.Posterize(p=1),
        A.Solarize(p=1),
        A.InvertImg(p=1),
        A.Sharpen(p=1),
        A.GaussianBlur(p=1),
        A.GaussNoise(p=1),
        A.ElasticTransform(p=1),
        A.Perspective(p=1),
        A.CoarseDropout(p=1),
        A.HorizontalFlip(p=1),
    ):
        made, name = Albumentation(transform), type(transform).__name__
        arguments: dict[str, Any] = {"replay": made.replay, "seed": made.compose.set_random_seed}
        if name in neutral:
            arguments["neutral"] = Albumentation(neutral[name])
        yield Case(name, made, single, arguments)


LIBRARIES = {
    "ola_augment": ours,
    "torchvision v2": torchvision,
    "kornia": kornia,
    "albumentations": albumentations,
}


def findings(case: Case, examples: int) -> tuple[int, list[str]]:
    """How many checks were made, and what failed."""
    ordinary = images(channels=[3], sides=(12, 24), **case.images).filter(lambda x: x.numel() > 0)
    rare = images(sides=(1, 4), **case.images)
    needed = {"replay", "neutral", "reference"} - set(case.arguments)
    if isinstance(case.transform, ola_augment.PolicyTransform):
        needed = {"reference"}
    plan = [(name, name, ordinary) for name in CHECKS if name not in needed]
    plan.append(("rare images", "shape", rare))
    failed: dict[str, list[str]] = {}
    for label, check, tried in plan:
        try:
            check_transform(
                case.transform,
                checks=[check],
                images=tried,
                max_examples=examples,
                **case.arguments,
            )
        except AssertionError as error:
            message = str(error).split("\n")[1].removeprefix(f"{check}: ")
            failed.setdefault(message, []).append(label)
    return len(plan), [
        f"{', '.join(labels)}: `{shorten(message, 150, placeholder=' ...')}`"
        for message, labels in failed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=list(LIBRARIES))
    parser.add_argument("--examples", type=int, default=20, help="images for each check")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| library | transform | checks | what failed |\n|---|---|---|---|")
    for library in options.library:
        for case in LIBRARIES[library]():
            made, failed = findings(case, options.examples)
            shown = "<br>".join(failed).replace("|", "/")
            row = f"| {library} | {case.name} | {made} | {shown} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
