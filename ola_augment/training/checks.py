"""What is looked for in somebody's loop: mistakes that would pass without a word."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from ola_augment.alignment._fsdp import own_part
from ola_augment.alignment.proof import trainable_parameters
from ola_augment.training.batches import class_labels, tensors_of
from ola_augment.training.estimates import Contrast

#: Levels above which inputs are not scaled.
_LEVELS = 10.0
#: Halves in which forgotten gradients are looked for; each look waits for the device.
_LOOKS = 8
#: Share of the classes that a shuffled batch would hold, below which batches are sorted by class.
_FEW = 2 / 3
_SHUFFLE = "shuffle them, DataLoader(held_out, batch_size=64, shuffle=True), or make batches larger"


class InputRanges:
    """Compares what the model sees of training and of held-out images, once.

    Where one is normalised and the other is not, gradients of held-out images say nothing of the
    model as it is trained.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def watch(self, model: nn.Module, kind: str) -> Iterator[None]:
        """Look at the model's first input in the block, if it was not seen yet.

        Args:
            model: without a wrapper.
            kind: "training" or "held-out", of the images that it is called with.
        """
        if kind in self._seen:
            yield
            return

        calls: list[Any] = []

        def look(model: nn.Module, arguments: Any, options: Any) -> None:
            if not calls:  # an engine that watches torch's calls sees none of ours
                calls.append((arguments, options))

        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        inputs = [part.detach() for part in tensors_of(calls) if _is_input(part)]
        if inputs and inputs[0].isfinite().all():
            self._seen[kind] = float(inputs[0].min()), float(inputs[0].max())
            self._compare()

    def _compare(self) -> None:
        if len(self._seen) < 2:
            return
        kinds = {_scale(*seen) for seen in self._seen.values()} - {None}
        if len(kinds) < 2:
            return
        texts = [f"[{low:.3g}, {high:.3g}]" for low, high in self._seen.values()]
        names = list(self._seen)
        warnings.warn(
            f"the model's inputs lie in {texts[0]} for {names[0]} images and in {texts[1]} for "
            f"{names[1]} ones: pre-process both alike. OLALearner.recommended(..., preprocess="
            "normalize) normalises held-out images as the training does; with loss= do so there",
            stacklevel=2,
        )


def _is_input(part: Tensor) -> bool:
    return part.dim() > 1 and part.numel() > 0 and not part.is_complex()


def _scale(low: float, high: float) -> str | None:
    if low < -1e-3:
        return "normalised"
    if high > _LEVELS:
        return "levels"
    return "unit" if high <= 1.01 else None


def warn_of_still_maps(images: Tensor, beside: Any) -> None:
    """Warn of what lies beside images that are about to be augmented, and should move with them.

    Args:
        images: (B, ..., H, W).
        beside: the batch, or its targets, of any structure.
    """
    sides = images.shape[-2:]
    maps = [part for part in tensors_of(beside) if part.dim() > 2 and part.shape[-2:] == sides]
    if any(part is not images for part in maps):
        warnings.warn(
            "a tensor beside the images has their height and width: a mask stays where it is "
            "while operations move its image. Let workers augment both, with "
            "tv_tensors.Mask(mask) in the samples and DataLoader(collate_fn=augment.collate), or "
            "take a space without rotations, shears, translations and flips",
            stacklevel=2,
        )


def warn_of_still_weights(contrast: Contrast) -> None:
    """Warn where the held-out loss was the same to the last digit in a whole trial."""
    if contrast.still:
        warnings.warn(
            "the weights of the learner's model did not move: is it the model that is trained, and "
            "does the optimizer step its parameters? Nothing is known of augmentation",
            stacklevel=2,
        )


class Leftovers:
    """Notices gradients that are still there after the optimizer has stepped.

    Of one parameter, in the first halves of a run: it has changed since the block before, its
    gradient is still the same tensor and not zero, and the block did nothing but add to it.
    """

    _last: tuple[Tensor, Tensor, int] | None = None  # gradient, parameter and its version
    _kept: tuple[Tensor, int] | None = None  # a gradient that is still there, and its version
    _left = _LOOKS

    def __getstate__(self) -> dict[str, Any]:
        return {"_left": self._left}  # tensors stay with their model

    def begin(self) -> None:
        """Before the first backward pass of a half."""
        self._kept = None
        if self._last is None or not self._left:
            return
        gradient, parameter, before = self._last
        same = parameter.grad is gradient and parameter._version != before
        if same and bool(own_part(gradient).any()):
            self._kept = gradient, gradient._version

    def end(self, model: nn.Module) -> None:
        """After the last backward pass of a half."""
        if not self._left:
            return
        self._left -= 1
        forgotten = self._kept is not None and self._kept[0]._version == self._kept[1] + 1
        if forgotten:
            self._left = 0
        self._last = self._kept = None
        if forgotten:
            warnings.warn(
                "gradients of the step before were still there after the optimizer had stepped, "
                "and this step's were added to them: call optimizer.zero_grad() after each "
                "optimizer.step()",
                stacklevel=2,
            )
        for parameter in reversed(trainable_parameters(model).values()):  # the last are small
            if self._left and parameter.grad is not None:
                self._last = parameter.grad, parameter, parameter._version
                return


class HeldOutClasses:
    """Notices held-out images that are all of one class, or batches that lack most classes."""

    def __init__(self) -> None:
        self._batches: list[Counter[int]] = []
        self._done = False

    def see(self, batch: Any, first: bool) -> None:
        """Take in a batch.

        Args:
            batch: of any structure; the labels are its only tensor of integers with one dimension.
            first: whether it is the first of a pass over all.
        """
        if self._done:
            return
        if first and self._batches:
            self._conclude(self._batches)
            return
        labels = class_labels(batch)
        if labels is None:
            self._done = True
        else:
            self._batches.append(Counter(labels))

    def whole(self, batches: Iterable[Any]) -> None:
        """Take in examples of a whole pass, in batches that may be others than those seen so far.

        Of these it was perhaps no whole pass.
        """
        seen = self._batches
        if not self._done:
            self._batches = []
            for batch in batches:
                self.see(batch, first=False)
        if not self._done:
            self._conclude(seen or self._batches)

    def _conclude(self, batches: list[Counter[int]]) -> None:
        """Of the classes in all batches, how many are in each of some of them?"""
        self._done = True
        counts = sum(self._batches, Counter[int]())
        if len(counts) == 1:
            text = f"all held-out images are of one class ({next(iter(counts))}): what helps these "
            text += "may harm the others; hold out some images of every class"
        elif all(len(labels) == 1 for labels in batches):
            text = f"each batch of held-out images is of a single class: {_SHUFFLE}"
        elif (found := fmean(map(len, batches))) < _FEW * _expected(batches, counts):
            text = f"batches of held-out images hold {found:.2g} of {len(counts)}"
            text += f" classes on average: {_SHUFFLE}"
        else:
            return
        warnings.warn(text, stacklevel=2)


def _expected(batches: list[Counter[int]], counts: Counter[int]) -> float:
    """How many classes a batch would hold on average, were all images shuffled."""
    whole = counts.total()
    sizes = [labels.total() for labels in batches]
    return fmean(sum(1 - (1 - n / whole) ** size for n in counts.values()) for size in sizes)
