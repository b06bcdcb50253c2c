"""Hugging Face: a Trainer that augments every other update's batches and learns the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ola_augment.integrations.pairs import Pairs, read_images, with_images
from ola_augment.training.checkpoint import load_checkpoint, save_checkpoint
from ola_augment.training.learner import OLALearner
from ola_augment.training.metrics import scale_to_float

__all__ = ["OLATrainer"]

#: Inside a checkpoint's folder, beside the Trainer's own files.
STATE_NAME = "ola_learner.pt"


class OLATrainer(Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` that learns an augmentation policy.

    The batches of one update are augmented, those of the next are plain; clipping,
    ``gradient_accumulation_steps``, mixed precision and DDP stay as the arguments have them. The
    policy is saved in the Trainer's checkpoints and restored by
    ``train(resume_from_checkpoint=...)``.

    Batches have ``pixel_values`` (or ``images``, or ``image``) that are uint8 or in [0, 1], not
    normalised: that is for ``preprocess``. Where the collator augments, it puts the
    :class:`Actions` under ``actions``, and every batch is augmented.

    Args:
        args: positional arguments of ``Trainer``, of which none is needed.
        learner: of the model that is trained.
        preprocess: images -> the model's input, in training, evaluation and prediction; None
            scales uint8 to [0, 1].
        kwargs: keyword arguments of ``Trainer``: ``model``, ``args`` (one device a process),
            ``train_dataset`` and all others but ``model_init``.

    Raises:
        TypeError: ``learner`` is no :class:`OLALearner`.
        ValueError: a learner of another model, ``model_init``, several GPUs in one process, or
            DeepSpeed, which keeps gradients to itself.

    Example:
        >>> from ola_augment import OLAAugment
        >>> learner = OLALearner(model, OLAAugment())  # doctest: +SKIP
        >>> trainer = OLATrainer(
        ...     model=model, args=args, train_dataset=dataset, learner=learner
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        learner: OLALearner,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.pairs = Pairs(learner)
        self.preprocess = preprocess or scale_to_float
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError("give model, not model_init: the learner is of one model")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"OLATrainer needs one GPU a process, got {self.args.n_gpu}: start it by torchrun"
            )
        if self.is_deepspeed_enabled:
            raise ValueError("OLATrainer cannot read DeepSpeed's gradients; use DDP")
        learner.check_model(self.model)
        self.add_callback(_Follow(self.pairs))

    @property
    def learner(self) -> OLALearner:
        """The learner that was given."""
        return self.pairs.learner

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward pass of one batch, augmented where it is its turn.

        Args:
            model: as the Trainer has prepared it.
            inputs: the batch, with ``pixel_values``, ``images`` or ``image``.
            num_items_in_batch: of the whole update, for losses that are sums.

        Returns:
            The loss, a scalar without gradient.
        """
        scaler = getattr(self.accelerator, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        accumulate = self.current_gradient_accumulation_steps
        with self.pairs.batch(inputs, accumulate, scale) as batch:
            loss: Tensor = super().training_step(model, batch, num_items_in_batch)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Device and pre-processing of every batch, to train on or not (the Trainer's hook)."""
        inputs = super()._prepare_inputs(inputs)
        images, _ = read_images(inputs)
        prepared: dict[str, Any] = with_images(inputs, self.preprocess(images))
        return prepared

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from a checkpoint with its policy if there is one.

        Args:
            resume_from_checkpoint: the folder of a checkpoint; True takes the latest in
                ``args.output_dir``; None starts anew.
            kwargs: other arguments of ``Trainer.train``.

        Returns:
            The ``TrainOutput``.

        Raises:
            ValueError: the checkpoint holds no policy, or one that does not fit.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            path = Path(str(folder)) / STATE_NAME
            if not path.is_file():
                raise ValueError(f"{path.parent} holds no {STATE_NAME}: it is of another Trainer")
            self.pairs.load_state_dict(load_checkpoint(path))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class _Follow(TrainerCallback):  # type: ignore[misc]
    """Tells the pairs of updates, and saves them."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pairs.updated()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        content = self._pairs.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_checkpoint(folder / STATE_NAME, content)
