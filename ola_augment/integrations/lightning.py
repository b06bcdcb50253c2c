"""Lightning: a callback that augments every other update's batches and learns the policy."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from ola_augment.integrations.pairs import Pairs
from ola_augment.training.learner import OLALearner
from ola_augment.training.policy_gradient import UpdateStats

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback

__all__ = ["OLACallback"]


_SHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class OLACallback(Callback):  # type: ignore[misc]
    """Learns an augmentation policy during ``Trainer.fit``, with automatic optimization.

    ``training_step`` sees an augmented batch in one update and a plain one in the next; clipping,
    ``accumulate_grad_batches``, mixed precision and DDP stay as the trainer has them. The policy is
    saved and restored with Lightning's checkpoints.

    Batches are tuples or lists, images first, or mappings with ``images``, ``image`` or
    ``pixel_values``: uint8 or in [0, 1], so that normalisation belongs into ``training_step``.
    Where DataLoader workers augment (``collate_fn=augment.collate``), every batch is augmented.

    Args:
        learner: of the network inside the LightningModule that ``training_step`` calls.

    Raises:
        TypeError: ``learner`` is no :class:`OLALearner`.
        ValueError: when fitting: manual optimization, a strategy that shards parameters or
            gradients, a learner of a network that the module does not hold, or batches without
            images.

    Example:
        >>> import torch
        >>> from ola_augment import OLAAugment
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> callback = OLACallback(OLALearner(network, OLAAugment()))
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(self, learner: OLALearner) -> None:
        self.pairs = Pairs(learner)
        self._open = contextlib.ExitStack()
        self._unwrap = contextlib.ExitStack()
        self._batch: Any = None

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
            return original(self._batch, *args, **kwargs)

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

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch begins."""
        self._abandon()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        accumulate = trainer.accumulate_grad_batches
        self._batch = self._open.enter_context(self.pairs.batch(batch, accumulate, scale))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Its gradients are there, not clipped yet."""
        self._open.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The half ends."""
        self.pairs.updated()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give up a batch that ``training_step`` skipped."""
        self._abandon()
        self._batch = None

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
