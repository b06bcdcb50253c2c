"""Measure what other libraries mean by their augmentations, for the page "Coming from ...".

    pip install albumentations keras nvidia-dali-cuda130 batchgeneratorsv2
    pip install imgaug mmpretrain mmengine mmcv-lite
    python examples/coming_from.py                        # those that are installed
    python examples/coming_from.py --library keras timm

Each library gets the same small images: a dot right of the centre is turned, a vertical line is
sheared, a step is shifted, and contrast and equalize are compared with what they might mean. Then
which global seeds decide a random call, and whether the images of a batch draw for themselves.
"""

from __future__ import annotations

import argparse
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import torch
from PIL import Image, ImageOps

Array = np.ndarray
SIDE, PIXELS, DEGREES, SHEAR = 65, 6, 20.0, 0.3
COLUMNS = ("rotate", "shear x", "translate x", "contrast towards", "equalize", "seeds", "batch")


@dataclass
class Library:
    """Functions of uint8 images (H, W, 3); None where the library has no such thing."""

    name: str
    version: str
    rotate: Callable[[Array], Array]
    shear: Callable[[Array], Array] | None
    translate: Callable[[Array], Array] | None
    contrast: Callable[[Array], Array]
    equalize: Callable[[Array], Array] | None
    draw: Callable[[Array], Array]
    batch: Callable[[Array], Array] | None


def images() -> dict[str, Array]:
    dot, line, step, halves = (np.zeros((SIDE, SIDE, 3), np.uint8) for _ in range(4))
    dot[30:35, 50:55] = line[:, 31:34] = step[:, 31:34] = 255
    halves[:, :33], halves[:, 33:] = (60, 160, 20), (140, 200, 60)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return {"dot": dot, "line": line, "step": step, "halves": halves, "smooth": smooth}


def centre(rows: Array) -> tuple[float, float]:
    weights = rows.astype(float).sum(-1)
    y, x = np.mgrid[: weights.shape[0], : weights.shape[1]]
    total = max(weights.sum(), 1.0)
    return float((y * weights).sum() / total), float((x * weights).sum() / total)


def turned(result: Array) -> str:
    return "counter-clockwise" if centre(result)[0] < SIDE // 2 else "clockwise"


def sheared(result: Array) -> str:
    top, middle, bottom = (centre(result[at : at + 3])[1] - 32 for at in (4, 31, 58))
    fixed = "centre" if abs(middle) < 1.5 else "top" if abs(top) < 3 else "elsewhere"
    return f"bottom to the {'right' if bottom > top else 'left'}, {fixed} stays"


def shifted(result: Array) -> str:
    return "to the right" if centre(result)[1] > 32 else "to the left"


def pivot(given: Array, result: Array) -> str:
    """What contrast leaves as it is, from what it makes of two levels of red."""
    x, y = given[5, [5, 60], 0].astype(float), result[5, [5, 60], 0].astype(float)
    factor = (y[1] - y[0]) / (x[1] - x[0])
    found = (y[0] - factor * x[0]) / (1 - factor)
    levels = given.astype(float)
    meant = {
        "the grey mean": (levels @ (0.299, 0.587, 0.114)).mean(),
        "each channel's mean": levels[..., 0].mean(),
        "the mean of all values": levels.mean(),
        "mid-grey": 127.5,
        "black": 0.0,
    }
    nearest = min(meant, key=lambda name: abs(meant[name] - found))
    return nearest if abs(meant[nearest] - found) < 4 else f"level {found:.0f}"


def equalized(given: Array, result: Array) -> str:
    pillow = np.asarray(ImageOps.equalize(Image.fromarray(given))).astype(int)
    off = int(abs(pillow - result).max())
    return "as Pillow" if off == 0 else f"off Pillow by up to {off}"


SEEDS: dict[str, Callable[[int], object]] = {
    "torch": torch.manual_seed,
    "NumPy": lambda seed: np.random.seed(seed),  # noqa: NPY002 - what others draw from
    "random": random.seed,
}


