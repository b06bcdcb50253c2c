"""Trial: does what a policy draws help on held-out images? With and without it, in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ola_augment.policy import OLAPolicy, check_strength
from ola_augment.training.checks import warn_of_still_weights
from ola_augment.training.estimates import Contrast
from ola_augment.training.given import are_counts
from ola_augment.training.mean_weights import MeanWeights
from ola_augment.training.restored import other_weights, without_dropout

#: Windows with augmentation and without it: a trend takes no side.
_TURNS = (False, True, True, False)
#: Where augmentation is expected to help, most are with it.
_MOSTLY = (True, False, True, True, True, True, False, True)
#: Windows after which a trial may end.
_BLOCK = 4
#: Windows that are not counted, in which the strength rises: strong augmentation from one step to
#: the next, at a high learning rate, throws a model back to chance.
_RUN_IN = 2
#: Fewer windows give no standard error worth the name. More are shorter, and short windows favour
#: what is good for the next few steps: to stop augmenting.
_FEWEST, _MOST = 8, 16
#: Windows that are counted at least.
COUNTED = _FEWEST - _RUN_IN
#: Pairs of steps that make a window at least.
_SHORTEST = 6
#: Share of a run that a trial may last.
SHARE = 0.47
#: Pairs of a run that is long enough for a trial worth the name. In runs of some 290, photographs
#: lost up to 14 points by augmentation that an undecided trial left on.
SHORTEST_RUN = 480
#: Standard errors above 0 at which a trial has seen enough.
_CLEAR = 2.0
#: Operations an image that are worth choosing: more cost what the most likely one brings.
_MOST_STRENGTH = 2.0


class Trial:
    """Tries out a policy in the middle of a run, and sets its strength by what came of it.

    The pairs from ``first`` on fall into windows. In the first two the strength rises from 0, since
    strong augmentation all at once disturbs a model. Then windows without augmentation and with it
    come in turns, half of them with it; three of four where it is ``expected`` to help, since a
    model that needs it needs time for it. With it an image gets ``strength`` operations, or as many
    as bring the most likely one to nearly every image, 1 / its probability: more would be others.
    At the end of each the held-out loss is measured

    * with the mean of the weights over the second half of the window: what the weights would come
      to if the learning rate fell, rather than where the last step threw them,
    * at the best temperature: augmentation makes a model less sure of itself, which a plain loss
      takes for progress wherever the model was too sure, though no prediction gets better.

    What a window with it takes off that loss beyond one without, less a common trend, is the
    :class:`Contrast` (the first two do not count); its t decides:

        strength = t + 1 where augmentation is ``expected`` to help, else t - 1, in [0, ``most``],

    and at most 1 / the probability of the most likely operation.

    So that without evidence an image gets one operation in the one case, none in the other. What is
    known of the operations says which: where chance explains how far their values differ, nothing
    speaks for augmentation; in between, the 1 is in between. Where there was too little time, there
    is no augmentation. A trial ends before its time, after eight or twelve windows, where enough
    was seen: t above 2, or the strength would be 0. Where the policy is frozen meanwhile, it ends
    with what it has seen (:meth:`stop`).

    Args:
        policy: an :class:`~ola_augment.OLAPolicy` with a ``strength``: that of pairs before the
            trial which teach; the others are not augmented.
        first: pairs of steps before it.
        pairs: that it may last, 0 or more.
        strength: that is tried, above 0, at most ``policy.max_ops``.
        most: largest strength to choose, 0 .. ``policy.max_ops``; None is 2, if there are so many.
        expected: whether augmentation is expected to help, as for a target domain that differs; or
            a function that says how sure that is, in [0, 1], by the end of the trial: half is sure.

    Attributes:
        joins: pair from which held-out images that it does not look at may be trained on: some
            time before it, so that the change does not fall into its first window.
        last: pair after the last one, in the count of ``first``.
        over: whether the strength has been chosen.

    Raises:
        TypeError: another kind of policy.
        ValueError: a policy without ``strength``, or a number out of range.

    Example:
        >>> trial = Trial(OLAPolicy(strength=1), first=100, pairs=240)
        >>> trial.joins, trial.last, trial.over
        (67, 340, False)
    """

    def __init__(
        self,
        policy: OLAPolicy,
        first: int,
        pairs: int,
        *,
        strength: float = 2.0,
        most: float | None = None,
        expected: bool | Callable[[], float] = False,
    ) -> None:
        check_strength(policy)
        if first < 0 or pairs < 0:
            raise ValueError(f"first and pairs must be 0 or more, got {first} and {pairs}")
        self.most = float(min(_MOST_STRENGTH, policy.max_ops) if most is None else most)
        self.strength = min(float(strength), float(policy.max_ops))
        if not (0 <= self.most <= policy.max_ops and self.strength > 0):
            raise ValueError(
                f"strength must lie in (0, max_ops] and most in [0, max_ops], max_ops = "
                f"{policy.max_ops}; got {strength} and {most}"
            )
        self.policy = policy
        self._kinds = _MOSTLY if expected else _TURNS
        self._expected = expected
        self.explored = float(policy.strength or 0.0)
        self.first = first
        self.length = max(_SHORTEST, pairs // _MOST)
        blocks = min(pairs // self.length, _MOST) // _BLOCK
        self.windows = _BLOCK * blocks if _BLOCK * blocks >= _FEWEST else 0
        self.joins = first - first // 3
        self.last = first + self.windows * self.length
        self.over = False
        self._pair = -1  # that began last
        self._given: float | None = None  # the strength that it was given then
        self._losses: list[float] = []  # before the first window, and at the end of each
        self._mean = MeanWeights()

    def begin_pair(
        self, pair: int, teaches: bool, model: nn.Module, loss: Callable[[nn.Module], float]
    ) -> None:
        """Take in the weights between two pairs, and set the strength of the next one.

        Args:
            pair: number of pairs that are complete; a second call for the same one does nothing.
            teaches: whether the policy will learn from the next one.
            model: that is trained, as it is between them.
            loss: of held-out images that are not trained on before the trial is over.
        """
        if self.over or pair == self._pair:
            return
        self._pair = pair
        if pair < self.first:
            self._set(self.explored if teaches else 0.0)
            return
        done, within = divmod(pair - self.first, self.length)
        if len(self._losses) <= done:  # a window has just ended, or the first one begins
            missed = len(self._losses) < done  # the policy was frozen meanwhile
            if not missed:
                self._mean.take(model)
                with other_weights(model, self._mean.values), without_dropout(model):
                    self._losses.append(loss(model))
            self._mean.clear()
            if missed or done >= self.windows or (done % _BLOCK == 0 and self._decided()):
                self._end()
                return
        elif within > self.length // 2:
            self._mean.take(model)
        self._set(self._tried(done, pair))

    def stop(self) -> None:
        """End before the time: the policy was frozen.

        What was measured so far chooses the strength. If no window has begun, the policy gets back
        the strength that it came with, and the trial begins if it learns again in time. A strength
        that somebody has set since the latest pair began stays.
        """
        if self.over or self._given is None:
            return
        untouched = self.policy.strength == self._given
        if self._losses:
            self._end(untouched)
        elif untouched:
            self.policy.strength = self.explored
        self._given = None

    def _end(self, sets: bool = True) -> None:
        self.over = True
        warn_of_still_weights(self.contrast())
        if sets:
            self._set(self.chosen)

    def _set(self, strength: float) -> None:
        self.policy.strength = strength
        self._given = self.policy.strength  # rounded as it is kept

    def contrast(self) -> Contrast:
        """What was measured so far.

        Returns:
            Least squares over the windows but the first two: the difference of the two kinds beside
            a linear trend.
        """
        taken = -torch.tensor(self._losses, dtype=torch.float64, device="cpu").diff()[_RUN_IN:]
        windows = len(taken)
        if windows < COUNTED:
            return Contrast(math.nan, math.nan, windows)
        kinds = [self._augments(_RUN_IN + window) for window in range(windows)]
        kind = torch.tensor(kinds, dtype=torch.float64, device="cpu")
        time = torch.arange(windows, dtype=torch.float64, device="cpu")
        design = torch.stack((torch.ones_like(time), time - time.mean(), kind), dim=1)
        inverse = torch.linalg.inv(design.T @ design)
        effects = inverse @ (design.T @ taken)
        variance = (taken - design @ effects).square().sum() / (windows - design.shape[1])
        return Contrast(float(effects[2]), float((variance * inverse[2, 2]).sqrt()), windows)

    @property
    def _prior(self) -> float:
        """What is added to t."""
        sure = float(self._expected() if callable(self._expected) else self._expected)
        return min(4 * sure - 1, 1.0)

    @property
    def chosen(self) -> float:
        """The strength that what was measured so far speaks for."""
        t = self.contrast().t
        return 0.0 if math.isnan(t) else min(max(t + self._prior, 0.0), self.most, self._enough)

    @property
    def _enough(self) -> float:
        """The strength at which the most likely operation comes to nearly every image."""
        ops = self.policy.log_probs().ops
        assert ops is not None  # with a strength
        return 1 / float(ops.detach().exp().max())

    def _tried(self, window: int, pair: int) -> float:
        """The strength of a pair of the trial: it rises slowly, then comes and goes."""
        if window >= _RUN_IN and not self._augments(window):
            return 0.0
        strength = min(self.strength, self._enough)
        if window < _RUN_IN:
            return strength * (pair - self.first + 1) / (_RUN_IN * self.length)
        return strength

    def _augments(self, window: int) -> bool:
        return self._kinds[window % len(self._kinds)]

    def _decided(self) -> bool:
        t = self.contrast().t
        return t < -self._prior or t > _CLEAR

    def state_dict(self) -> dict[str, Any]:
        """What was measured, and the mean of weights that is under way.

        Returns:
            A new dictionary of plain tensors and data.
        """
        return {
            "over": self.over,
            "plan": [self.first, self.length, self.windows],
            "explored": self.explored,
            "losses": list(self._losses),
            "pair": self._pair,
            **self._mean.state_dict(),
        }

    def checked(self, state: Any, model: nn.Module) -> Callable[[], None]:
        """A function that restores :meth:`state_dict`; the strength is in the policy's state.

        Args:
            state: of a trial of as many pairs.
            model: that is trained.

        Returns:
            A function without arguments; until it is called nothing changes.

        Raises:
            ValueError: the state is damaged, of another model, or of another length of the run.
        """
        own = self.state_dict()
        fits = isinstance(state, Mapping) and own.keys() <= state.keys()
        if not fits or not isinstance(state["losses"], list):
            raise ValueError("state of the trial is damaged")
        numbers = all(isinstance(value, float) for value in (state["explored"], *state["losses"]))
        pair = state["pair"]  # -1 before the first one
        if not numbers or not are_counts(pair if pair != -1 else 0):
            raise ValueError("state of the trial is damaged")
        if state["plan"] != own["plan"] and not state["over"]:
            raise ValueError(
                "state is of a trial at other times: go on with the pairs= that the run began with"
            )
        restore_mean = self._mean.checked(state["mean"], state["count"], model)

        def restore() -> None:
            self.over, self.explored = bool(state["over"]), float(state["explored"])
            self._losses = list(state["losses"])
            self._pair = int(state["pair"])
            self._given = self.policy.strength if self._pair >= 0 else None
            restore_mean()

        return restore
