"""What a learner consists of, and what it says about itself; how it steps is elsewhere."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ola_augment.alignment._fsdp import is_sharded
from ola_augment.alignment.proof import unwrapped
from ola_augment.policy import OLAPolicy, Policy
from ola_augment.training.epoch import EpochImages
from ola_augment.training.evidence import Evidence, gather
from ola_augment.training.flat import FlatImages
from ola_augment.training.held_out import HeldOut
from ola_augment.training.pair import Pair
from ola_augment.training.rejoin import Rejoin, Rejoined
from ola_augment.training.signals import Signal
from ola_augment.training.thermostat import Thermostat
from ola_augment.training.trial import Trial
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.training.values import ValueUpdater
from ola_augment.transforms import PolicyTransform


class Parts:
    """The parts of an :class:`OLALearner`, which sets them, and what follows from them alone."""

    transform: PolicyTransform
    policy: Policy
    updater: GARUpdater | NSLRUpdater | ValueUpdater
    thermostat: Thermostat | None
    trial: Trial | None
    reference: str
    learn_every: int
    learn_pairs: int | None
    micro_batches: int
    pairs: int
    epoch: EpochImages
    _model: nn.Module
    _signal: Signal
    _flats: FlatImages
    _pair: Pair
    _held_out: HeldOut | None
    _rejoin: Rejoin | None
    _rejoin_half: Rejoin | None
    _often: float
    _checked_rejoin: bool

    @property
    def learns(self) -> bool:
        """Whether the policy learns from the pair that is under way, or comes next.

        A frozen policy (:meth:`PolicyTransform.freeze`) learns from none.
        """
        return not self._learned and not self._frozen and self.pairs % self.learn_every == 0

    @property
    def settled(self) -> bool:
        """Whether the policy is what it will be: nothing is learned or tried any more.

        A policy that is frozen is; a trial that was under way ends with what it has measured.
        """
        return self._frozen or (self._learned and (self.trial is None or self.trial.over))

    @property
    def skipped(self) -> Counter[str]:
        """Pairs that should have taught the policy something, and did not, by their cause.

        "not finite" (on some rank), "one example" (a reward tells the examples of a batch apart),
        "no second half", "no first half", "given up" (:meth:`drop`, or an error).
        """
        return self._pair.skipped

    @property
    def augmented(self) -> int:
        """Images that came to :meth:`augment`, where a trial looks for flat ones."""
        return self._flats.augmented

    @property
    def flat(self) -> int:
        """Of them, those of which augmentation left nothing to see."""
        return self._flats.flat

    @property
    def plain_first(self) -> bool:
        """Whether the plain half of a pair comes first (``reference="current"``)."""
        return self.reference == "current"

    @property
    def needs(self) -> str:
        """What each step has to give beside a backward pass, in words; "" is nothing.

        A :class:`NSLRUpdater` needs ``step.loss``, a ``DirectionalAlignment`` computes the losses
        of the batch itself.
        """
        return self._signal.needs

    @property
    def _teaches(self) -> bool:
        """Whether there are pairs that teach, by the gradients of held-out images."""
        return self.learn_pairs != 0

    @property
    def _learned(self) -> bool:
        """Whether the pairs that teach are over."""
        return self.learn_pairs is not None and self.pairs >= self.learn_pairs

    @property
    def _frozen(self) -> bool:
        logits = self.policy.named_logits().values()
        return bool(logits) and not any(entry.requires_grad for entry in logits)

    def evidence(self) -> Evidence:
        """What was found out so far, from how many pairs and images, and how sure it is.

        Returns:
            An :class:`Evidence`, which prints as a few lines.

        Raises:
            TypeError: the updater is no :class:`ValueUpdater`, and knows of no values.

        Example:
            >>> import torch
            >>> from ola_augment import OLAAugment, OLALearner
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
            >>> augment = OLAAugment(strength=1)
            >>> print(OLALearner.recommended(model, augment, held_out, pairs=1000).evidence())
            learned from 0 pairs of steps (0 augmented images) and 4 held-out images
            operations: not compared with each other
            not yet known whether augmentation helps: 631 more pairs of steps to go
        """
        if not isinstance(self.updater, ValueUpdater):
            raise TypeError(f"{type(self.updater).__name__} values no operations: no evidence")
        held_out = 0 if self._held_out is None else self._held_out.examples
        return gather(self.updater, self.trial, self.pairs, held_out, self._frozen)

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

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model other than this learner's.

        Args:
            model: with or without its ``DistributedDataParallel``.

        Raises:
            ValueError: it is another one, or :meth:`refuse_sharded`.
        """
        if unwrapped(model) is not self._model:
            raise ValueError("learner must be of the model that is trained, it has another one")
        self.refuse_sharded()

    def refuse_sharded(self) -> None:
        """Refuse a model under ``fully_shard``, in loops that save what one process has.

        Raises:
            ValueError: it is one.
        """
        if is_sharded(self._model):
            raise ValueError(
                "the model's parameters are sharded over processes (fully_shard): a learner takes "
                "part in a loop of your own then, and not in fit or a framework's; or use "
                "DistributedDataParallel"
            )

    @property
    def rejoins(self) -> bool:
        """Whether held-out images will join the training."""
        return self._rejoin is not None

    def loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """A loader's batches, which held-out images join once the learner is ``settled``.

        They replace as many examples of a batch as they would be if both were one data set. Half
        of them join before the trial (from the start, where no operation is learned from them),
        which the other half then decides: what helps images that nothing is known of may be no
        help where half of their kind is trained on already. After the trial those of a target
        domain come twice as often as other images, since they came late. All join at once in a run
        that is too short for a trial. A learner whose held-out images stay out (``rejoin=False``)
        gives the loader back.

        Args:
            loader: of the training, in every epoch the same.

        Returns:
            An iterable with the length and the attributes of ``loader``.

        Example:
            >>> import torch
            >>> from ola_augment import OLAAugment, OLALearner
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            >>> held_out = [(torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
            >>> augment = OLAAugment(strength=1).freeze()  # settled from the start
            >>> learner = OLALearner.recommended(model, augment, held_out, pairs=1000)
            >>> batches = [(torch.zeros(8, 3, 8, 8), torch.ones(8, dtype=torch.long))] * 2
            >>> [targets.tolist() for _, targets in learner.loader(batches)]
            [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
        """
        return loader if self._rejoin is None else Rejoined(loader, self)

    def rejoin(self, batch: Any, train_size: int | None = None) -> Any:
        """What :meth:`loader` does with a batch, for loops of somebody else.

        Args:
            batch: of the training, any nesting of tensors (B, ...); of workers that augment, with
                their :class:`Actions`.
            train_size: number of training images in an epoch, over all ranks; None is what is known
                of the epoch that :meth:`loader` has begun.

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
        if train_size is None:
            train_size = self.epoch.with_batch(batch)
        untried = self._learned and self.trial is not None and not self.trial.windows
        if self.settled or untried:
            tried = self.trial is not None and self.trial.windows and self.trial.over
            return self._rejoin.mix(batch, train_size, self._often if tried else 1.0)
        if self.trial is None or (self._teaches and self.pairs < self.trial.joins):
            return batch
        return self._half_of_held_out().mix(batch, train_size)

    def _half_of_held_out(self) -> Rejoin:
        if self._rejoin_half is None:
            assert self._held_out is not None
            self._rejoin_half = Rejoin(self._held_out.halves[0], self.policy)
        return self._rejoin_half


def default_updater(policy: Policy, lr: float, explore: bool) -> GARUpdater | ValueUpdater:
    """By values for a policy of a given strength, by the policy gradient for others.

    Args:
        policy: that is to learn.
        lr: of the policy gradient.
        explore: draw uniformly until the values are known.
    """
    if isinstance(policy, OLAPolicy) and policy.strength is not None:
        return ValueUpdater(policy, explore=explore)
    return GARUpdater(policy, lr=lr)
