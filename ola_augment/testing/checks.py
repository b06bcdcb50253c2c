"""What to hold a transform to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ola_augment.testing import strategies
from ola_augment.transforms import PolicyTransform

Images = Callable[[Tensor], Any]
Replay = Callable[[Tensor, "int | None"], Any]


@dataclass(frozen=True)
class _Subject:
    """What is checked, and what is known about it."""

    transform: Images
    replay: Replay | None
    neutral: Images | None
    reference: Images | None
    seed: Callable[[int], Any]
    tolerance: float

    def seeded(self, images: Tensor) -> Any:
        self.seed(0)
        return self.transform(images)


def check_transform(
    transform: Images,
    *,
    replay: Replay | None = None,
    neutral: Images | None = None,
    reference: Images | None = None,
    seed: Callable[[int], Any] | None = None,
    images: SearchStrategy[Tensor] | None = None,
    checks: Sequence[str] | None = None,
    tolerance: float = 1e-3,
    max_examples: int = 100,
) -> None:
    """Hold a transform to what is expected of any, on images that hypothesis chooses.

    One of our transforms needs no other argument. Of any other, what is not given is not checked,
    and ``checks`` may leave out more. What fails is reported with the smallest image that shows it.

    * ``shape``, ``dtype``: of the result, a tensor: those of the image.
    * ``range``: floating results are finite and in [0, 1].
    * ``input``: is not written to.
    * ``seed``: the same seed gives the same result.
    * ``layout``: how the image lies in memory does not matter.
    * ``replay``: applying what was drawn once more gives the same result.
    * ``batch``: each image of a batch gives what it gives alone, replayed; with the same seed, if
      there is no ``replay``.
    * ``neutral``: at the magnitude that changes nothing, nothing changes.
    * ``reference``: the result is that of a reference.

    Args:
        transform: tensors (C, H, W) or (B, C, H, W), of a dtype that ``images`` draws, to such.
        replay: ``replay(images, index)`` applies what the latest call drew; with an index, to one
            image (C, H, W) what was drawn for that image of the batch.
        neutral: the transform at the magnitude where it is the identity.
        reference: called with the same seed and images, right after the transform.
        seed: makes the next call deterministic; by default it seeds torch, NumPy and ``random``.
        images: what to try; :func:`images` by default.
        checks: which; by default all of :data:`CHECKS` that can be made.
        tolerance: in grey levels of 255, for floating images too; 0 or more.
        max_examples: images for each check, at least 1.

    Raises:
        AssertionError: something failed; an exception of the transform counts as a failure.
        ValueError: an unknown check, or one that needs an argument that is missing.

    Example:
        >>> from ola_augment import UniformAugment
        >>> check_transform(UniformAugment(), max_examples=2)
        >>> check_transform(lambda images: images.flip(-1), checks=["shape", "input"])
    """
    if isinstance(transform, PolicyTransform):
        replay, neutral = replay or _replayed(transform), neutral or _nothing_kept(transform)
        if transform.generator is not None:
            seed = seed or transform.generator.manual_seed
    subject = _Subject(transform, replay, neutral, reference, seed or _seed_all, tolerance)
    possible = [name for name in CHECKS if getattr(subject, name, True) is not None]
    names = possible if checks is None else list(checks)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"unknown check {name!r}; known are {', '.join(CHECKS)}")
        if name not in possible:
            raise ValueError(f"check {name!r} needs the argument {name}")
    tried = strategies.images() if images is None else images
    failures = {name: _falsify(CHECKS[name], subject, tried, max_examples) for name in names}
    reports = [f"{name}: {failure}" for name, failure in failures.items() if failure]
    if reports:
        raise AssertionError(f"{len(reports)} of {len(names)} checks failed\n" + "\n".join(reports))


def _falsify(
    check: Callable[[_Subject, Tensor], None],
    subject: _Subject,
    images: SearchStrategy[Tensor],
    max_examples: int,
) -> str | None:
    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(images)
    def run(example: Tensor) -> None:
        try:
            check(subject, example)
        except Exception as error:
            raised = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            message = str(error).strip().split("\n")[0]
            raise AssertionError(f"{_described(example)}: {raised}{message}") from error

    try:
        run()
    except AssertionError as error:
        return str(error.args[0])
    return None


def _described(images: Tensor) -> str:
    layout = "" if images.is_contiguous() else f", strides {tuple(images.stride())}"
    return f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}{layout}"


def _check_shape(subject: _Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    assert isinstance(result, Tensor), f"gives a {type(result).__name__}"
    assert result.shape == images.shape, f"gives {tuple(result.shape)}"


def _check_dtype(subject: _Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    assert result.dtype == images.dtype, f"gives {result.dtype}"


def _check_range(subject: _Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    if result.is_floating_point() and result.numel():
        low, high = (float(end) for end in result.aminmax())
        inside = low >= -subject.tolerance / 255 and high <= 1 + subject.tolerance / 255
        assert inside, f"reaches {low:g} .. {high:g}"


def _check_input(subject: _Subject, images: Tensor) -> None:
    before = images.clone()
    subject.seeded(images)
    assert torch.equal(images, before), "is written to"


def _check_seed(subject: _Subject, images: Tensor) -> None:
    first = subject.seeded(images)
    _assert_same(subject, subject.seeded(images), first, "the second call with the same seed")


def _check_layout(subject: _Subject, images: Tensor) -> None:
    result = subject.seeded(images)
    # Contiguous as well, where the image is contiguous itself: a copy at another address.
    _assert_same(subject, subject.seeded(images.contiguous().clone()), result, "a contiguous copy")


def _check_replay(subject: _Subject, images: Tensor) -> None:
    assert subject.replay is not None
    result = subject.seeded(images)
    subject_result = subject.replay(images, None)
    _assert_same(subject, subject_result, result, "the replay")


def _check_batch(subject: _Subject, images: Tensor) -> None:
    if images.ndim < 4:
        return
    result = subject.seeded(images)
    for i, image in enumerate(images):
        alone = subject.replay(image, i) if subject.replay else subject.seeded(image)
        _assert_same(subject, alone, result[i], f"image {i} alone")


def _check_neutral(subject: _Subject, images: Tensor) -> None:
    assert subject.neutral is not None
    _assert_same(subject, subject.neutral(images), images, "the neutral magnitude")


def _check_reference(subject: _Subject, images: Tensor) -> None:
    assert subject.reference is not None
    result = subject.seeded(images)
    subject.seed(0)
    _assert_same(subject, subject.reference(images), result, "the reference")


#: The checks of :func:`check_transform` by name.
CHECKS: dict[str, Callable[[_Subject, Tensor], None]] = {
    "shape": _check_shape,
    "dtype": _check_dtype,
    "range": _check_range,
    "input": _check_input,
    "seed": _check_seed,
    "layout": _check_layout,
    "replay": _check_replay,
    "batch": _check_batch,
    "neutral": _check_neutral,
    "reference": _check_reference,
}


def _assert_same(subject: _Subject, other: Any, result: Any, what: str) -> None:
    assert isinstance(other, Tensor), f"{what} gives a {type(other).__name__}"
    assert other.shape == result.shape, f"{what} gives {tuple(other.shape)}"
    if not other.numel():
        return
    scale = 255 if result.is_floating_point() else 1
    difference = float((other.double() - result.double()).abs().max()) * scale
    assert difference <= subject.tolerance, f"{what} differs by {difference:.3g} grey levels"


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what others draw from
    random.seed(seed)


def _replayed(transform: PolicyTransform) -> Replay:
    def replay(images: Tensor, index: int | None) -> Tensor:
        actions = transform.last_actions
        assert actions is not None
        return transform.replay(images, actions if index is None else actions.select(index))

    return replay


def _nothing_kept(transform: PolicyTransform) -> Images:
    def neutral(images: Tensor) -> Tensor:
        _, actions = transform.augment(images)
        return transform.replay(images, actions._replace(keep=torch.zeros_like(actions.keep)))

    return neutral