def seeds(draw: Callable[[Array], Array], image: Array) -> str:
    """Which of the global generators a call draws from."""

    def drawn(others: str | None, value: int) -> list[Array]:
        for name, seed in SEEDS.items():
            seed(value if name == others else 0)
        return [np.asarray(draw(image)) for _ in range(4)]

    def same(one: list[Array], other: list[Array]) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    first = drawn(None, 0)
    if not same(first, drawn(None, 0)):
        return "its own"
    return " and ".join(name for name in SEEDS if not same(first, drawn(name, 1))) or "its own"


def contrasted(library: Library, image: Array) -> Array:
    """With a factor that tells, where it is drawn."""
    for _ in range(50):
        result = library.contrast(image)
        if abs(result[5, 60, 0].astype(int) - image[5, 60, 0]) > 8:
            break
    return result


def row(library: Library) -> list[str]:
    given = images()
    cells = [
        turned(library.rotate(given["dot"])),
        sheared(library.shear(given["line"])) if library.shear else "none",
        shifted(library.translate(given["step"])) if library.translate else "none",
        pivot(given["halves"], contrasted(library, given["halves"])),
        equalized(given["smooth"], library.equalize(given["smooth"]))
        if library.equalize
        else "none",
        seeds(library.draw, given["smooth"]),
    ]
    if library.batch is None:
        return [*cells, "one image a call"]
    result = library.batch(np.stack([given["smooth"]] * 12))
    differ = len(np.unique(result.reshape(12, -1), axis=0)) > 1
    return [*cells, "each image draws" if differ else "one draw a batch"]


def chw(image: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3)))


def hwc(image: torch.Tensor) -> Array:
    return np.moveaxis(image.detach().numpy(), -3, -1)


def ola_augment() -> Library:
    from ola_augment import Operation, PolicyTransform, RandAugment, SearchSpace, UniformPolicy

    def one(name: str, *ends: float) -> Callable[[Array], Array]:
        policy = UniformPolicy(SearchSpace((Operation(name, *ends),)), 1, 1.0)
        return lambda image: hwc(PolicyTransform(policy)(chw(image)))

    random_ones = RandAugment()
    return Library(
        *("ola_augment", version("ola_augment"), one("rotate", DEGREES, DEGREES)),
        *(one("shear_x", SHEAR, SHEAR), one("translate_x", PIXELS, PIXELS)),
        *(one("contrast", 0.5, 0.5), one("equalize")),
        *(lambda image: hwc(random_ones(chw(image))), lambda batch: hwc(random_ones(chw(batch)))),
    )


def torchvision() -> Library:
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as tvf

    def affine(image: Array, shift: int, shear: float) -> Array:
        options = {"angle": 0.0, "translate": [shift, 0], "scale": 1.0, "shear": [shear, 0.0]}
        return hwc(tvf.affine(chw(image), **options, center=[0, 0]))

    random_ones = v2.RandAugment()
    degrees = float(np.degrees(np.arctan(SHEAR)))
    return Library(
        *("torchvision", version("torchvision"), lambda x: hwc(tvf.rotate(chw(x), DEGREES))),
        *(lambda x: affine(x, 0, degrees), lambda x: affine(x, PIXELS, 0.0)),
        lambda x: hwc(tvf.adjust_contrast(chw(x), 0.5)),
        *(lambda x: hwc(tvf.equalize(chw(x))), lambda x: hwc(random_ones(chw(x)))),
        lambda batch: hwc(random_ones(chw(batch))),
    )


def timm() -> Library:
    from timm.data import auto_augment as aa

    def on(function: Callable[..., Image.Image], *arguments: float) -> Callable[[Array], Array]:
        options = {"fillcolor": (0, 0, 0), "resample": Image.Resampling.BILINEAR}
        takes = options if function not in (aa.contrast, aa.equalize) else {}
        return lambda x: np.asarray(function(Image.fromarray(x), *arguments, **takes))

    augment = aa.rand_augment_transform("rand-m9-mstd0.5-n4", {})
    return Library(
        *("timm", version("timm"), on(aa.rotate, DEGREES), on(aa.shear_x, SHEAR)),
        *(on(aa.translate_x_abs, PIXELS), on(aa.contrast, 0.5), on(aa.equalize)),
        *(lambda x: np.asarray(augment(Image.fromarray(x))), None),
    )


