"""The two halves of a pair: which is under way, what waits, and what taught nothing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.training.policy_gradient import UpdateStats

#: Pairs that taught nothing, or halves without another, before the learner says so.
_IN_VAIN = 10
_ADVICE = {
    "not finite": "losses or alignments are NaN or Inf",
    "one example": "rewards tell the examples of a batch apart, and there is only one: make "
    "batches larger, or accumulate them",
    "no second half": "a first half of a pair followed upon another: after each augmented step "
    "comes a plain one, each of as many micro-batches as announced (micro_batches, or last=)",
    "no first half": "second halves came alone: before each plain step comes an augmented one",
    "given up": "the steps were given up, by an error inside them or by drop()",
}


@dataclass
class Step:
    """One half of a pair, as the learner's context managers hand it out.

    Attributes:
        learns: whether the policy learns from this pair.
        augmented: whether this is the augmented half.
        images: of :meth:`OLALearner.step` alone: what the model is to see, augmented or not.
        losses: of :class:`~ola_augment.alignment.DirectionalAlignment` alone: (B,), to run
            backward.
        loss: set it inside the block where the updater needs it (:class:`NSLRUpdater`).
        accuracy: in [0, 1], set it inside the plain block where a thermostat needs it.
        stats: of the policy's update, after the block; None where there was none.

    Example:
        >>> Step(learns=True, augmented=True).stats is None
        True
    """

    learns: bool
    augmented: bool
    losses: Tensor | None = None
    loss: Tensor | None = None
    accuracy: float | None = None
    stats: UpdateStats | None = None

    def __post_init__(self) -> None:
        self._images: Tensor | None = None
        self.was_read = False

    @property
    def images(self) -> Tensor | None:
        """What the model is to see."""
        self.was_read = True
        return self._images

    @images.setter
    def images(self, images: Tensor) -> None:
        self._images = images


class Pair:
    """The pair that is under way, and what became of those before.

    Args:
        plain_first: whether the plain half comes first.

    Attributes:
        half: "augmented" or "plain", under way, or over and waiting for the other one; "" is
            neither.
        count: micro-batches of it that ran.
        ended: whether it is over.
        settled: whether the reward was given, or counted as skipped.
        lost: whether the first half was given up.
        alone: whether the second half has none before it.
        actions: of augmented steps that await their reward.
        gradients: the reference, where it is known.
        skipped: pairs that should have taught something and did not, by their cause.
    """

    def __init__(self, plain_first: bool) -> None:
        self.plain_first = plain_first
        self.skipped: Counter[str] = Counter()
        self.lost = False
        self.alone = False
        self._in_vain = 0
        self._halves = 0  # in a row that have no other half
        self._told = False
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.actions: list[Actions] = []
        self.gradients: Mapping[str, Tensor] | None = None
        self.half = ""
        self.count = 0
        self.ended = False
        self.settled = False

    @property
    def next_is_augmented(self) -> bool:
        """Whether the next micro-batch belongs to an augmented half, in a loop that alternates."""
        if self.half and not self.ended:
            return self.half == "augmented"
        return (self.half == "plain") if self.half else not self.plain_first

    def is_first(self, half: str) -> bool:
        """Whether this half comes before the other one."""
        return (half == "plain") == self.plain_first

    def begins(self, half: str) -> bool:
        """Whether the next micro-batch of this half is its first."""
        return self.half != half or self.ended

    def prepare(self, half: str, teaches: bool, wanted: bool) -> None:
        """Make room for a half that is about to begin: what is unfinished before it is given up.

        Args:
            half: which.
            teaches: whether the pair before it, if it is not over, should have taught something.
            wanted: whether the policy has anything left to learn or to try.
        """
        if self.is_first(half):
            self._halves += wanted and bool(self.half)
            self.lose("no second half", teaches)
            self.lost = False
        elif not self.half and not self.lost:
            self.alone = True
            self._halves += wanted
        if self._halves == _IN_VAIN:
            self._tell(
                f"{_IN_VAIN} {half} steps in a row without the other half of a pair: no pair is "
                "complete, and what is learned is never tried or used. After each augmented step "
                "comes a plain one; learner.step(images) alternates by itself"
            )

    def start(self, half: str) -> None:
        """Begin a half."""
        self.half, self.count, self.ended = half, 0, False

    def lose(self, cause: str, teaches: bool) -> None:
        """Give up the pair, if one is under way."""
        if self.half and teaches and not self.settled:
            self.skip(cause)
        self.lost = self.lost or bool(self.half)
        self.clear()

    def complete(self) -> bool:
        """The second half is over; whether there was a first one."""
        alone, self.alone, self.lost = self.alone, False, False
        self.clear()
        if not alone:  # else a loss that an optimizer asked for again, or a half too many
            self._halves = 0
        return not alone

    def taught(self) -> None:
        """The reward is about to be given."""
        self.settled, self._in_vain = True, 0

    def skip(self, cause: str) -> None:
        """Count a pair that taught nothing; after ten in a row, say so."""
        self.skipped[cause] += 1
        self.settled = True
        self._in_vain += 1
        if self._in_vain == _IN_VAIN:
            self._tell(
                f"{_IN_VAIN} pairs in a row taught the policy nothing ({cause}): {_ADVICE[cause]}"
            )

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(text, stacklevel=2)


def of_each_pass(drawn: list[Actions], passes: tuple[int, ...]) -> list[Actions]:
    """The draws of all examples: images that the model saw twice (R-Drop) count each time.

    Args:
        drawn: in the augmented half.
        passes: examples in each forward pass.

    Raises:
        RuntimeError: which draw is whose cannot be told.
    """
    sizes = [len(actions.log_prob) for actions in drawn]
    if sum(passes) == sum(sizes):
        return drawn
    if len(drawn) == 1 and set(passes) == set(sizes):
        return drawn * len(passes)
    raise RuntimeError(
        f"the model saw {sum(passes)} examples in the augmented half, in forward passes of "
        f"{', '.join(map(str, passes))}, but {sum(sizes)} were augmented: which draw is whose "
        "cannot be told. Call it on the augmented images alone, one augment() for each half, and "
        "on others after the block or under torch.no_grad(); or give actions= for all of them"
    )
