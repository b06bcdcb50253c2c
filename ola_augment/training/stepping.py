"""How a learner steps: the halves of a pair as context managers, and the reward after them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ola_augment.actions import Actions
from ola_augment.alignment import NotFinite
from ola_augment.alignment.method.captured import Captured
from ola_augment.training.checks import InputRanges, Leftovers
from ola_augment.training.everyone import Everyone
from ola_augment.training.outcome import compares, outcome
from ola_augment.training.pair import Step, of_each_pass
from ola_augment.training.parts import Parts
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.ranks import own_policy, refuse_join
from ola_augment.training.signals import trained_gradients
from ola_augment.training.values import ValueUpdater


class Stepping(Parts):
    """The steps of an :class:`OLALearner`."""

    _wrapper: nn.Module
    _drawn: list[Actions]
    _inputs: InputRanges
    _leftovers: Leftovers
    _everyone: Everyone

    def augment(self, images: Tensor, *, clips: bool = True) -> Tensor:
        """Augment a batch for the augmented step, and remember what was drawn.

        With a trial, as in the recommended setting, an image that would become flat (a standard
        deviation below 8 of 255 levels, where it had more) stays as it is, and counts as one for
        which every operation was dropped.

        Args:
            images: (B, C, H, W), or clips (B, T, C, H, W); uint8 or floating in [0, 1].
            clips: whether five dimensions are clips, an example of the model each, whose frames
                share a draw; False for a model that takes each of B x T images for an example.

        Returns:
            A new tensor of the shape and dtype of ``images``.

        Raises:
            TypeError, ValueError: what :meth:`PolicyTransform.augment` refuses.
        """
        self._try_out()
        augmented, actions = self.transform.augment(images, clips=clips)
        if self.trial is not None:
            augmented, actions = self._flats.spare(images, augmented, actions, self.transform)
        self._drawn.append(actions)
        return augmented

    @contextlib.contextmanager
    def step(
        self,
        images: Tensor,
        *,
        actions: Actions | None = None,
        loss_scale: float = 1.0,
        last: bool | None = None,
    ) -> Iterator[Step]:
        """The forward and backward pass of a (micro-)batch, augmented and plain in turns.

        One body for both halves of a pair; :meth:`augmented_step` and :meth:`plain_step` are the
        same with two. With ``reference="current"`` the optimizer steps after every second half.

        Args:
            images: (B, C, H, W), or clips (B, T, C, H, W); uint8 or floating in [0, 1].
            actions: of images that were augmented elsewhere, as in DataLoader workers.
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.
            last: whether this micro-batch ends its half (``accelerator.sync_gradients``); None
                counts up to ``micro_batches``.

        Yields:
            The :class:`Step`; ``step.images`` is what the model is to see.

        Raises:
            RuntimeError: an engine that takes the batch itself (``DirectionalAlignment``), a block
                that never looked at ``step.images`` though these were augmented, or what the steps
                refuse.
            TypeError, ValueError: what :meth:`augment` refuses.

        Example:
            >>> import torch
            >>> from ola_augment import OLAAugment, OLALearner
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> learner = OLALearner(model, OLAAugment())
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> for images in torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8):
            ...     with learner.step(images) as step:
            ...         model(step.images / 255).square().mean().backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> learner.pairs
            1
        """
        if self._signal.takes_batch:
            raise RuntimeError(
                "learner.step() has one body for both halves of a pair, this engine computes the "
                "losses of the augmented one itself: write augmented_step(...) and plain_step()"
            )
        augmented = self._pair.next_is_augmented
        if augmented and actions is None:
            images = self.augment(images)
        with (
            self.augmented_step(actions=actions, loss_scale=loss_scale, last=last)
            if augmented
            else self.plain_step(loss_scale=loss_scale, last=last)
        ) as step:
            step.images = images
            yield step
            if augmented and actions is None and not step.was_read:
                raise RuntimeError(
                    "step.images was not used in an augmented step: train on it, not on the batch "
                    "that it was made of, or the policy learns from operations that nobody saw"
                )

    @contextlib.contextmanager
    def augmented_step(
        self,
        *batch: Any,
        actions: Actions | None = None,
        loss_scale: float = 1.0,
        last: bool | None = None,
    ) -> Iterator[Step]:
        """The forward and backward pass of an augmented (micro-)batch.

        Args:
            batch: for a ``DirectionalAlignment``, which computes ``step.losses`` itself.
            actions: of images that were augmented elsewhere, as in DataLoader workers; None takes
                those of :meth:`augment`, called inside the block or before it.
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.
            last: whether this micro-batch ends its half (``accelerator.sync_gradients``); None
                counts up to ``micro_batches``.

        Yields:
            The :class:`Step`.

        Raises:
            RuntimeError: nothing was augmented, or what the engine refuses.
            ValueError: the actions are not those of the examples in the block.
        """
        pair, step = self._pair, Step(self.learns, augmented=True)
        first = not self.plain_first
        try:
            ends = self._enter("augmented", last)
            if pair.count == 0 and self._held_out is not None and step.learns:
                with self._inputs.watch(self._model, "held-out"):
                    pair.gradients = self._held_out.gradients(self._model)
            # An engine that computes the losses is needed in every pair.
            captures = step.learns and (first or pair.gradients is not None)
            watched = self._inputs.watch(self._model, "training")
            with (
                watched if self._held_out is not None else contextlib.nullcontext(),
                self._signal.capture(batch, pair.gradients, loss_scale)
                if captures or batch
                else contextlib.nullcontext() as given,
            ):
                step.losses = given if isinstance(given, Tensor) else None
                yield step
            drawn = [actions] if actions is not None else list(self._drawn)
            self._drawn.clear()
            if not drawn:
                raise RuntimeError(
                    "nothing was augmented: call learner.augment(images) before the step ends, or "
                    "pass actions"
                )
            if isinstance(given, Captured):
                drawn = of_each_pass(drawn, given.passes)
            pair.actions += drawn * captures
            self._leave(ends)
            if ends and self.reference != "next":
                step.stats = self._reward(step, pair.gradients)
        except BaseException:
            self.drop()
            raise
        if ends and not first:
            self._complete()

    @contextlib.contextmanager
    def plain_step(self, *, loss_scale: float = 1.0, last: bool | None = None) -> Iterator[Step]:
        """The forward and backward pass of a plain (micro-)batch; clip gradients after it.

        Args:
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.
            last: whether this micro-batch ends its half (``accelerator.sync_gradients``); None
                counts up to ``micro_batches``.

        Yields:
            The :class:`Step`; its ``stats`` are filled in after the block.

        Raises:
            RuntimeError: no gradient reached the model, what the engine refuses, or no
                ``step.accuracy`` for the thermostat.
        """
        step = Step(self.learns, augmented=False)
        try:
            ends = self._enter("plain", last)
            yield step
            if self.thermostat is not None and not self._frozen:
                if step.accuracy is None:
                    raise RuntimeError(
                        "the thermostat needs the accuracy of the plain batch: `with "
                        "learner.plain_step() as step:` step.accuracy = accuracy"
                    )
                self.thermostat.step(step.accuracy)
            self._leave(ends)
            if ends and step.learns:
                if self.reference == "next":
                    step.stats = self._reward(step, None, loss_scale)
                elif self.plain_first:
                    self._pair.gradients = trained_gradients(self._model, loss_scale)
        except BaseException:
            self.drop()
            raise
        if ends and not self.plain_first:
            self._complete()

    def drop(self) -> None:
        """Forget the pair that is under way: its reward will not be given."""
        self._pair.lose("given up", self.learns)
        self._forget()

    def _forget(self) -> None:
        self._signal.clear()
        self._pair.clear()
        self._drawn.clear()

    def _enter(self, half: str, last: bool | None) -> bool:
        """Whether this micro-batch ends its half; a first half begins a new pair."""
        refuse_join(self._wrapper)
        if self._pair.begins(half):
            self._pair.prepare(half, self.learns, not self.settled)
            if self._pair.is_first(half):
                self._signal.clear()
                self._try_out()
            self._pair.start(half)
            if self.reference != "next":  # whose engine says so itself
                self._leftovers.begin()
        return self._pair.count + 1 == self.micro_batches if last is None else last

    def _leave(self, ends: bool) -> None:
        self._pair.count += 1
        self._pair.ended = ends
        if ends and self.reference != "next":
            self._leftovers.end(self._model)

    def _try_out(self) -> None:
        """Between two pairs, before the next one draws."""
        own_policy(self.policy)
        if self.trial is None or self._pair.half:
            return
        if self._frozen:
            self.trial.stop()
        else:
            assert self._held_out is not None
            with self._inputs.watch(self._model, "held-out"):
                self.trial.begin_pair(self.pairs, self.learns, self._model, self._held_out.loss)

    def _complete(self) -> None:
        counts = self._pair.complete()
        self._forget()
        if not counts:
            return
        self.pairs += 1
        over = self._teaches and self._learned and not self._frozen
        if over and isinstance(self.updater, ValueUpdater) and self.updater.explores:
            self.updater.commit()

    def _reward(
        self, step: Step, gradients: Mapping[str, Tensor] | None, loss_scale: float = 1.0
    ) -> UpdateStats | None:
        """Update the policy, or on no rank."""
        if not step.learns:
            return None
        signal, pair, actions = None, self._pair, self._pair.actions
        if actions:
            with contextlib.suppress(NotFinite):
                signal = self._signal.read(gradients, step.loss, loss_scale)
            if signal is not None and not all(bool(part.isfinite().all()) for part in signal):
                signal = None
        device = next(self._model.parameters()).device
        bad, everywhere, learn = outcome(self.updater, self._everyone, actions, signal, device)
        if bad:
            if not pair.lost:
                pair.skip("no first half" if pair.alone else "not finite")
            return None
        if everywhere == 1 and compares(self.updater):
            pair.skip("one example")
            return None
        pair.taught()
        return learn()
