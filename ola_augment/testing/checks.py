"""What to hold a transform to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ola_augment.testing import strategies
from ola_augment.testing.properties import CHECKS, DRAWN_OFTEN, Images, Replay, Subject
from ola_augment.transforms import PolicyTransform

#: Images that a check of many draws looks at.
_LOOKS = 2


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

    * ``shape``, ``dtype``: of the result, a tensor: those of the image, and its device.
    * ``empty``: a batch of no images gives one.
    * ``range``: floating results are finite and in [0, 1].
    * ``input``: is not written to.
    * ``seed``: the same seed gives the same result.
    * ``layout``: how the image lies in memory does not matter.
    * ``replay``: applying what was drawn once more gives the same result.
    * ``batch``: each image of a batch gives what it gives alone, replayed; with the same seed, if
      there is no ``replay``.
    * ``neutral``: at the magnitude that changes nothing, nothing changes.
    * ``reference``: the result is that of a reference.
    * ``effect``: of 64 draws on noise of 8 x 8 pixels and more one changes something.
    * ``signs``: what moves pixels goes either way: not always right, up or clockwise.

    Every check has copies of its images to itself, so that what one finds hides nothing from the
    others, and all but ``empty`` have batches that hold something.

    Args:
        transform: tensors (C, H, W) or (B, C, H, W), of a dtype that ``images`` draws, to such.
        replay: ``replay(images, index)`` applies what the latest call drew; with an index, to one
            image (C, H, W) what was drawn for that image of the batch.
        neutral: the transform at the magnitude where it is the identity.
        reference: called with the same seed and images, right after the transform.
        seed: makes the next call deterministic; by default it seeds torch, NumPy and ``random``.
        images: what to try; :func:`images` by default.
        checks: which; by default all of :data:`CHECKS` that can be made.
        tolerance: in grey levels of 255, for floating images and those of 16 bits too, whose white
            is that of :func:`images`; 0 or more.
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
    subject = Subject(transform, replay, neutral, reference, seed or _seed_all, tolerance)
    possible = [name for name in CHECKS if getattr(subject, name, True) is not None]
    names = possible if checks is None else list(checks)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"unknown check {name!r}; known are {', '.join(CHECKS)}")
        if name not in possible:
            raise ValueError(f"check {name!r} needs the argument {name}")
    tried = strategies.images() if images is None else images
    failures = {name: _falsify(name, subject, tried, max_examples) for name in names}
    reports = [f"{name}: {failure}" for name, failure in failures.items() if failure]
    if reports:
        raise AssertionError(f"{len(reports)} of {len(names)} checks failed\n" + "\n".join(reports))


def _falsify(
    name: str, subject: Subject, images: SearchStrategy[Tensor], max_examples: int
) -> str | None:
    statistical = name in DRAWN_OFTEN
    found: list[tuple[int, str]] = []
    looked = 0

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,) if statistical else (Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(images)
    def run(example: Tensor) -> None:
        nonlocal looked
        if (not example.numel() and name != "empty") or (statistical and looked >= _LOOKS):
            return
        try:
            looked += CHECKS[name](subject, example) is not False
        except Exception as error:
            raised = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            message = str(error).strip().split("\n")[0]
            found.append((example.numel(), f"{_described(example)}: {raised}{message}"))
            raise AssertionError(found[-1][1]) from error

    try:
        run()
    except AssertionError as error:
        return str(error.args[0])
    except Flaky:
        return f"{min(found)[1]}, not every time"
    return None


def _described(images: Tensor) -> str:
    layout = "" if images.is_contiguous() else f", strides {tuple(images.stride())}"
    return f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}{layout}"


def _seed_all(seed: int) -> None:
    # torch.manual_seed keeps a stack trace of each call until CUDA is used: slow, many times.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
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
