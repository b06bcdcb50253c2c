"""Lightning: a callback that augments every other update's batches and learns the policy."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

from ola_augment.extras import needs
from ola_augment.integrations.pairs import Pairs
from ola_augment.training.learner import OLALearner
from ola_augment.training.policy_gradient import UpdateStats

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ModuleNotFoundError:
    with needs("lightning"):  # the same under its older name
        from pytorch_lightning import Callback
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

__all__ = ["OLACallback"]


_SHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class OLACallback(Callback):  # type: ignore[misc]
    """Learns an augmentation policy during ``Trainer.fit``, with automatic optimization.

    ``training_step`` sees an augmented batch in one update and a plain one in the next; clipping,
    ``accumulate_grad_batches``, mixed precision and DDP stay as the trainer has them. The policy is
    saved and restored with Lightning's checkpoints.

    Batches are tuples or lists, images first, or mappings with ``images``, ``image`` or
    ``pixel_values``: uint8 or in [0, 1], so that normalisation belongs into ``training_step``.
    Held-out images join them once the policy has no more use for them. Where DataLoader workers
    augment (``collate_fn=augment.collate``), every batch is augmented.

    Args:
        learner: of the network inside the LightningModule that ``training_step`` calls.
        accuracy: where the learner has a thermostat: (the network's outputs, the batch) -> share of
            right predictions in [0, 1]; None compares outputs (B, classes) with the batch's
            targets (B,).

    Raises:
        TypeError: ``learner`` is no :class:`OLALearner`.
        ValueError: a learner that needs more of a step than its batch (:class:`NSLRUpdater`,
            ``DirectionalAlignment``); when fitting: manual optimization, a strategy that shards
            parameters or gradients, a learner of a network that the module does not hold, or
            batches without images.

    Example:
        >>> import torch
        >>> from ola_augment import OLAAugment
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> callback = OLACallback(OLALearner(network, OLAAugment()))
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(
        self, learner: OLALearner, accuracy: Callable[[Any, Any], float | None] | None = None
    ) -> None:
        self.pairs = Pairs(learner, accuracy)
        self._open = contextlib.ExitStack()
        self._unwrap = contextlib.ExitStack()
        self._announced: dict[str, Any] | None = None  # of the training batch under way
        self._given: Any = None  # what training_step got for it
        self._stepped = False

    @property
    def learner(self) -> OLALearner:
        """The learner that was given."""
        return self.pairs.learner

    @property
    def stats(self) -> UpdateStats | None:
        """What the policy's latest update did."""
        return self.pairs.stats

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the module, and let its ``training_step`` receive our batches.

        Args:
            trainer: that fits.
            pl_module: the LightningModule.

        Raises:
            ValueError: manual optimization, a strategy that shards, or a learner of a network that
                the module does not hold.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "OLACallback needs automatic optimization; with automatic_optimization=False put "
                "learner.augmented_step() and learner.plain_step() into your training_step"
            )
        strategy = type(trainer.strategy)
        if any(base.__name__ in _SHARDING for base in strategy.__mro__):
            raise ValueError(
                f"OLACallback needs whole parameters and gradients, which {strategy.__name__} "
                'shards: use strategy="ddp"'
            )
        if not any(self._is_learners(module) for module in pl_module.modules()):
            raise ValueError(
                f"learner must be of a network inside {type(pl_module).__name__}, it has another"
            )
        self._unwrap.close()
        original = pl_module.training_step
        own = pl_module.__dict__.get("training_step")

        @functools.wraps(original)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self._seen(batch), *args, **kwargs)

        def restore() -> None:
            if own is None:
                pl_module.__dict__.pop("training_step", None)
            else:
                pl_module.training_step = own

        pl_module.training_step = training_step
        self._unwrap.callback(restore)

    def _is_learners(self, module: Any) -> bool:
        try:
            self.learner.check_model(module)
        except ValueError:
            return False
        return True

    def _seen(self, batch: Any) -> Any:
        """What ``training_step`` sees: in a training batch of this fit the learner's, else its own.

        An optimizer that evaluates its closure several times sees one batch every time, and the
        first evaluation is the one that is learned from.
        """
        if self._announced is None:
            return batch
        if self._given is None:
            self._given = self._open.enter_context(self.pairs.batch(batch, **self._announced))
        return self._given

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out whether the run is as long as the learner was told."""
        with contextlib.suppress(MisconfigurationException):  # accumulates more and more batches
            updates = trainer.estimated_stepping_batches
            known = math.inf if updates < 0 else updates  # -1 for an IterableDataset
            self.pairs.run(known, trainer.global_step)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out how many images there are."""
        self.pairs.epoch(trainer.train_dataloader)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch begins."""
        self._abandon()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        whole = trainer.accumulate_grad_batches
        ran, batches = batch_idx % whole, trainer.num_training_batches
        self._announced = {
            "accumulate": int(min(whole, batches - batch_idx + ran)),
            "loss_scale": 1.0 if scaler is None else float(scaler.get_scale()),
            "last": ran + 1 == whole or batch_idx + 1 == batches or trainer.is_last_batch,
        }
        self._given, self._stepped = None, False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Its gradients are there, not clipped yet."""
        self._open.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The half ends with this batch, however often the optimizer asks for the loss."""
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the half after an update; give up a batch that ``training_step`` skipped."""
        self._abandon()
        if self._stepped:
            self.pairs.updated()
        self._stepped = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Give up a batch after which the epoch was cut short."""
        self._abandon()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._unwrap.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave module and policy as they were."""
        self._abandon()
        self._unwrap.close()

    def _abandon(self) -> None:
        """Leave a step whose backward never came, without an update of the policy."""
        self._announced = self._given = None
        with contextlib.suppress(_NoBackward), self._open.pop_all():
            raise _NoBackward

    def state_dict(self) -> dict[str, Any]:
        """Policy and meta-optimizer, for Lightning's checkpoint.

        Returns:
            A new dictionary of plain tensors and data.
        """
        return self.pairs.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state_dict: of a callback whose learner has the same kinds of parts.

        Raises:
            ValueError: it does not fit; nothing has changed.
        """
        self.pairs.load_state_dict(state_dict)


class _NoBackward(Exception):
    """Thrown into a step that ended without a backward."""