def kornia() -> Library:
    import kornia.augmentation as K

    def on(augmentation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Array], Array]:
        def run(x: Array) -> Array:
            result = augmentation(chw(x).float().div(255).reshape(-1, 3, SIDE, SIDE))
            return hwc(result.mul(255).round().byte().reshape(chw(x).shape))

        return run

    degrees, share = float(np.degrees(np.arctan(SHEAR))), PIXELS / SIDE
    augment = on(K.auto.RandAugment(n=2, m=9))
    return Library(
        *("kornia", version("kornia"), on(K.RandomRotation((DEGREES, DEGREES), p=1.0))),
        on(K.RandomShear((degrees, degrees), p=1.0, align_corners=True)),
        on(K.RandomTranslate((share, share), p=1.0, align_corners=True)),
        *(on(K.RandomContrast((0.5, 0.5), p=1.0)), on(K.RandomEqualize(p=1.0)), augment, augment),
    )


def albumentations() -> Library:
    import albumentations as A

    def on(transform: A.BasicTransform) -> Callable[[Array], Array]:
        return lambda x: A.Compose([transform])(image=x)["image"]

    degrees = float(np.degrees(np.arctan(SHEAR)))
    contrast = {"brightness_limit": (0, 0), "contrast_limit": (-0.5, -0.5)}
    return Library(
        *("albumentations", version("albumentations"), on(A.Rotate((DEGREES, DEGREES), p=1))),
        on(A.Affine(shear={"x": (degrees, degrees), "y": (0, 0)}, p=1)),
        on(A.Affine(translate_px={"x": (PIXELS, PIXELS), "y": (0, 0)}, p=1)),
        *(on(A.RandomBrightnessContrast(**contrast, p=1)), on(A.Equalize(p=1))),
        *(on(A.Rotate((-90, 90), p=1)), None),
    )


def keras() -> Library:
    from keras import layers

    def on(layer: layers.Layer) -> Callable[[Array], Array]:
        def run(x: Array) -> Array:
            batch = x.reshape(-1, SIDE, SIDE, 3).astype(np.float32)
            result = layer(batch, training=True)
            return np.asarray(result.cpu()).round().astype(np.uint8).reshape(x.shape)

        return run

    share = PIXELS / SIDE
    augment = on(layers.RandAugment())
    return Library(
        *("keras", version("keras"), on(layers.RandomRotation((DEGREES / 360, DEGREES / 360)))),
        on(layers.RandomShear(x_factor=(SHEAR, SHEAR), fill_mode="constant")),
        on(layers.RandomTranslation(0.0, (share, share), fill_mode="constant")),
        *(on(layers.RandomContrast((0.5, 0.5))), on(layers.Equalization()), augment, augment),
    )


def mmpretrain() -> Library:
    from mmpretrain.datasets.transforms import auto_augment as aa

    def on(transform: Callable[[dict[str, Array]], dict[str, Array]]) -> Callable[[Array], Array]:
        return lambda x: transform({"img": x.copy()})["img"]

    always = {"prob": 1.0, "random_negative_prob": 0.0}
    return Library(
        *("mmpretrain", version("mmpretrain"), on(aa.Rotate(angle=DEGREES, **always))),
        on(aa.Shear(magnitude=SHEAR, direction="horizontal", **always)),
        on(aa.Translate(magnitude=PIXELS / SIDE, direction="horizontal", **always)),
        on(aa.Contrast(magnitude=-0.5, **always)),
        *(on(aa.Equalize(prob=1.0)), on(aa.Rotate(magnitude_range=(0, 90), magnitude_std="inf"))),
        None,
    )


