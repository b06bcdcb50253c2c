"""Which half of a pair the batches of somebody else's loop are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ola_augment.actions import Actions, as_actions
from ola_augment.training.batches import IMAGES, TARGETS, named
from ola_augment.training.checks import warn_of_still_maps
from ola_augment.training.learner import OLALearner
from ola_augment.training.metrics import hits
from ola_augment.training.pair import Step
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.recommended import check_length

__all__ = ["Pairs", "read_images", "with_images"]


class Pairs:
    """Hands the micro-batches of a loop that steps by itself to a learner, half by half.

    The batches of one update are one half of a pair, however many they are; with
    ``reference="current"`` they are both, the plain half first. Held-out images join them when the
    learner lets them (:meth:`OLALearner.rejoin`).

    Args:
        learner: of the policy.
        accuracy: where the learner has a thermostat: (the network's outputs, the batch) -> share of
            right predictions in [0, 1]; None compares outputs, or their ``logits``, (B, classes)
            with the batch's targets (B,).

    Attributes:
        stats: of the policy's latest update, or None.

    Raises:
        TypeError: ``learner`` is no :class:`OLALearner`.
        ValueError: a learner that needs more of a step than its batch: an :class:`NSLRUpdater`, or
            a ``DirectionalAlignment``.

    Example:
        >>> import torch
        >>> from ola_augment import OLAAugment
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> pairs = Pairs(OLALearner(model, OLAAugment()))
        >>> for images in torch.zeros(2, 4, 3, 8, 8):  # an augmented batch, then a plain one
        ...     with pairs.batch((images,), accumulate=1) as (seen,):
        ...         model(seen).square().mean().backward()
        ...     model.zero_grad()  # after the optimizer's step
        ...     pairs.updated()
        >>> pairs.stats.stepped
        True
    """

    def __init__(
        self, learner: OLALearner, accuracy: Callable[[Any, Any], float | None] | None = None
    ) -> None:
        if not isinstance(learner, OLALearner):
            raise TypeError(f"learner must be an OLALearner, got {type(learner).__name__}")
        if lacks := learner.needs:
            raise ValueError(
                f"the learner needs {lacks}, which a framework's loop does not give: take a "
                "GARUpdater or ValueUpdater with the default engine, or write the loop yourself"
            )
        self.learner = learner
        self.stats: UpdateStats | None = None
        self._accuracy = accuracy or _accuracy
        self._plain_next = False
        self._ran = 0  # micro-batches of the update under way
        self._whole = False  # that update's half has ended
        self._updated = False

    def run(self, updates: float, done: int) -> None:
        """A run begins, or goes on.

        Args:
            updates: of the optimizer from its first step to its last; inf where nobody knows. A
                run that is over before the learner's trial, with the pairs that the learner has
                seen already, brings a warning.
            done: of them, as in a run that goes on.
        """
        left = updates - done
        pairs = left if self.learner.plain_first else (left + self._plain_next) // 2
        check_length(self.learner, self.learner.pairs + pairs, stacklevel=4)

    def epoch(self, loader: Any) -> None:
        """An epoch begins.

        Args:
            loader: of the training, which held-out images join in proportion to its images.
        """
        if self.learner.rejoins:
            self.learner.epoch.begin(loader)

    @contextlib.contextmanager
    def batch(
        self, batch: Any, accumulate: int, loss_scale: float = 1.0, last: bool | None = None
    ) -> Iterator[Any]:
        """The forward and backward pass of one micro-batch.

        Args:
            batch: as the loader gave it, augmented by workers or not.
            accumulate: micro-batches of this update, as far as that is known.
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.
            last: whether this one is the update's last; None is the ``accumulate``-th.

        Yields:
            The batch for the model: augmented where it is its turn, without the workers' actions.

        Raises:
            ValueError: a batch without images, one that held-out images cannot join, or an odd
                ``accumulate`` with ``reference="current"``.
        """
        learner = self.learner
        if not self._updated and not self._ran:
            learner.refuse_sharded()
        images, actions = read_images(batch := learner.rejoin(batch))
        last = self._ran + 1 == accumulate if last is None else last
        if learner.plain_first and accumulate % 2 and not self._updated:
            raise ValueError(
                'reference="current" makes one update of both halves of a pair: accumulate an '
                f"even number of batches, got {accumulate}"
            )
        plain = self._ran < accumulate // 2 if learner.plain_first else self._plain_next
        self._ran += 1
        if learner.plain_first and accumulate == 1:  # an epoch's last update has but one batch
            self._whole = True
            yield with_images(batch, images)
            return
        if plain:
            ends = self._ran == accumulate // 2 if learner.plain_first else last
            half: contextlib.AbstractContextManager[Step] = learner.plain_step(
                loss_scale=loss_scale, last=ends
            )
        else:
            if actions is None:
                warn_of_still_maps(images, batch)
                images = learner.augment(images)
            half = learner.augmented_step(actions=actions, loss_scale=loss_scale, last=last)
        given = with_images(batch, images)
        with half as step, self._measured(step, given, plain):
            yield given
        self._whole = last
        self.stats = step.stats or self.stats

    @contextlib.contextmanager
    def _measured(self, step: Step, batch: Any, plain: bool) -> Iterator[None]:
        """Fill in the accuracy where a thermostat waits for it."""
        if self.learner.thermostat is None or not plain:
            yield
            return
        seen: list[Any] = []
        with self.learner.on_outputs(seen.append):
            yield
        step.accuracy = self._accuracy(seen[0], batch) if seen else None
        if step.accuracy is None:
            raise ValueError(
                "the learner's thermostat needs the accuracy of plain batches, which cannot be "
                "read from the network's outputs and the batch: give accuracy=, a function of both"
            )

    def updated(self) -> None:
        """The optimizer has stepped, or is about to: the half is over."""
        if not self._whole:
            self.learner.drop()
        self._ran, self._whole, self._updated = 0, False, True
        self._plain_next = not self._plain_next

    def state_dict(self) -> dict[str, Any]:
        """The learner's, and which half is next; a pair that awaits its reward loses it.

        Returns:
            A new dictionary of plain tensors and data.
        """
        try:
            state = self.learner.state_dict()
        except RuntimeError:  # a capture cannot be saved
            self.learner.drop()
            state = self.learner.state_dict()
        return {"learner": state, "plain_next": self._plain_next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state: of a learner with the same kinds of parts.

        Raises:
            ValueError: it does not fit; nothing has changed.
        """
        known = isinstance(state, Mapping) and state.keys() >= {"learner", "plain_next"}
        if not known or not isinstance(state["plain_next"], bool):
            raise ValueError("not a state of a learner in another framework's loop")
        self.learner.load_state_dict(state["learner"])
        self._plain_next, self._ran = state["plain_next"], 0


def read_images(batch: Any) -> tuple[Tensor, Actions | None]:
    """The images of a batch, and what workers drew for them.

    Args:
        batch: a mapping with ``images``, ``image`` or ``pixel_values`` and perhaps ``actions``, or
            a sequence, images first and :class:`Actions`, if any, last.

    Returns:
        The images, and the actions on the CPU or None.

    Raises:
        ValueError: no such thing.
    """
    if isinstance(batch, Mapping):
        images = named(batch, IMAGES)
        actions = batch.get("actions")
    else:
        sequence = isinstance(batch, (tuple, list)) and len(batch) > 0
        images, actions = (batch[0], batch[-1]) if sequence else (None, None)
    if not isinstance(images, Tensor):
        raise ValueError(
            f"a batch must be a mapping with one of {', '.join(IMAGES)}, or a tuple or list with "
            f"a tensor of images first; got {type(batch).__name__}"
        )
    actions = as_actions(actions)
    if not isinstance(actions, Actions):
        return images, None
    return images, Actions(*(field.cpu() for field in actions))


def with_images(batch: Any, images: Tensor) -> Any:
    """A batch like another one, with these images and without actions.

    Args:
        batch: with images where :func:`read_images` finds them.
        images: in their place.

    Returns:
        A new batch; other entries are the same objects.
    """
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)
        changed.pop("actions", None)
        changed[next(name for name in IMAGES if name in batch)] = images
        return changed
    others = (entry for entry in batch[1:] if not isinstance(as_actions(entry), Actions))
    entries = [images, *others]
    if hasattr(batch, "_fields") and len(entries) == len(batch):
        return type(batch)(*entries)
    return tuple(entries) if isinstance(batch, tuple) else entries


def _accuracy(outputs: Any, batch: Any) -> float | None:
    """Of a classifier's outputs, or of an object or mapping with ``logits``."""
    if isinstance(batch, Mapping):
        targets = named(batch, TARGETS)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    else:
        targets, logits = batch[1] if len(batch) > 1 else None, outputs
    return hits(getattr(logits, "logits", logits), targets)
