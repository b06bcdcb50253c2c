"""OLALearner: policy, signal, updater and their state, for anybody's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ola_augment.alignment import GradientAlignment
from ola_augment.alignment._fsdp import is_sharded
from ola_augment.alignment.proof import unwrapped
from ola_augment.training import learner_state
from ola_augment.training.checks import InputRanges, Leftovers
from ola_augment.training.epoch import EpochImages
from ola_augment.training.everyone import Everyone
from ola_augment.training.flat import FlatImages
from ola_augment.training.given import check_count
from ola_augment.training.held_out import BatchLoss, HeldOut, held_out_loss
from ola_augment.training.pair import Pair
from ola_augment.training.parts import default_updater
from ola_augment.training.recommended import recommended_parts
from ola_augment.training.rejoin import Rejoin, checked_often
from ola_augment.training.signals import Alignments, Engine, NextStepLoss, Signal
from ola_augment.training.stepping import Stepping
from ola_augment.training.thermostat import Thermostat
from ola_augment.training.trial import Trial
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater
from ola_augment.transforms import PolicyTransform


class OLALearner(Stepping):
    """Learns an augmentation policy inside any training loop.

    Batches come in pairs: an augmented step, then a plain one (with ``reference="current"`` the
    plain one comes first). :meth:`recommended` makes the learner that most people want. In a plain
    loop, which :meth:`step` takes in turns::

        learner = OLALearner.recommended(model, augment, held_out, pairs=epochs * len(loader) // 2)
        for images, targets in learner.loader(loader):
            with learner.step(images) as step:
                criterion(model(normalize(step.images)), targets).backward()
            optimizer.step(); optimizer.zero_grad()

    :meth:`augmented_step` and :meth:`plain_step` are its two halves, where loops differ in them.
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
            integrations by themselves) once the policy has no more use for them. A number: after a
            trial, how much more often each comes than an image of the training, to make up for
            what it missed.
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

    Raises:
        TypeError: ``augment`` is no transform with a policy.
        ValueError: a number out of range, an unknown ``reference``, an updater of another policy,
            an engine of another model, or a combination that has no signal.

    Example:
        >>> import torch
        >>> from ola_augment import OLAAugment
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        >>> learner = OLALearner(model, OLAAugment())
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> for _ in range(2):  # an augmented batch, then a plain one
        ...     with learner.step(images) as step:
        ...         model(step.images / 255).square().mean().backward()
        ...     model.zero_grad()  # after the optimizer's step
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
        rejoin: bool | float = False,
        calibrate: bool = False,
        updater: GARUpdater | NSLRUpdater | ValueUpdater | None = None,
        engine: Engine | None = None,
        loss: BatchLoss | None = None,
    ) -> None:
        if not isinstance(augment, PolicyTransform):
            raise TypeError(f"augment must be a PolicyTransform, got {type(augment).__name__}")
        check_count("learn_every", learn_every, 1)
        check_count("micro_batches", micro_batches, 1)
        if learn_pairs is not None:
            check_count("learn_pairs", learn_pairs, 0)
        if isinstance(reference, str) and reference not in ("next", "current"):
            raise ValueError(
                f'reference must be "next", "current" or held-out batches, got {reference!r}'
            )
        self.updater = updater or default_updater(augment.policy, lr, learn_pairs is not None)
        if self.updater.policy is not augment.policy:
            raise ValueError("updater must be of augment.policy, it updates another policy")
        if thermostat is not None and thermostat.policy is not augment.policy:
            raise ValueError("thermostat must be of augment.policy, it steers another policy")
        if trial is not None and (trial.policy is not augment.policy or isinstance(reference, str)):
            raise ValueError("trial must be of augment.policy, and needs held-out batches")
        self._model, self._wrapper = unwrapped(model), model
        self._signal = _signal(self._model, model, self.updater, reference, cosine, engine)
        self.transform = augment
        self.policy = augment.policy
        self.reference = reference if isinstance(reference, str) else "held out"
        self._often = checked_often(rejoin, reference)
        self._held_out = self._rejoin = self._rejoin_half = None
        if not isinstance(reference, str):
            self._held_out = HeldOut(reference, smoothing, loss, calibrate)
            self._rejoin = Rejoin(reference, augment.policy) if rejoin else None
        self._checked_rejoin = False
        self.thermostat = thermostat
        self.trial = trial
        self.learn_every = learn_every
        self.learn_pairs = learn_pairs
        self.micro_batches = micro_batches
        self.pairs = 0
        self.epoch = EpochImages()
        self._pair = Pair(self.plain_first)
        self._drawn = []
        self._flats = FlatImages()
        self._inputs, self._leftovers = InputRanges(), Leftovers()
        self._everyone = Everyone()

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

        For a sixth of the run operations are drawn uniformly, and valued by the cosine between
        the gradients of the examples that got them and that of held-out images; a sixteenth of all
        pairs teach, at most 500. Then a :class:`Trial` of a quarter to a half of the run finds out
        whether augmentation by these values helps on the held-out images, and how much of it is to
        be used for the rest. Where it sees nothing either way, that is none, or with a
        ``target_domain`` up to one operation per image, the more the clearer operations were told
        apart. :meth:`evidence` says what was found.

        Args:
            model: that is trained.
            augment: with a strength, that of pairs that teach: ``OLAAugment(strength=1)``.
            held_out: batches of labelled images of the target domain, or of a part of the training
                images, which look like the training's; they come back into it by :meth:`loader`.
            pairs: of augmented and plain steps in the whole run; below 480 nothing is learned,
                tried or augmented, some 1,000 are worth having.
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
            >>> import torch
            >>> from ola_augment import OLAAugment
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
            >>> augment = OLAAugment(strength=1)
            >>> learner = OLALearner.recommended(model, augment, held_out, pairs=4000)
            >>> learner.learn_pairs, learner.learn_every, learner.trial.windows
            (667, 3, 16)
        """
        measured = held_out_loss(loss, preprocess)
        parts = recommended_parts(augment, held_out, pairs, measured, target_domain, rejoin)
        return cls(model, augment, **parts)

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
        return learner_state.saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; a pair that is under way is forgotten.

        Held-out batches go on where they were, if they come in the same order again.

        Args:
            state: of a learner with the same kinds of parts.

        Raises:
            ValueError: the state of another version, policy, space, updater or kind of reference,
                or one that is damaged; nothing has changed.
        """
        learner_state.load(self, state)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, between pairs: the copy has a model and a policy of its own.

        Raises:
            RuntimeError: a pair is under way, see :meth:`state_dict`.
        """
        learner_state.refuse_under_way(self, "copied", "copy")
        return {**self.__dict__, "_wrapper": None}


def _signal(
    network: nn.Module,
    model: nn.Module,
    updater: GARUpdater | NSLRUpdater | ValueUpdater,
    reference: object,
    cosine: bool,
    engine: Engine | None,
) -> Signal:
    """What the updater rewards: alignments of an engine, or the next loss."""
    if updater.per_example:
        if reference == "next" and is_sharded(network):
            raise ValueError(
                'reference="next" needs whole parameters, and the model\'s are sharded over '
                'processes (fully_shard): give held-out batches, or "current"'
            )
        engine = GradientAlignment(model) if engine is None else engine
        if engine.model is not network:
            raise ValueError("engine must be of the model that is trained, it has another one")
        return Alignments(engine, cosine, getattr(updater, "takes_norms", False))
    if reference != "next" or cosine or engine is not None:
        raise ValueError(
            f"{type(updater).__name__} rewards with the next loss: it takes "
            'reference="next", no cosine and no engine'
        )
    return NextStepLoss()
