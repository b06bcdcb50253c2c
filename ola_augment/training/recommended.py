"""The setting that the results recommend: its numbers, and the parts that they make."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ola_augment.training.given import check_count, counted
from ola_augment.training.held_out import BatchLoss
from ola_augment.training.trial import SHARE, SHORTEST_RUN, Trial
from ola_augment.training.values import ValueUpdater
from ola_augment.transforms import PolicyTransform

if TYPE_CHECKING:
    from ola_augment.training.stepping import Stepping


def recommended_parts(
    augment: PolicyTransform,
    held_out: Iterable[Any],
    pairs: int,
    loss: BatchLoss,
    target_domain: bool,
    rejoin: bool,
) -> dict[str, Any]:
    """Arguments of an :class:`OLALearner`, beside model and transform, for a run of known length.

    Args:
        augment: with a strength.
        held_out: batches.
        pairs: of steps in the whole run.
        loss: of a held-out batch.
        target_domain: whether operations are to be told apart.
        rejoin: whether held-out images join the training.

    Raises:
        TypeError, ValueError: what :meth:`OLALearner.recommended` refuses.
    """
    check_count("pairs", pairs, 1)
    if not isinstance(augment, PolicyTransform):
        raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
    policy: Any = augment.policy  # checked by those who are given it
    first = -(-pairs // 6)
    updater = ValueUpdater(policy, decay=1.0, scale=2.5, explore=True, shrink=True)
    trial = Trial(
        policy,
        first,
        int(pairs * SHARE) if pairs >= SHORTEST_RUN else 0,
        strength=2.0 if target_domain else 1.0,
        expected=updater.told_apart if target_domain else False,
    )
    if not trial.windows:
        warnings.warn(
            f"{counted(pairs, 'pair')} of steps {'is' if pairs == 1 else 'are'} too few to try "
            f"augmentation out ({SHORTEST_RUN} are enough): there will be none; train for "
            "longer, or take UniformAugment",
            stacklevel=3,
        )
    learn_pairs = first if target_domain and trial.windows else 0
    return {
        "reference": held_out,
        "learn_every": -(-first // min(-(-pairs // 16), 500)),
        "learn_pairs": learn_pairs,
        "trial": trial,
        # Nothing else teaches what images of a target domain do: they make up for their absence.
        "rejoin": 2.0 if rejoin and target_domain else rejoin,
        "calibrate": True,
        "updater": updater,
        "loss": loss,
    }


def check_length(learner: Stepping, pairs: float, stacklevel: int = 3) -> None:
    """Warn where a run is over before the trial of its augmentation: ``pairs`` was not its length.

    Args:
        learner: with or without a trial.
        pairs: of steps in the whole run; inf where nobody knows.
        stacklevel: of the warning.
    """
    trial = learner.trial
    if trial is not None and not trial.over and pairs < trial.last:
        warnings.warn(
            f"this run has {counted(pairs, 'pair')} of steps, and the trial of its augmentation "
            f"lasts until pair {trial.last}: it will not end, and what was learned is hardly used. "
            "Give OLALearner.recommended the pairs of updates of the whole run, epochs * "
            "len(loader) // 2, and with gradients accumulated over n batches // (2 * n)",
            stacklevel=stacklevel,
        )
