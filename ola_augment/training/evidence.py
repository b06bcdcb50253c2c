"""Evidence: what a learner found out, on what, and how sure that is."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from ola_augment.training.estimates import Contrast
from ola_augment.training.given import counted
from ola_augment.training.trial import COUNTED, Trial
from ola_augment.training.values import ValueUpdater

#: Probability that, were all operations alike, some operation would seem to differ.
_CHANCE = 0.05
#: Standard errors at which a trial has shown something.
_SURE = 2.0


class OperationEvidence(NamedTuple):
    """What is known of one operation.

    Attributes:
        name: of the operation.
        value: what it is worth beyond the mean of all, in standard deviations of a reward.
        t: the value in its standard errors.
        differs: whether that is more than chance, with all operations looked at.

    Example:
        >>> OperationEvidence("rotate", value=0.3, t=4.1, differs=True).name
        'rotate'
    """

    name: str
    value: float
    t: float
    differs: bool


class Evidence(NamedTuple):
    """What a learner found out; ``print`` it.

    Attributes:
        pairs: of steps that taught.
        examples: augmented images in them.
        held_out: held-out images that were measured on.
        operations: of the space, what helps most first.
        effect: what a window of steps with augmentation took off the held-out loss beyond one
            without, in nats; NaN before it is known.
        std: its standard error.
        windows: of the trial that ran.
        strength: operations an image from now on; None before it is chosen.
        frozen: whether the policy is frozen, so that no more will be found out.
        ahead: pairs of steps until the trial is over; None where nothing is tried.

    Example:
        >>> rotate = OperationEvidence("rotate", value=0.3, t=4.1, differs=True)
        >>> Evidence(240, 30720, 1000, (rotate,), 0.3, 0.1, 12, 2.0).verdict
        'augmentation helps here: strength 2.0 (operations an image)'
    """

    pairs: int
    examples: int
    held_out: int
    operations: tuple[OperationEvidence, ...]
    effect: float
    std: float
    windows: int
    strength: float | None
    frozen: bool = False
    ahead: int | None = None

    @property
    def t(self) -> float:
        """The effect in standard errors; NaN where there is none."""
        return self._contrast.t

    @property
    def _contrast(self) -> Contrast:
        return Contrast(self.effect, self.std, self.windows)

    @property
    def verdict(self) -> str:
        """In one sentence, whether augmentation helps here."""
        if self.strength is None and self.frozen:
            return "not known whether augmentation helps: the policy is frozen, nothing is tried"
        if self.strength is None and self.ahead is None:
            return "not known whether augmentation helps: the learner has no trial"
        if self.strength is None:
            left = counted(self.ahead or 0, "more pair")
            return f"not yet known whether augmentation helps: {left} of steps to go"
        if math.isnan(self.t):
            kept = f"strength {self.strength:g}" if self.strength else "nothing is augmented"
            if self._contrast.still:
                why = "the weights of the learner's model did not move, not known"
            elif self.windows >= COUNTED:  # and yet no number came of it
                why = "the held-out loss was not finite, not known"
            else:
                why = "too few steps to find out"
            return f"{why} whether augmentation helps: {kept}"
        t = self.t
        if self.strength == 0:
            found = "augmentation harms here" if t < -_SURE else "no sign that augmentation helps"
            return f"{found}: strength 0, nothing is augmented any more"
        found = "augmentation helps here" if t > _SURE else "not clear that augmentation helps"
        return f"{found}: strength {self.strength:.1f} (operations an image)"

    def __str__(self) -> str:
        lines = [
            f"learned from {counted(self.pairs, 'pair')} of steps ({self.examples:,} augmented "
            f"images) and {counted(self.held_out, 'held-out image')}"
        ]
        sure = [operation for operation in self.operations if operation.differs]
        for label, found in (
            ("help more than the others", [o for o in sure if o.t > 0]),
            ("help less", [o for o in reversed(sure) if o.t < 0]),
        ):
            if found:
                names = ", ".join(f"{o.name} (t = {o.t:+.1f})" for o in found)
                lines.append(f"{label}: {names}")
        if not self.pairs:
            lines.append("operations: not compared with each other")
        elif not sure:
            lines.append("operations: nothing that differs from chance")
        if not math.isnan(self.t):
            more = "more" if self.effect >= 0 else "less"
            lines.append(
                f"held-out loss fell by {abs(self.effect):.3f} {more} in windows of steps with "
                f"augmentation than in those without (standard error {self.std:.3f}, "
                f"{self.windows} windows, t = {self.t:+.1f})"
            )
        return "\n".join((*lines, self.verdict))


def gather(
    updater: ValueUpdater, trial: Trial | None, pairs: int, held_out: int, frozen: bool
) -> Evidence:
    """Put together what an updater and a trial know.

    Args:
        updater: that values operations.
        trial: of the same policy, if there is one.
        pairs: of steps so far.
        held_out: number of held-out images that were measured on.
        frozen: whether the policy is.
    """
    values = updater.values()
    names = [operation.name for operation in updater.policy.space.operations]
    limit = NormalDist().inv_cdf(1 - _CHANCE / (2 * len(names)))
    rows = zip(names, values.operation.tolist(), values.operation_t.tolist(), strict=True)
    found = [OperationEvidence(name, value, t, abs(t) > limit) for name, value, t in rows]
    contrast = Contrast(math.nan, math.nan, 0) if trial is None else trial.contrast()
    strength = None
    if trial is not None and frozen and trial.over:  # the policy may have got another by hand
        strength = trial.policy.strength
    elif trial is not None and not frozen and (trial.over or not trial.windows):
        strength = trial.chosen
    return Evidence(
        pairs=updater.steps,
        examples=updater.examples,
        held_out=held_out,
        operations=tuple(sorted(found, key=lambda operation: -operation.t)),
        effect=contrast.effect,
        std=contrast.std,
        windows=contrast.windows,
        strength=strength,
        frozen=frozen,
        ahead=None if trial is None else max(0, trial.last - pairs),
    )
