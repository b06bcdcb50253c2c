"""OLALearner: policy, signal, updater and their state, for anybody's own training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.actions import Actions
from ola_augment.alignment import GradientAlignment, NotFinite
from ola_augment.alignment.proof import trainable_parameters, unwrapped
from ola_augment.files import describe_policy
from ola_augment.policy import OLAPolicy, Policy
from ola_augment.training.held_out import BatchLoss, HeldOut
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.reward import all_ranks
from ola_augment.training.signals import Alignments, Engine, NextStepLoss, Signal
from ola_augment.training.thermostat import Thermostat
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater
from ola_augment.transforms import PolicyTransform

_VERSION = 2


@dataclass
class Step:
    """One half of a pair, as the learner's context managers hand it out.

    Attributes:
        learns: whether the policy learns from this pair.
        losses: of :class:`~ola_augment.alignment.DirectionalAlignment` alone: (B,), to run
            backward.
        loss: set it inside the block where the updater needs it (:class:`NSLRUpdater`).
        accuracy: in [0, 1], set it inside the plain block where a thermostat needs it.
        stats: of the policy's update, after the block; None where there was none.

    Example:
        >>> Step(learns=True).stats is None
        True
    """

    learns: bool
    losses: Tensor | None = None
    loss: Tensor | None = None
    accuracy: float | None = None
    stats: UpdateStats | None = None


class OLALearner:
    """Learns an augmentation policy inside any training loop.

    Batches come in pairs: an augmented step, then a plain one (with ``reference="current"`` the
    plain one comes first). In a plain loop::

        learner = OLALearner(model, augment)
        for (images, targets), (plain_images, plain_targets) in pairs:
            with learner.augmented_step():
                criterion(model(learner.augment(images)), targets).backward()
            optimizer.step(); optimizer.zero_grad()
            with learner.plain_step():
                criterion(model(plain_images), plain_targets).backward()
            optimizer.step(); optimizer.zero_grad()

    A step that fails, or whose signal is NaN or Inf, leaves the policy as it is; the next pair
    learns again (``skipped`` counts them). Under ``torch.distributed`` all ranks skip together.

    Args:
        model: that is trained; may be a ``DistributedDataParallel``.
        augment: the transform whose policy learns.
        lr: of the policy's Adam, positive.
        reference: where the reference gradient g comes from. "next" (the paper): the plain batch,
            after the augmented update. "current": the plain batch, before either update: run its
            backward first, step the optimizer when both are done. Or batches that are never
            trained on (held out): one is drawn for each pair, again from the start after the last.
        cosine: reward the cosine between the gradients, not their dot product.
        learn_every: learn from every so manyth pair; the others cost nothing.
        micro_batches: steps that make one half of a pair, when gradients are accumulated.
        smoothing: of held-out gradients, in [0, 1): g is their running mean over the pairs that
            teach, of which the latest has the share ``1 - smoothing``. Steps with momentum swing
            to and fro; what is left in the mean is what would help for longer than one step.
        learn_pairs: learn only from the first so many pairs; None from all. Held-out batches may
            join the training after them. By default a policy of a given strength draws uniformly
            until then (``ValueUpdater(explore=True)``).
        thermostat: steers the strength of ``augment.policy``; set ``step.accuracy`` in each plain
            block.
        updater: None is a :class:`ValueUpdater` for a policy of a given strength (``lr`` is then
            ignored), else ``GARUpdater(augment.policy, lr)``.
        engine: instead of ``GradientAlignment(model)``.
        loss: of a held-out batch, called as ``loss(model, *batch)``; None is cross entropy of a
            batch (inputs, targets), uint8 inputs scaled to [0, 1].

    Attributes:
        policy: that learns.
        pairs: completed so far.
        skipped: pairs that should have taught the policy something, and did not.

    Raises:
        TypeError: ``augment`` is no transform with a policy.
        ValueError: a number out of range, an unknown ``reference``, an updater of another policy,
            an engine of another model, or a combination that has no signal.

    Example:
        >>> from ola_augment import OLAAugment
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        >>> learner = OLALearner(model, OLAAugment())
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> with learner.augmented_step():
        ...     model(learner.augment(images) / 255).square().mean().backward()
        >>> model.zero_grad()  # after the optimizer's step
        >>> with learner.plain_step() as step:
        ...     model(images / 255).square().mean().backward()
        >>> step.stats.stepped, learner.pairs
        (True, 1)

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    def __init__(
        self,
        model: nn.Module,
        augment: PolicyTransform,
        lr: float = 0.03,
        reference: str | Iterable[Any] = "next",
        cosine: bool = False,
        learn_every: int = 1,
        *,
        micro_batches: int = 1,
        smoothing: float = 0.8,
        learn_pairs: int | None = None,
        thermostat: Thermostat | None = None,
        updater: GARUpdater | NSLRUpdater | ValueUpdater | None = None,
        engine: Engine | None = None,
        loss: BatchLoss | None = None,
    ) -> None:
        if not isinstance(augment, PolicyTransform):
            raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
        counts = {"learn_every": learn_every, "micro_batches": micro_batches}
        if learn_pairs is not None:
            counts["learn_pairs"] = learn_pairs
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if isinstance(reference, str) and reference not in ("next", "current"):
            raise ValueError(
                f'reference must be "next", "current" or held-out batches, got {reference!r}'
            )
        self.updater = updater or _updater(augment.policy, lr, learn_pairs is not None)
        if self.updater.policy is not augment.policy:
            raise ValueError("updater must be of augment.policy, it updates another policy")
        if thermostat is not None and thermostat.policy is not augment.policy:
            raise ValueError("thermostat must be of augment.policy, it steers another policy")
        self._model = unwrapped(model)
        self._signal: Signal
        if self.updater.per_example:
            engine = GradientAlignment(model) if engine is None else engine
            if engine.model is not self._model:
                raise ValueError("engine must be of the model that is trained, it has another one")
            norms = getattr(self.updater, "takes_norms", False)
            self._signal = Alignments(engine, cosine, norms)
        else:
            if reference != "next" or cosine or engine is not None:
                raise ValueError(
                    f"{type(self.updater).__name__} rewards with the next loss: it takes "
                    'reference="next", no cosine and no engine'
                )
            self._signal = NextStepLoss()
        self.transform = augment
        self.policy: Policy = augment.policy
        self.reference = reference if isinstance(reference, str) else "held out"
        self._held_out = None if isinstance(reference, str) else HeldOut(reference, smoothing, loss)
        self.thermostat = thermostat
        self.learn_every = learn_every
        self.learn_pairs = learn_pairs
        self.micro_batches = micro_batches
        self.pairs = 0
        self.skipped = 0
        self._drawn: list[Actions] = []
        self.drop()

    @classmethod
    def recommended(
        cls,
        model: nn.Module,
        augment: PolicyTransform,
        held_out: Iterable[Any],
        pairs: int,
        loss: BatchLoss | None = None,
    ) -> OLALearner:
        """The setting that `Results <../results.html>`__ recommends, for a run of known length.

        For a quarter of the run, operations are drawn uniformly and valued by the cosine between
        the gradients of the examples that got them and that of held-out images, from 250 to
        500 pairs (all, in a shorter run); for the rest they are drawn by their values. A
        thermostat steers the strength.

        Args:
            model: that is trained.
            augment: with a strength, where the thermostat starts: ``OLAAugment(strength=1)``.
            held_out: batches of images from where the model will be used, or of a part of the
                training images; after ``learner.learn_pairs`` they may join the training.
            pairs: of augmented and plain steps in the whole run.
            loss: of a held-out batch, called as ``loss(model, *batch)``; None is cross entropy of
                a batch (inputs, targets), uint8 inputs scaled to [0, 1].

        Returns:
            The learner, to be used like any other.

        Raises:
            TypeError: another policy than an :class:`OLAPolicy`.
            ValueError: one that learns its strength, or ``pairs`` below 1.

        Example:
            >>> from ola_augment import OLAAugment
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
            >>> augment = OLAAugment(strength=1)
            >>> learner = OLALearner.recommended(model, augment, held_out, pairs=4000)
            >>> learner.learn_pairs, learner.learn_every
            (1000, 4)
        """
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            raise ValueError(f"pairs must be an int of at least 1, got {pairs!r}")
        if not isinstance(augment, PolicyTransform):
            raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
        explored = -(-pairs // 4)
        return cls(
            model,
            augment,
            reference=held_out,
            learn_every=max(1, explored // 250),
            learn_pairs=explored,
            thermostat=Thermostat(augment.policy, lower_after=explored),  # type: ignore[arg-type]
            loss=loss,
        )

    @property
    def learns(self) -> bool:
        """Whether the policy learns from the pair that is under way, or comes next.

        A frozen policy (:meth:`PolicyTransform.freeze`) learns from none.
        """
        over = self.learn_pairs is not None and self.pairs >= self.learn_pairs
        return not over and not self._frozen and self.pairs % self.learn_every == 0

    @property
    def _frozen(self) -> bool:
        logits = self.policy.named_logits().values()
        return bool(logits) and not any(entry.requires_grad for entry in logits)

    @property
    def plain_first(self) -> bool:
        """Whether the plain half of a pair comes first (``reference="current"``)."""
        return self.reference == "current"

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model other than this learner's.

        Args:
            model: with or without its ``DistributedDataParallel``.

        Raises:
            ValueError: it is another one.
        """
        if unwrapped(model) is not self._model:
            raise ValueError("learner must be of the model that is trained, it has another one")

    def augment(self, images: Tensor) -> Tensor:
        """Augment a batch for the augmented step, and remember what was drawn.

        Args:
            images: (B, C, H, W), uint8 or floating in [0, 1].

        Returns:
            A new tensor of the shape and dtype of ``images``.

        Raises:
            TypeError, ValueError: what :meth:`PolicyTransform.augment` refuses.
        """
        images, actions = self.transform.augment(images)
        self._drawn.append(actions)
        return images

    def drop(self) -> None:
        """Forget the pair that is under way: its reward will not be given."""
        self._signal.clear()
        self._drawn.clear()
        self._actions: list[Actions] = []  # of augmented steps that await their reward
        self._gradients: Mapping[str, Tensor] | None = None
        self._half: tuple[str, int] = ("", 0)  # under way, and how many of its micro-batches ran

    @contextlib.contextmanager
    def augmented_step(
        self, *batch: Any, actions: Actions | None = None, loss_scale: float = 1.0
    ) -> Iterator[Step]:
        """The forward and backward pass of an augmented (micro-)batch.

        Args:
            batch: for a ``DirectionalAlignment``, which computes ``step.losses`` itself.
            actions: of images that were augmented elsewhere, as in DataLoader workers; None takes
                those of :meth:`augment`, called inside the block or before it.
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.

        Yields:
            The :class:`Step`.

        Raises:
            RuntimeError: nothing was augmented, or what the engine refuses.
            ValueError: the actions are not those of the examples in the block.
        """
        first = not self.plain_first
        step = Step(self.learns)
        try:
            count = self._enter("augmented", first)
            if count == 0 and self._held_out is not None and step.learns:
                self._gradients = self._held_out.gradients(self._model)
            # An engine that computes the losses is needed in every pair.
            captures = step.learns and (first or self._gradients is not None)
            with (
                self._signal.capture(batch, self._gradients, loss_scale)
                if captures or batch
                else contextlib.nullcontext()
            ) as given:
                step.losses = given if isinstance(given, Tensor) else None
                yield step
            drawn = [actions] if actions is not None else list(self._drawn)
            self._drawn.clear()
            if not drawn:
                raise RuntimeError(
                    "nothing was augmented: call learner.augment(images) before the step ends, or "
                    "pass actions"
                )
            self._actions += drawn * captures
            self._half = ("augmented", count + 1)
            if count + 1 == self.micro_batches and self.reference != "next":
                step.stats = self._reward(step, self._gradients)
        except BaseException:
            self.drop()
            raise
        if count + 1 == self.micro_batches and not first:
            self._complete()

    @contextlib.contextmanager
    def plain_step(self, *, loss_scale: float = 1.0) -> Iterator[Step]:
        """The forward and backward pass of a plain (micro-)batch; clip gradients after it.

        Args:
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.

        Yields:
            The :class:`Step`; its ``stats`` are filled in after the block.

        Raises:
            RuntimeError: no gradient reached the model, what the engine refuses, or no
                ``step.accuracy`` for the thermostat.
        """
        step = Step(self.learns)
        try:
            count = self._enter("plain", self.plain_first)
            yield step
            if self.thermostat is not None and not self._frozen:
                if step.accuracy is None:
                    raise RuntimeError(
                        "the thermostat needs the accuracy of the plain batch: `with "
                        "learner.plain_step() as step:` step.accuracy = accuracy"
                    )
                self.thermostat.step(step.accuracy)
            self._half = ("plain", count + 1)
            if count + 1 == self.micro_batches and step.learns:
                if self.reference == "next":
                    step.stats = self._reward(step, None, loss_scale)
                elif self.plain_first:
                    self._gradients = self._trained_gradients(loss_scale)
        except BaseException:
            self.drop()
            raise
        if count + 1 == self.micro_batches and not self.plain_first:
            self._complete()

    def _enter(self, half: str, first: bool) -> int:
        """How many micro-batches of this half ran; a first half begins a new pair."""
        if self._half[0] == half and self._half[1] < self.micro_batches:
            return self._half[1]
        if first and self._half[0]:  # the pair before was never finished
            self.skipped += self.learns
            drawn = list(self._drawn)
            self.drop()
            self._drawn += drawn
        return 0

    def _complete(self) -> None:
        self.drop()
        self.pairs += 1
        over = self.pairs == self.learn_pairs and not self._frozen
        if over and isinstance(self.updater, ValueUpdater):
            self.updater.commit()

    def _reward(
        self, step: Step, gradients: Mapping[str, Tensor] | None, loss_scale: float = 1.0
    ) -> UpdateStats | None:
        """Update the policy, or on no rank."""
        signal, actions = None, self._actions
        if actions and step.learns:
            with contextlib.suppress(NotFinite):
                signal = self._signal.read(gradients, step.loss, loss_scale)
            if signal is not None and not all(bool(part.isfinite().all()) for part in signal):
                signal = None
        device = next(self._model.parameters()).device
        if step.learns and not all_ranks(signal is not None, device):
            self.skipped += 1
            return None
        if signal is None:
            return None
        return self.updater.step(Actions.cat(actions), *signal)

    def _trained_gradients(self, loss_scale: float) -> dict[str, Tensor]:
        parameters = trainable_parameters(self._model)
        held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        found = {name: gradient.detach() / loss_scale for name, gradient in held.items()}
        if not found:
            raise RuntimeError("no gradient reached the model: run backward inside plain_step()")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Policy, meta-optimizer, accumulated gradients, generator, counts; plain tensors and data.

        Loads with ``torch.load(..., weights_only=True)``. Between the halves of a pair it can be
        taken where nothing waits for the second: the reward was given already (held-out
        reference), or the pair teaches nothing (``learn_every``).

        Returns:
            A new dictionary.

        Raises:
            RuntimeError: in the middle of a pair that awaits its reward, whose capture cannot be
                saved: save between pairs, or give it up with :meth:`drop`.
        """
        waits = self.learns and self._held_out is None
        if self._half[0] and (waits or self._half[1] < self.micro_batches):
            raise RuntimeError(
                "a pair is under way and its capture cannot be saved: save after its second step, "
                "or call drop() first and lose its reward"
            )
        generator = self.transform.generator
        return {
            "version": _VERSION,
            "policy_kind": describe_policy(self.policy),
            "policy": dict(self.policy.state_dict()),
            "updater": self.updater.state_dict(),
            "generator": None if generator is None else generator.get_state(),
            "pairs": self.pairs,
            "skipped": self.skipped,
            "half": self._half[0],
            "held_out": None if self._held_out is None else self._held_out.state_dict(),
            "thermostat": None if self.thermostat is None else self.thermostat.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; a pair that is under way is forgotten.

        Held-out batches go on where they were, if they come in the same order again.

        Args:
            state: of a learner with the same kinds of parts.

        Raises:
            ValueError: the state of another version, policy, space, updater or kind of reference,
                or one that is damaged; nothing has changed.
        """
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            raise ValueError(f"not a state of OLALearner of version {_VERSION}")
        kind = describe_policy(self.policy)
        if state.get("policy_kind") != kind:
            raise ValueError(
                f"state is of another policy or space: {state.get('policy_kind')!r}, this learner "
                f"has {kind!r}"
            )
        generator = self.transform.generator
        saved = state.get("generator")
        parts = {"generator": generator, "held_out": self._held_out, "thermostat": self.thermostat}
        for name, part in parts.items():
            if (part is None) != (state.get(name) is None):
                raise ValueError(f"state is of a learner with another {name}, or without one")
        half = state.get("half", "")
        if half not in ("", "plain" if self.plain_first else "augmented"):
            raise ValueError(f"state is of a learner with another order of halves: {half!r}")
        counts = [state.get("pairs"), state.get("skipped")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"state is damaged: counts {counts}")
        restore = None
        if self._held_out is not None:
            restore = self._held_out.checked(state["held_out"], self._model)
        before = {name: value.clone() for name, value in self.policy.state_dict().items()}
        try:
            if generator is not None:
                torch.Generator().set_state(saved)  # type: ignore[arg-type]
            self.policy.load_state_dict(state["policy"])
            self.updater.load_state_dict(state["updater"])
            if self.thermostat is not None:
                self.thermostat.load_state_dict(state["thermostat"])
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            self.policy.load_state_dict(before)
            raise ValueError(f"state does not fit this learner: {error}") from error
        if generator is not None:
            generator.set_state(saved)  # type: ignore[arg-type]
        if restore is not None:
            restore()
        self.pairs, self.skipped = counts  # type: ignore[assignment]
        self.drop()
        self._half = (half, self.micro_batches)


def _updater(policy: Policy, lr: float, explore: bool) -> GARUpdater | ValueUpdater:
    if isinstance(policy, OLAPolicy) and policy.strength is not None:
        return ValueUpdater(policy, explore=explore)
    return GARUpdater(policy, lr=lr)
