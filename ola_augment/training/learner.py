"""OLALearner: policy, signal, updater and their state, for anybody's own training loop."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.actions import Actions
from ola_augment.alignment import GradientAlignment, NotFinite
from ola_augment.alignment.method.captured import Captured
from ola_augment.alignment.proof import trainable_parameters, unwrapped
from ola_augment.files import describe_policy
from ola_augment.policy import OLAPolicy, Policy
from ola_augment.streams import world_size
from ola_augment.training.everyone import Everyone
from ola_augment.training.evidence import Evidence, gather
from ola_augment.training.flat import spare_flat
from ola_augment.training.held_out import BatchLoss, HeldOut, held_out_loss
from ola_augment.training.policy_gradient import UpdateStats
from ola_augment.training.ranks import alike, own_policy, refuse_join, sum_over_ranks
from ola_augment.training.rejoin import Rejoin, Rejoined
from ola_augment.training.reward import cosine_reward, gradient_alignment_reward
from ola_augment.training.signals import Alignments, Engine, NextStepLoss, Signal
from ola_augment.training.thermostat import Thermostat
from ola_augment.training.trial import SHARE, SHORTEST_RUN, Trial
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater
from ola_augment.transforms import PolicyTransform

_VERSION = 3
#: Pairs that taught nothing, one after the other, before the learner says so.
_IN_VAIN = 10
#: Images before the share of flat ones is worth a word.
_ENOUGH_TO_TELL = 200
#: Updaters that learn from a batch of all ranks as from any other.
_OURS = (GARUpdater, ValueUpdater)
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
    learns again. ``skipped`` counts them by their cause; ten in a row are worth a warning. Under
    ``torch.distributed`` all ranks skip together.

    Args:
        model: that is trained; may be a ``DistributedDataParallel``.
        augment: the transform whose policy learns.
        lr: of the policy's Adam, positive.
        reference: where the reference gradient g comes from. "next" (the paper): the plain batch,
            after the augmented update. "current": the plain batch, before either update: run its
            backward first, step the optimizer when both are done. Or batches that are never
            trained on (held out): one is drawn for each pair, again from the start after the last.
        cosine: reward the cosine between the gradients, not their dot product.
        learn_every: learn from every N-th pair; the others cost nothing.
        micro_batches: steps that make one half of a pair, when gradients are accumulated; where
            their number varies, give ``last=`` to each step instead.
        smoothing: of held-out gradients, in [0, 1): g is their running mean over the pairs that
            teach, of which the latest has the share ``1 - smoothing``. Steps with momentum
            oscillate; what is left in the mean is what would help for longer than one step.
        learn_pairs: learn only from the first N pairs; None from all, 0 from none. Held-out
            batches may join the training after them. By default a policy of a given strength
            draws uniformly until then (``ValueUpdater(explore=True)``).
        thermostat: steers the strength of ``augment.policy``; set ``step.accuracy`` in each plain
            block.
        rejoin: let held-out images join the training by :meth:`loader` (in :func:`fit` and the
            integrations by themselves) once the policy has no more use for them.
        calibrate: take held-out gradients at the best temperature of the model's outputs: a model
            that is too sure of itself asks for whatever makes it less sure.
        trial: tries what was learned on the held-out images, and sets the strength.
        updater: None is a :class:`ValueUpdater` for a policy of a given strength (``lr`` is then
            ignored), else ``GARUpdater(augment.policy, lr)``.
        engine: instead of ``GradientAlignment(model)``.
        loss: of a held-out batch, called as ``loss(model, *batch)``; None is cross entropy of a
            batch (inputs, targets), inputs of uint8 and uint16 scaled to [0, 1].

    Attributes:
        policy: that learns.
        pairs: completed so far.
        augmented: images that came to :meth:`augment`.
        flat: of them, those of which augmentation left nothing to see.
        skipped: pairs that should have taught the policy something, and did not, by their cause:
            "not finite" (on some rank), "one example" (a reward tells the examples of a batch
            apart), "no second half", "no first half", "given up" (:meth:`drop`, or an error).

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
        trial: Trial | None = None,
        rejoin: bool = False,
        calibrate: bool = False,
        updater: GARUpdater | NSLRUpdater | ValueUpdater | None = None,
        engine: Engine | None = None,
        loss: BatchLoss | None = None,
    ) -> None:
        if not isinstance(augment, PolicyTransform):
            raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
        counts = {"learn_every": (learn_every, 1), "micro_batches": (micro_batches, 1)}
        if learn_pairs is not None:
            counts["learn_pairs"] = (learn_pairs, 0)
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if isinstance(reference, str) and reference not in ("next", "current"):
            raise ValueError(
                f'reference must be "next", "current" or held-out batches, got {reference!r}'
            )
        self.updater = updater or _updater(augment.policy, lr, learn_pairs is not None)
        if self.updater.policy is not augment.policy:
            raise ValueError("updater must be of augment.policy, it updates another policy")
        if thermostat is not None and thermostat.policy is not augment.policy:
            raise ValueError("thermostat must be of augment.policy, it steers another policy")
        if trial is not None and (trial.policy is not augment.policy or isinstance(reference, str)):
            raise ValueError("trial must be of augment.policy, and needs held-out batches")
        self._model, self._wrapper = unwrapped(model), model
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
        self._held_out = (
            None if isinstance(reference, str) else HeldOut(reference, smoothing, loss, calibrate)
        )
        if rejoin and isinstance(reference, str):
            raise ValueError("rejoin needs held-out batches")
        self._rejoin = (
            Rejoin(reference, augment.policy) if rejoin and not isinstance(reference, str) else None
        )
        self._rejoin_half: Rejoin | None = None
        self._checked_rejoin = False
        self.thermostat = thermostat
        self.trial = trial
        self.learn_every = learn_every
        self.learn_pairs = learn_pairs
        self.micro_batches = micro_batches
        self.pairs = 0
        self.skipped: Counter[str] = Counter()
        self.augmented = 0
        self.flat = 0
        self._told_flat = False
        self._in_vain = 0
        self._told = False
        self._lost = False  # the pair's first half was given up
        self._alone = False  # the second half has none before it
        self._drawn: list[Actions] = []
        self._everyone = Everyone()
        self._clear()

    @classmethod
    def recommended(
        cls,
        model: nn.Module,
        augment: PolicyTransform,
        held_out: Iterable[Any],
        pairs: int,
        loss: BatchLoss | None = None,
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        target_domain: bool = True,
        rejoin: bool = True,
    ) -> OLALearner:
        """The setting that `Results <../results.html>`__ recommends, for a run of known length.

        For a quarter of the run operations are drawn uniformly, and valued by the cosine between
        the gradients of the examples that got them and that of held-out images; a sixteenth of all
        pairs teach, at most 500. Then a :class:`Trial` of a quarter to a half of the run finds out
        whether augmentation by these values helps on the held-out images, and how much of it is to
        be used for the rest; where it does not help, none is. :meth:`evidence` says what was found.

        Args:
            model: that is trained.
            augment: with a strength, that of pairs that teach: ``OLAAugment(strength=1)``.
            held_out: batches of labelled images of the target domain, or of a part of the training
                images, which look like the training's; they come back into it by :meth:`loader`.
            pairs: of augmented and plain steps in the whole run; 400 and more can teach something.
            loss: of a held-out batch, called as ``loss(model, *batch)``; None is cross entropy of
                a batch (inputs, targets), inputs of uint8 and uint16 scaled to [0, 1].
            preprocess: of held-out inputs, where ``loss`` is None: the normalisation that the
                training images get.
            target_domain: whether held-out images are of another domain than the training images.
                Where they are a part of the training images, operations are not told apart, since
                what a few such images prefer is chance; only how much of all is to be used.
            rejoin: False leaves held-out images out of the training for good.

        Returns:
            The learner, to be used like any other.

        Raises:
            TypeError: another policy than an :class:`OLAPolicy`.
            ValueError: one that learns its strength, ``pairs`` below 1, or both ``loss`` and
                ``preprocess``.

        Example:
            >>> from ola_augment import OLAAugment
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
            >>> augment = OLAAugment(strength=1)
            >>> learner = OLALearner.recommended(model, augment, held_out, pairs=4000)
            >>> learner.learn_pairs, learner.learn_every, learner.trial.windows
            (1000, 4, 16)
        """
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            raise ValueError(f"pairs must be an int of at least 1, got {pairs!r}")
        if not isinstance(augment, PolicyTransform):
            raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
        policy: Any = augment.policy  # checked by those who are given it
        first = -(-pairs // 4)
        trial = Trial(
            policy,
            first,
            int(pairs * SHARE),
            strength=3.0 if target_domain else 2.0,
            expected=target_domain,
        )
        if not trial.windows:
            warnings.warn(
                f"{pairs} pairs of steps are too few to try augmentation out ({SHORTEST_RUN} are "
                "enough): there will be none; train for longer, or take UniformAugment",
                stacklevel=2,
            )
        learn_pairs = first if target_domain and trial.windows else 0
        return cls(
            model,
            augment,
            reference=held_out,
            learn_every=-(-first // min(-(-pairs // 16), 500)),
            learn_pairs=learn_pairs,
            trial=trial,
            rejoin=rejoin,
            calibrate=True,
            updater=ValueUpdater(policy, decay=1.0, scale=2.5, explore=True, shrink=True),
            loss=held_out_loss(loss, preprocess),
        )

    @property
    def learns(self) -> bool:
        """Whether the policy learns from the pair that is under way, or comes next.

        A frozen policy (:meth:`PolicyTransform.freeze`) learns from none.
        """
        over = self.learn_pairs is not None and self.pairs >= self.learn_pairs
        return not over and not self._frozen and self.pairs % self.learn_every == 0

    @property
    def settled(self) -> bool:
        """Whether the policy is what it will be: nothing is learned or tried any more."""
        learned = self.learn_pairs is not None and self.pairs >= self.learn_pairs
        return self._frozen or (learned and (self.trial is None or self.trial.over))

    def evidence(self) -> Evidence:
        """What was found out so far, from how many pairs and images, and how sure it is.

        Returns:
            An :class:`Evidence`, which prints as a few lines.

        Raises:
            TypeError: the updater is no :class:`ValueUpdater`, and knows of no values.

        Example:
            >>> from ola_augment import OLAAugment
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
            >>> augment = OLAAugment(strength=1)
            >>> print(OLALearner.recommended(model, augment, held_out, pairs=1000).evidence())
            learned from 0 pairs of steps (0 augmented images) and 4 held-out images
            operations: nothing that differs from chance
            not yet known whether augmentation helps: the run has not come so far
        """
        if not isinstance(self.updater, ValueUpdater):
            raise TypeError(f"{type(self.updater).__name__} values no operations: no evidence")
        held_out = 0 if self._held_out is None else self._held_out.examples
        return gather(self.updater, self.trial, held_out)

    @property
    def rejoins(self) -> bool:
        """Whether held-out images will join the training."""
        return self._rejoin is not None

    def loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """A loader's batches, which held-out images join once the learner is ``settled``.

        They replace as many examples of a batch as they would be if both were one data set. Half
        of them join before the trial, which the other half then decides: what helps images that
        nothing is known of may be no help where half of their kind is trained on already. A
        learner whose held-out images stay out (``rejoin=False``) gives the loader back.

        Args:
            loader: of the training, in every epoch the same.

        Returns:
            An iterable with the length and the attributes of ``loader``.

        Example:
            >>> from ola_augment import OLAAugment
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
            >>> augment = OLAAugment(strength=1).freeze()  # settled from the start
            >>> learner = OLALearner.recommended(model, augment, held_out, pairs=1000)
            >>> batches = [(torch.zeros(8, 3, 8, 8), torch.ones(8, dtype=torch.long))] * 2
            >>> [targets.tolist() for _, targets in learner.loader(batches)]
            [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
        """
        return loader if self._rejoin is None else Rejoined(loader, self)

    def rejoin(self, batch: Any, train_size: int) -> Any:
        """What :meth:`loader` does with a batch, for loops of somebody else.

        Args:
            batch: of the training, any nesting of tensors (B, ...); of workers that augment, with
                their :class:`Actions`.
            train_size: number of training images in an epoch.

        Returns:
            The batch, or one of the same structure and size with held-out examples in it.

        Raises:
            ValueError: held-out batches have another structure, shape or dtype.
        """
        if self._rejoin is None:
            return batch
        if not self._checked_rejoin:
            self._rejoin.check(batch)
            self._checked_rejoin = True
        if self.settled or (self.trial is not None and not self.trial.windows):
            return self._rejoin.mix(batch, train_size)
        if self.trial is None or self.pairs < self.trial.joins:
            return batch
        return self._half_of_held_out().mix(batch, train_size)

    def _half_of_held_out(self) -> Rejoin:
        if self._rejoin_half is None:
            assert self._held_out is not None
            self._rejoin_half = Rejoin(self._held_out.halves[0], self.policy)
        return self._rejoin_half

    @property
    def needs(self) -> str:
        """What each step has to give beside a backward pass, in words; "" is nothing.

        A :class:`NSLRUpdater` needs ``step.loss``, a ``DirectionalAlignment`` computes the losses
        of the batch itself.
        """
        return self._signal.needs

    @contextlib.contextmanager
    def on_outputs(self, receive: Callable[[Any], object]) -> Iterator[None]:
        """Hand what the model gives in a block, where a loop of somebody else calls it.

        Args:
            receive: called with the outputs of each forward pass.

        Yields:
            Nothing.
        """

        def hook(model: nn.Module, inputs: Any, outputs: Any) -> None:
            receive(outputs)

        handle = self._model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

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

    def augment(self, images: Tensor, *, clips: bool = True) -> Tensor:
        """Augment a batch for the augmented step, and remember what was drawn.

        With a trial, as in the recommended setting, an image that would become flat (a standard
        deviation below 8 of 255 levels, where it had more) stays as it is, and counts as one for
        which every operation was dropped.

        Args:
            images: (B, C, H, W), or clips (B, T, C, H, W).
            clips: whether five dimensions are clips, an example of the model each, whose frames
                share a draw; False for a model that takes each of B x T images for an example.

        Returns:
            A new tensor of the shape and dtype of ``images``.

        Raises:
            TypeError, ValueError: what :meth:`PolicyTransform.augment` refuses.
        """
        self._try_out()
        augmented, actions = self.transform.augment(images, clips=clips)
        if self.trial is not None and len(actions.keep) == len(images):
            augmented, actions, count = spare_flat(
                images, augmented, actions, self.policy, self.transform.range_of(images)
            )
            self._warn_of_flat(count, len(images))
        self._drawn.append(actions)
        return augmented

    def _warn_of_flat(self, count: int, size: int) -> None:
        self.flat += count
        self.augmented += size
        rare = 10 * self.flat < self.augmented
        if rare or self._told_flat or self.augmented < _ENOUGH_TO_TELL:
            return
        self._told_flat = True
        warnings.warn(
            f"augmentation made {100 * self.flat / self.augmented:.0f} % of the images flat (less "
            "than 8 of 255 levels of standard deviation); they were left as they are: take a space "
            "of smaller magnitudes, or images of more contrast",
            stacklevel=3,
        )

    def drop(self) -> None:
        """Forget the pair that is under way: its reward will not be given."""
        self._lose("given up")
        self._drawn.clear()

    def _lose(self, cause: str) -> None:
        if self._half and self.learns and not self._settled:
            self._skip(cause)
        self._lost = self._lost or bool(self._half)
        self._clear()

    def _clear(self) -> None:
        self._signal.clear()
        self._actions: list[Actions] = []  # of augmented steps that await their reward
        self._gradients: Mapping[str, Tensor] | None = None
        self._half = ""  # under way, or over and waiting for the other one
        self._count = 0  # of its micro-batches that ran
        self._ended = False
        self._settled = False  # the pair's reward was given, or counted as skipped

    def _skip(self, cause: str) -> None:
        self.skipped[cause] += 1
        self._settled = True
        self._in_vain += 1
        if self._in_vain == _IN_VAIN and not self._told:
            self._told = True
            warnings.warn(
                f"{_IN_VAIN} pairs in a row taught the policy nothing ({cause}): {_ADVICE[cause]}",
                stacklevel=2,
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
        first = not self.plain_first
        step = Step(self.learns)
        try:
            ends = self._enter("augmented", first, last)
            if self._count == 0 and self._held_out is not None and step.learns:
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
            if isinstance(given, Captured):
                drawn = _of_each_pass(drawn, given.passes)
            self._actions += drawn * captures
            self._count += 1
            self._ended = ends
            if ends and self.reference != "next":
                step.stats = self._reward(step, self._gradients)
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
        step = Step(self.learns)
        try:
            ends = self._enter("plain", self.plain_first, last)
            yield step
            if self.thermostat is not None and not self._frozen:
                if step.accuracy is None:
                    raise RuntimeError(
                        "the thermostat needs the accuracy of the plain batch: `with "
                        "learner.plain_step() as step:` step.accuracy = accuracy"
                    )
                self.thermostat.step(step.accuracy)
            self._count += 1
            self._ended = ends
            if ends and step.learns:
                if self.reference == "next":
                    step.stats = self._reward(step, None, loss_scale)
                elif self.plain_first:
                    self._gradients = self._trained_gradients(loss_scale)
        except BaseException:
            self.drop()
            raise
        if ends and not self.plain_first:
            self._complete()

    def _enter(self, half: str, first: bool, last: bool | None) -> bool:
        """Whether this micro-batch ends its half; a first half begins a new pair."""
        refuse_join(self._wrapper)
        if self._half != half or self._ended:
            if first:
                self._lose("no second half")  # of the pair before, which was never finished
                self._lost = False
                self._try_out()
            elif not self._half and not self._lost:
                self._alone = True
            self._half, self._count, self._ended = half, 0, False
        return self._count + 1 == self.micro_batches if last is None else last

    def _try_out(self) -> None:
        """Between two pairs, before the next one draws."""
        own_policy(self.policy)
        if self.trial is not None and not self._half and not self._frozen:
            assert self._held_out is not None
            self.trial.begin_pair(self.pairs, self.learns, self._model, self._held_out.loss)

    def _complete(self) -> None:
        alone, self._alone, self._lost = self._alone, False, False
        self._clear()
        self._drawn.clear()
        if alone:  # a loss that an optimizer asked for again, or a half too many
            return
        self.pairs += 1
        over = self.pairs == self.learn_pairs and not self._frozen
        if over and isinstance(self.updater, ValueUpdater):
            self.updater.commit()

    def _reward(
        self, step: Step, gradients: Mapping[str, Tensor] | None, loss_scale: float = 1.0
    ) -> UpdateStats | None:
        """Update the policy, or on no rank."""
        if not step.learns:
            return None
        signal, actions = None, self._actions
        if actions:
            with contextlib.suppress(NotFinite):
                signal = self._signal.read(gradients, step.loss, loss_scale)
            if signal is not None and not all(bool(part.isfinite().all()) for part in signal):
                signal = None
        learn: Callable[[], UpdateStats]
        if world_size() > 1 and _compares(self.updater) and type(self.updater) in _OURS:
            bad, everywhere, learn = self._from_all_ranks(actions, signal)
        else:
            examples = sum(len(part.log_prob) for part in actions)
            bad, everywhere = self._over_ranks(signal is None, examples)
            learn = functools.partial(self._learn, actions, signal)
        if bad:
            if not self._lost:
                self._skip("no first half" if self._alone else "not finite")
            return None
        if everywhere == 1 and _compares(self.updater):
            self._skip("one example")
            return None
        self._settled, self._in_vain = True, 0
        return learn()

    def _learn(self, actions: list[Actions], signal: tuple[Tensor, ...] | None) -> UpdateStats:
        assert signal is not None
        return self.updater.step(Actions.cat(actions), *signal)

    def _from_all_ranks(
        self, actions: list[Actions], signal: tuple[Tensor, ...] | None
    ) -> tuple[bool, int, Callable[[], UpdateStats]]:
        """Whether a rank is bad, all ranks' examples, and how to learn from these."""
        device = next(self._model.parameters()).device
        found = self._everyone.gather(actions, signal, device)

        def learn() -> UpdateStats:
            if found is None:  # somewhere the updater has a word to say
                return self._learn(actions, signal)
            with alike():
                return self._learn([found[0]], found[1])

        return self._everyone.bad, self._everyone.examples, learn

    def _over_ranks(self, bad: bool, examples: int) -> tuple[bool, int]:
        if world_size() == 1:  # without a word to the device
            return bad, examples
        device = next(self._model.parameters()).device
        told = sum_over_ranks(torch.tensor([float(bad), float(examples)], device=device))
        return bool(told[0]), int(told[1])

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
        self._refuse_under_way("saved", "save")
        generator = self.transform.generator
        state = {
            "version": _VERSION,
            "policy_kind": describe_policy(self.policy),
            "policy": dict(self.policy.state_dict()),
            "updater": self.updater.state_dict(),
            "generator": None if generator is None else generator.get_state(),
            "pairs": self.pairs,
            "skipped": dict(self.skipped),
            "half": self._half,
            "lost": self._lost,
            "held_out": None if self._held_out is None else self._held_out.state_dict(),
            "thermostat": None if self.thermostat is None else self.thermostat.state_dict(),
            "trial": None if self.trial is None else self.trial.state_dict(),
            "rejoin": None if self._rejoin is None else self._rejoin.state_dict(),
            "rejoin_half": None if self._rejoin_half is None else self._rejoin_half.state_dict(),
        }
        return {**state, "entries": _entries(state)}

    def _refuse_under_way(self, done: str, do: str) -> None:
        waits = self.learns and self._held_out is None
        if self._half and (waits or not self._ended):
            raise RuntimeError(
                f"a pair is under way and its capture cannot be {done}: {do} after its second "
                "step, or call drop() first and lose its reward"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, between pairs: the copy has a model and a policy of its own.

        Raises:
            RuntimeError: a pair is under way, see :meth:`state_dict`.
        """
        self._refuse_under_way("copied", "copy")
        return {**self.__dict__, "_wrapper": None}

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
        parts = {
            "generator": generator,
            "held_out": self._held_out,
            "thermostat": self.thermostat,
            "trial": self.trial,
            "rejoin": self._rejoin,
        }
        for name, part in parts.items():
            if (part is None) != (state.get(name) is None):
                raise ValueError(f"state is of a learner with another {name}, or without one")
        half = state.get("half", "")
        if half not in ("", "plain" if self.plain_first else "augmented"):
            raise ValueError(f"state is of a learner with another order of halves: {half!r}")
        pairs, skipped = state.get("pairs"), state.get("skipped")
        counts = [pairs, *(skipped.values() if isinstance(skipped, Mapping) else [None])]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"state is damaged: counts {pairs} and {skipped}")
        restore = None
        if self._held_out is not None:
            restore = self._held_out.checked(state["held_out"], self._model)
        tried = None if self.trial is None else self.trial.checked(state["trial"], self._model)
        found = _entries({name: value for name, value in state.items() if name != "entries"})
        if found != state.get("entries"):
            raise ValueError(
                f"state is damaged: {found} entries of {state.get('entries')}. "
                "torch.distributed.checkpoint loads only the keys that a new learner has already: "
                "store the state as bytes (torch.save into an io.BytesIO), in a single entry"
            )
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
        if tried is not None:
            tried()
        if self._rejoin is not None:
            self._rejoin.load_state_dict(state["rejoin"])
            if state["rejoin_half"] is not None:
                self._half_of_held_out().load_state_dict(state["rejoin_half"])
        self._clear()
        self._drawn.clear()
        self.pairs, self.skipped = pairs, Counter(skipped)  # type: ignore[assignment]
        self._lost = bool(state.get("lost", False))
        self._half, self._ended, self._settled = half, True, True


def _updater(policy: Policy, lr: float, explore: bool) -> GARUpdater | ValueUpdater:
    if isinstance(policy, OLAPolicy) and policy.strength is not None:
        return ValueUpdater(policy, explore=explore)
    return GARUpdater(policy, lr=lr)


def _of_each_pass(drawn: list[Actions], passes: tuple[int, ...]) -> list[Actions]:
    """The draws of all examples: images that the model saw twice (R-Drop) count each time.

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


def _compares(updater: object) -> bool:
    """Whether rewards are differences within a batch, of which nothing else is known."""
    return getattr(updater, "reward", None) in (gradient_alignment_reward, cosine_reward)


def _entries(state: Any) -> int:
    """How many numbers, texts and tensors a nested state holds."""
    if isinstance(state, Mapping):
        return sum(map(_entries, state.values()))
    return sum(map(_entries, state)) if isinstance(state, (list, tuple)) else 1