def imgaug() -> Library:
    # The names that its last version needs of NumPy before 2.0.
    kinds = {"float": [np.float32], "int": [np.int32], "uint": [np.uint8]}
    setattr(np, "sctypes", kinds)  # noqa: B010 - it is not there to be assigned
    from imgaug import augmenters as iaa

    def on(augmenter: iaa.Augmenter) -> Callable[[Array], Array]:
        return lambda x: augmenter.augment_image(x)

    degrees = float(np.degrees(np.arctan(SHEAR)))
    turn = iaa.Affine(rotate=(-90, 90))
    return Library(
        *("imgaug", version("imgaug"), on(iaa.Affine(rotate=DEGREES))),
        *(on(iaa.Affine(shear={"x": degrees})), on(iaa.Affine(translate_px={"x": PIXELS}))),
        *(on(iaa.LinearContrast(0.5)), on(iaa.pillike.Equalize())),
        *(on(turn), lambda batch: np.stack(turn.augment_images(list(batch)))),
    )


def batchgeneratorsv2() -> Library:
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    def on(transform: Callable[..., dict[str, torch.Tensor]]) -> Callable[[Array], Array]:
        def run(x: Array) -> Array:
            result = transform(image=chw(x).float())["image"]
            return hwc(result.round().clamp(0, 255).byte())

        return run

    def turn(rotation: object) -> Callable[[Array], Array]:
        spatial = {"patch_size": (SIDE, SIDE), "patch_center_dist_from_border": 0}
        return on(SpatialTransform(**spatial, random_crop=False, p_rotation=1, rotation=rotation))

    return Library(
        *("batchgeneratorsv2", version("batchgeneratorsv2"), turn(float(np.radians(DEGREES)))),
        *(None, None, on(ContrastTransform(0.5, False, True)), None, turn((-1.5, 1.5)), None),
    )


def dali() -> Library:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.auto_aug import augmentations, rand_augment

    def on(function: Callable[..., object], conditionals: bool = False) -> Callable[[Array], Array]:
        @pipeline_def(num_threads=1, device_id=None, enable_conditionals=conditionals)
        def pipeline(batch: list[Array]) -> object:
            return function(fn.external_source(source=lambda: batch, layout="HWC"))

        def run(x: Array) -> Array:
            batch = list(x.reshape(-1, SIDE, SIDE, 3))
            pipe = pipeline(batch, batch_size=len(batch))
            pipe.build()
            (out,) = pipe.run()
            return np.stack([np.array(out.at(i)) for i in range(len(batch))]).reshape(x.shape)

        return run

    def warp(matrix: object) -> Callable[..., object]:
        return lambda x: fn.warp_affine(x, matrix(), fill_value=0, inverse_map=False)  # type: ignore[operator]

    contrast = augmentations.contrast.augmentation(mag_range=(-0.5, -0.5), randomly_negate=False)

    def two_of_nine(x: object) -> object:
        return rand_augment.rand_augment(x, n=2, m=9)

    augment = on(two_of_nine, conditionals=True)
    turn = on(lambda x: fn.rotate(x, angle=DEGREES, keep_size=True, fill_value=0))
    return Library(
        *("dali", version("nvidia-dali-cuda130"), turn),
        on(warp(lambda: fn.transforms.shear(shear=[SHEAR, 0.0]))),
        on(warp(lambda: fn.transforms.translation(offset=[float(PIXELS), 0.0]))),
        on(lambda x: contrast(x, magnitude_bin=0, num_magnitude_bins=2)),
        on(lambda x: augmentations.equalize(x)),
        *(augment, augment),
    )


LIBRARIES: dict[str, Callable[[], Library]] = {
    made.__name__: made
    for made in (
        *(ola_augment, torchvision, timm, kornia, albumentations, keras),
        *(mmpretrain, imgaug, batchgeneratorsv2, dali),
    )
}


def rows(names: list[str]) -> Iterator[str]:
    """The table's rows, of libraries that are installed; others are said to be missing."""
    for name in names:
        try:
            library = LIBRARIES[name]()
        except (ImportError, AttributeError) as error:
            yield f"<!-- {name} does not import: {str(error).splitlines()[0]} -->"
            continue
        yield f"| {' | '.join((f'{library.name} {library.version}', *row(library)))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=list(LIBRARIES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for line in rows(options.library):
        print(line, flush=True)


if __name__ == "__main__":
    main()
