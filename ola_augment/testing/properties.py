"""The properties that transforms are held to, one function each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ola_augment.testing.strategies import TOPS

Images = Callable[[Tensor], Any]
Replay = Callable[[Tensor, "int | None"], Any]


@dataclass(frozen=True)
class Subject:
    """What is checked, and what is known about it."""

    transform: Images
    replay: Replay | None
    neutral: Images | None
    reference: Images | None
    seed: Callable[[int], Any]
    tolerance: float

    def seeded(self, images: Tensor, seed: int = 0) -> Any:
        """The result of a copy that lies in memory as the images do."""
        self.seed(seed)
        return self.transform(copy.deepcopy(images))


def _check_shape(subject: Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    assert isinstance(result, Tensor), f"gives a {type(result).__name__}"
    assert result.shape == images.shape, f"gives {tuple(result.shape)}"


def _check_dtype(subject: Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    assert result.dtype == images.dtype, f"gives {result.dtype}"
    assert result.device == images.device, f"lies on {result.device}, not {images.device}"


def _check_range(subject: Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    if result.is_floating_point() and result.numel():
        low, high = (float(end) for end in result.aminmax())
        inside = low >= -subject.tolerance / 255 and high <= 1 + subject.tolerance / 255
        assert inside, f"reaches {low:g} .. {high:g}"


def _check_empty(subject: Subject, images: Tensor) -> None:
    if images.ndim < 4:
        return
    result = subject.seeded(images[:0])
    assert isinstance(result, Tensor), f"an empty batch gives a {type(result).__name__}"
    assert result.shape == images[:0].shape, f"an empty batch gives {tuple(result.shape)}"


def _check_input(subject: Subject, images: Tensor) -> None:
    given = copy.deepcopy(images)
    subject.seed(0)
    subject.transform(given)
    assert torch.equal(given, images), "is written to"


def _check_seed(subject: Subject, images: Tensor) -> None:
    first = subject.seeded(images)
    _assert_same(subject, subject.seeded(images), first, "the second call with the same seed")


def _check_layout(subject: Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    # Contiguous as well, where the image is contiguous itself: a copy at another address.
    _assert_same(subject, subject.seeded(images.contiguous()), result, "a contiguous copy")


def _check_replay(subject: Subject, images: Tensor) -> None:
    assert subject.replay is not None
    result, given = subject.seeded(images), copy.deepcopy(images)
    _assert_same(subject, subject.replay(given, None), result, "the replay")
    assert torch.equal(given, images), "the replay writes to its input"


def _check_batch(subject: Subject, images: Tensor) -> None:
    if images.ndim < 4:
        return
    result = subject.seeded(images)
    for i, image in enumerate(images):
        replay, given = subject.replay, copy.deepcopy(image)
        alone = replay(given, i) if replay else subject.seeded(image)
        _assert_same(subject, alone, result[i], f"image {i} alone")


def _check_neutral(subject: Subject, images: Tensor) -> None:
    assert subject.neutral is not None
    given = copy.deepcopy(images)
    _assert_same(subject, subject.neutral(given), images, "the neutral magnitude")
    assert torch.equal(given, images), "the neutral magnitude writes to its input"


def _check_reference(subject: Subject, images: Tensor) -> None:
    assert subject.reference is not None
    result = subject.seeded(images)
    subject.seed(0)
    _assert_same(subject, subject.reference(copy.deepcopy(images)), result, "the reference")


def _check_effect(subject: Subject, images: Tensor) -> bool:
    if min(images.shape[-2:]) < _SMALLEST:
        return False
    noise = torch.rand(images.shape[-3:], generator=torch.Generator().manual_seed(0), device="cpu")
    image = _like(images, 0.2 + 0.6 * noise)
    results = (subject.seeded(image, seed) for seed in range(_DRAWS))
    idle = all(torch.equal(result, image) for result in results)
    assert not idle, f"changes nothing in {_DRAWS} draws"
    return True


def _check_signs(subject: Subject, images: Tensor) -> bool:
    height, width = images.shape[-2:]
    if min(height, width) < _SMALLEST:
        return False
    x, y = (torch.linspace(-1, 1, side, device="cpu").double() for side in (width, height))
    shapes = (torch.ones_like(x), x, y[:, None], x * x, (y * y)[:, None], x * y[:, None])
    image = _like(images, (0.5 + 0.3 * x + 0.15 * y[:, None]).expand(images.shape[-3:]))
    for side, names in ((-1, "left and right"), (-2, "up and down")):
        pairs = [
            (subject.seeded(image.flip(side), seed), subject.seeded(image, seed).flip(side))
            for seed in range(_DRAWS)
        ]
        differences = torch.stack([_levels(one) - _levels(other) for one, other in pairs])
        towards = torch.stack([(differences * shape).mean((1, 2, 3)) for shape in shapes])
        more, less = ((sign * towards > subject.tolerance).sum(1) for sign in (1, -1))
        one_way = (more + less >= _TELLING) & ((more == 0) | (less == 0))
        assert not one_way.any(), f"goes one way only: {names} differ in the same sense, always"
    return True


#: The checks of :func:`check_transform` by name.
#: Those of many draws return whether the images were large enough to say something.
CHECKS: dict[str, Callable[[Subject, Tensor], bool | None]] = {
    "shape": _check_shape,
    "dtype": _check_dtype,
    "empty": _check_empty,
    "range": _check_range,
    "input": _check_input,
    "seed": _check_seed,
    "layout": _check_layout,
    "replay": _check_replay,
    "batch": _check_batch,
    "neutral": _check_neutral,
    "reference": _check_reference,
    "effect": _check_effect,
    "signs": _check_signs,
}


#: Draws of the two checks that look at many, and how many of them have to say something.
_DRAWS, _TELLING = 64, 20
#: Sides from which they look at an image: what moves little moves no pixel of a narrow one.
_SMALLEST = 8
DRAWN_OFTEN = ("effect", "signs")


def _assert_same(subject: Subject, other: Any, result: Any, what: str) -> None:
    assert isinstance(other, Tensor), f"{what} gives a {type(other).__name__}"
    assert other.shape == result.shape, f"{what} gives {tuple(other.shape)}"
    if not other.numel():
        return
    difference = float((other.double() - result.double()).abs().max()) * 255 / _top(result)
    assert difference <= subject.tolerance, f"{what} differs by {difference:.3g} grey levels"


def _levels(images: Tensor) -> Tensor:
    """In grey levels of 255."""
    return images.double() * (255 / _top(images))


def _like(images: Tensor, values: Tensor) -> Tensor:
    """An image (C, H, W) of the dtype of others, of values in [0, 1]."""
    return (values.double() * _top(images)).to(images.dtype).contiguous()


def _top(images: Tensor) -> int:
    """What is white; integers of 32 and 64 bits hold levels of 0 .. 255."""
    return 1 if images.is_floating_point() else TOPS.get(images.dtype, 255)
