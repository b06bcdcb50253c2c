"""What torchvision's own tests ask of its automatic augmentations, asked of theirs and of ours.

A check is a function of ``make``, which builds a transform from torchvision's keyword arguments; it
raises where the transform does not do what its one-line docstring says. The set follows
``TestAutoAugmentTransforms`` and the smoke test of torchvision's ``test_transforms_v2.py``, with
further checks of what our transforms promise.
"""

from __future__ import annotations

import copy
import pathlib
import pickle
import random
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from ola_augment import OLAAugment, RandAugment, TrivialAugment, UniformAugment

OURS = {t.__name__: t for t in (OLAAugment, UniformAugment, RandAugment, TrivialAugment)}
THEIRS = {t.__name__: t for t in (v2.RandAugment, v2.TrivialAugmentWide, v2.AutoAugment)}

Make = Callable[..., Any]
CHECKS: dict[str, Callable[[Make], None]] = {}

SEEDS = range(3)
HEIGHT, WIDTH = 12, 10


def check(function: Callable[[Make], None]) -> Callable[[Make], None]:
    CHECKS[function.__doc__.rstrip(".")] = function
    return function


def pixels(*batch: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (*batch, channels, HEIGHT, WIDTH)
    # Soft gradients with some noise: every operation finds something to do.
    ramp = torch.linspace(20, 200, WIDTH).expand(shape)
    return (ramp + torch.rand(shape, generator=generator) * 50).to(torch.uint8)


def pictures() -> list[Any]:
    return [
        pixels(),
        pixels(channels=1),
        tv_tensors.Image(pixels()),
        tv_tensors.Video(pixels(3)),
        tvf.to_pil_image(pixels()),
        tvf.to_pil_image(pixels(channels=1)),
    ]


def seeded(transform: Any, *inputs: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transform(*inputs)


def describe(picture: Any) -> tuple[Any, ...]:
    if isinstance(picture, Image.Image):
        return Image.Image, picture.mode, picture.size
    return type(picture), picture.shape, picture.dtype, picture.device


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Image.Image):
        return a.tobytes() == b.tobytes()
    return bool(torch.equal(a, b))


def tensor(picture: Any) -> torch.Tensor:
    return tvf.pil_to_tensor(picture) if isinstance(picture, Image.Image) else picture


def refuses(kind: type[Exception], function: Callable[[], Any]) -> None:
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


@check
def types(make: Make) -> None:
    """uint8: PIL L and RGB, tensor, `Image`, `Video` come back as what they were."""
    for picture in pictures():
        for seed in SEEDS:
            assert describe(seeded(make(), picture, seed=seed)) == describe(picture)


@check
def floats(make: Make) -> None:
    """float32: the same, and values stay in [0, 1]."""
    for picture in pictures()[:4]:
        given = tvf.to_dtype(picture, torch.float32, scale=True)
        for seed in SEEDS:
            out = seeded(make(), given, seed=seed)
            assert describe(out) == describe(given)
            assert out.min() >= 0
            assert out.max() <= 1


@check
def halves(make: Make) -> None:
    """float16 and bfloat16: the same."""
    for dtype in (torch.float16, torch.bfloat16):
        given = tvf.to_dtype(pixels(), torch.float32, scale=True).to(dtype)
        for seed in SEEDS:
            assert describe(seeded(make(), given, seed=seed)) == describe(given)


@check
def batches(make: Make) -> None:
    """Batch dimensions: (4,), (2, 3), those of videos too."""
    for given in (pixels(4), pixels(2, 3), tv_tensors.Image(pixels(2, 3)),
                  tv_tensors.Video(pixels(2, 3))):  # fmt: skip
        for seed in SEEDS:
            assert describe(seeded(make(), given, seed=seed)) == describe(given)


@check
def empty_batches(make: Make) -> None:
    """Batches without an image: (0,), (2, 0)."""
    for given in (pixels(0), pixels(2, 0), tv_tensors.Video(pixels(0))):
        for seed in range(10):
            assert describe(seeded(make(), given, seed=seed)) == describe(given)


@check
def tiny_images(make: Make) -> None:
    """Images of 1 x 1, 1 x 7 and 2 x 2 pixels."""
    for height, width in ((1, 1), (1, 7), (2, 2)):
        given = pixels()[:, :height, :width]
        for seed in range(10):
            assert describe(seeded(make(), given, seed=seed)) == describe(given)


@check
def devices(make: Make) -> None:
    """The device is kept (each that the machine has)."""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        given = pixels(2).to(device)
        for seed in SEEDS:
            assert describe(seeded(make(), given, seed=seed)) == describe(given)


@check
def structure(make: Make) -> None:
    """Any nesting comes back; what is no image is the same object."""
    Pair = namedtuple("Pair", ["first", "second"])
    rest = {
        "int": 0,
        "float": 0.5,
        "bool": True,
        "none": None,
        "str": "text",
        "path": pathlib.Path(),
        "object": object(),
        "tensor": torch.empty(5),
        "array": np.empty(5),
        "nested": [{"deep": (1, Pair(2, [3]))}],
    }
    for picture in pictures():
        sample = {"image": picture, **rest}
        for container in (sample, list(sample.values()), tuple(sample.values())):
            given, spec = tree_flatten(container)
            out, out_spec = tree_flatten(seeded(make(), container))
            assert out_spec == spec
            assert describe(out[0]) == describe(picture)
            assert all(a is b for a, b in zip(given[1:], out[1:], strict=True))
    image, label = make()(pixels(), 3)
    assert describe(image) == describe(pixels())
    assert label == 3


@check
def first_tensor(make: Make) -> None:
    """Only the first pure tensor is the image, and none beside an explicit image."""
    label, other = torch.arange(3), pixels()
    _, same_label, same_other = make()((pixels(), label, other))
    assert same_label is label
    assert same_other is other
    assert make()((other, tv_tensors.Image(pixels())))[0] is other


@check
def untouched(make: Make) -> None:
    """The input is not written to."""
    for picture in pictures():
        before = copy.deepcopy(picture)
        for seed in SEEDS:
            seeded(make(), picture, seed=seed)
        assert same(picture, before)


@check
def copies(make: Make) -> None:
    """Pickled and deep-copied transforms do the same."""
    transform = make(fill=[3, 2, 1], interpolation=InterpolationMode.BILINEAR)
    for twin in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
        for seed in SEEDS:
            assert same(seeded(transform, pixels(), seed=seed), seeded(twin, pixels(), seed=seed))


@check
def seeds(make: Make) -> None:
    """`torch.manual_seed` decides, and nothing else is drawn from."""
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    outs = [seeded(make(), pixels(), seed=seed) for seed in range(10)]
    again = [seeded(make(), pixels(), seed=seed) for seed in range(10)]
    assert all(map(same, outs, again))
    assert len({out.numpy().tobytes() for out in outs}) > 3
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


@check
def fills(make: Make) -> None:
    """`fill`: None, a number, a list or tuple of one or three, a dictionary by type."""
    by_type = {tv_tensors.Image: [1, 2, 3], Image.Image: 5, "others": None}
    for fill in (None, 7.5, [1], (0, 9.9, 200), by_type):
        transform = make(fill=copy.copy(fill))
        for picture in (pixels(), tv_tensors.Image(pixels()), tvf.to_pil_image(pixels())):
            for seed in SEEDS:
                assert describe(seeded(transform, picture, seed=seed)) == describe(picture)


@check
def interpolations(make: Make) -> None:
    """`interpolation`: NEAREST and BILINEAR by mode, name and Pillow's number."""
    for forms in (
        (InterpolationMode.NEAREST, "nearest", 0),
        (InterpolationMode.BILINEAR, "bilinear", 2, Image.Resampling.BILINEAR),
    ):
        for seed in SEEDS:
            outs = [seeded(make(interpolation=form), pixels(), seed=seed) for form in forms]
            assert all(same(out, outs[0]) for out in outs[1:])


@check
def nearest_exact(make: Make) -> None:
    """`interpolation=NEAREST_EXACT` on tensors and PIL images."""
    for picture in (pixels(), tvf.to_pil_image(pixels())):
        for seed in range(10):
            seeded(make(interpolation=InterpolationMode.NEAREST_EXACT), picture, seed=seed)


@check
def bicubic(make: Make) -> None:
    """`interpolation=BICUBIC` on PIL images."""
    for seed in range(10):
        picture = tvf.to_pil_image(pixels())
        seeded(make(interpolation=InterpolationMode.BICUBIC), picture, seed=seed)


@check
def no_image(make: Make) -> None:
    """A sample without an image is a `TypeError`."""
    for sample in (3, {"label": torch.tensor}, tv_tensors.Mask(torch.zeros(4, 4)), []):
        refuses(TypeError, lambda sample=sample: make()(sample))


@check
def composed(make: Make) -> None:
    """Works in `v2.Compose`, `nn.Sequential` and `v2.RandomApply`."""
    pipeline = v2.Compose([v2.PILToTensor(), make(), v2.ToDtype(torch.float32, scale=True)])
    assert pipeline(tvf.to_pil_image(pixels())).dtype == torch.float32
    assert nn.Sequential(make(), v2.RandomHorizontalFlip())(pixels()).shape == pixels().shape
    assert v2.RandomApply([make()], p=1.0)(pixels()).shape == pixels().shape


@check
def scripts(make: Make) -> None:
    """`torch.jit.script` compiles it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(make())(pixels())


@check
def resized(make: Make) -> None:
    """Takes what a bicubic resize leaves outside [0, 1]."""
    given = nn.functional.interpolate(pixels(1) / 255, scale_factor=2, mode="bicubic")
    given = (given - given.min()) * 1.2 - 0.1
    for seed in SEEDS:
        seeded(make(), given, seed=seed)


@check
def strided(make: Make) -> None:
    """Equal results from any memory layout."""
    given = pixels(2)
    expanded = given[:1].expand(2, -1, -1, -1)
    for other in (given.to(memory_format=torch.channels_last), expanded, given.flip(-1)[..., ::2]):
        for seed in range(10):
            out = seeded(make(), other, seed=seed)
            assert same(out, seeded(make(), other.contiguous(), seed=seed))


@check
def channels_last(make: Make) -> None:
    """channels_last stays."""
    given = pixels(2).to(memory_format=torch.channels_last)
    for seed in range(10):
        out = seeded(make(), given, seed=seed)
        assert out.is_contiguous(memory_format=torch.channels_last)


@check
def pil_like_tensor(make: Make) -> None:
    """A PIL image and the same image as a tensor give equal pixels."""
    for seed in range(10):
        picture = seeded(make(), tvf.to_pil_image(pixels()), seed=seed)
        assert same(tensor(picture), seeded(make(), pixels(), seed=seed))


@check
def own_draws(make: Make) -> None:
    """Each image of a batch gets its own draw."""
    out = seeded(make(), pixels().expand(32, 3, HEIGHT, WIDTH).contiguous())
    assert len(torch.unique(out.flatten(1), dim=0)) > 8


@check
def lists(make: Make) -> None:
    """Each image of a list gets its own draw, whatever their sizes."""
    outs = seeded(make(), [tvf.to_pil_image(pixels())] * 16 + [tvf.to_pil_image(pixels()[:, :5])])
    assert len({out.tobytes() for out in outs[:16]}) > 4
    assert outs[-1].size == (WIDTH, 5)


@check
def annotations(make: Make) -> None:
    """Masks, boxes and key points follow their image."""
    size = (HEIGHT, WIDTH)
    boxes = tv_tensors.BoundingBoxes([[1, 2, 5, 6]], format="XYXY", canvas_size=size)
    points = tv_tensors.KeyPoints([[3, 4]], canvas_size=size)
    sample = tv_tensors.Image(pixels()), tv_tensors.Mask(pixels()[0]), boxes, points
    for seed in SEEDS:
        out = seeded(make(), sample, seed=seed)
        assert [describe(x) for x in out] == [describe(x) for x in sample]


@check
def arrays(make: Make) -> None:
    """A NumPy image (H, W, C) comes back as one."""
    given = pixels().permute(1, 2, 0).contiguous().numpy()
    outs = [seeded(make(), given, seed=seed) for seed in SEEDS]
    assert all(
        (type(out), out.shape, out.dtype) == (np.ndarray, given.shape, np.uint8) for out in outs
    )
    assert any((out != given).any() for out in outs)


@check
def other_integers(make: Make) -> None:
    """int16, int32 and int64 tensors."""
    for dtype in (torch.int16, torch.int32, torch.int64):
        for seed in range(10):
            seeded(make(), pixels().to(dtype), seed=seed)


@check
def many_bands(make: Make) -> None:
    """Tensors of 2, 5 and 13 channels, uint8 and float32."""
    for channels in (2, 5, 13):
        for seed in range(5):
            given = pixels(channels=channels)
            for images in (given, given / 255):
                out = seeded(make(), images, seed=seed)
                assert (out.shape, out.dtype) == (images.shape, images.dtype)


@check
def deep_levels(make: Make) -> None:
    """uint16 tensors."""
    for seed in range(10):
        given = (pixels().int() * 257).to(torch.uint16)
        out = seeded(make(), given, seed=seed)
        assert (out.shape, out.dtype) == (given.shape, given.dtype)


@check
def other_modes(make: Make) -> None:
    """PIL images of mode RGBA."""
    for seed in range(10):
        picture = tvf.to_pil_image(pixels()).convert("RGBA")
        out = seeded(make(), picture, seed=seed)
        assert (out.mode, out.size) == (picture.mode, picture.size)


def fails(function: Callable[[Make], None], make: Make) -> bool:
    """Whether a transform does not pass a check."""
    with torch.random.fork_rng(devices=[]):
        try:
            function(make)
        except Exception:
            return True
    return False


def summary(sentence: str, transforms: dict[str, Make]) -> str:
    """ "yes", "no", or the names of those that do not pass."""
    failed = [name for name, make in transforms.items() if fails(CHECKS[sentence], make)]
    if len(failed) in (0, len(transforms)):
        return "no" if failed else "yes"
    return "not " + ", ".join(f"`{name}`" for name in failed)
