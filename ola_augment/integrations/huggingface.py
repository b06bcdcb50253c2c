"""Hugging Face: a Trainer that augments every other update's batches and learns the policy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ola_augment.extras import needs
from ola_augment.integrations.pairs import Pairs, read_images, with_images
from ola_augment.training.checkpoint import load_checkpoint, save_checkpoint
from ola_augment.training.learner import OLALearner
from ola_augment.training.metrics import scale_to_float
from ola_augment.transforms import PolicyTransform

with needs("huggingface"):
    from safetensors import safe_open
    from transformers import PreTrainedModel, Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import (
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
    )

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
    normalised: that is for ``preprocess``. Held-out images join them once the policy has no more
    use for them. Where the collator augments, it puts the :class:`Actions` under ``actions``, and
    every batch is augmented.

    Args:
        args: positional arguments of ``Trainer``, of which none is needed.
        learner: of the model that is trained.
        preprocess: images -> the model's input, in training, evaluation and prediction; None
            scales uint8 and uint16 to [0, 1].
        accuracy: where the learner has a thermostat: (the model's outputs, the batch) -> share of
            right predictions in [0, 1]; None compares ``logits`` with ``labels``.
        eval_collator: for evaluation and prediction, whose images are never augmented; None is
            that of training, or where this is ``augment.collate`` the same without augmentation.
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

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        learner: OLALearner,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        accuracy: Callable[[Any, Any], float | None] | None = None,
        eval_collator: Callable[[list[Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.pairs = Pairs(learner, accuracy)
        self.preprocess = preprocess or scale_to_float
        self.eval_collator = eval_collator
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
        if "actions" in inputs:  # in training they are taken out
            raise ValueError(
                "a batch of evaluation or prediction was augmented by the collator: give "
                "eval_collator=, one that does not augment (augment.collate_plain)"
            )
        inputs = super()._prepare_inputs(inputs)
        images, _ = read_images(inputs)
        prepared: dict[str, Any] = with_images(inputs, self.preprocess(images))
        return prepared

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, without augmentation.

        Args:
            args: of ``Trainer.get_eval_dataloader``.
            kwargs: likewise.

        Returns:
            The loader.
        """
        with self._collating_plainly():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, without augmentation.

        Args:
            args: of ``Trainer.get_test_dataloader``.
            kwargs: likewise.

        Returns:
            The loader.
        """
        with self._collating_plainly():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _collating_plainly(self) -> Iterator[None]:
        training: Any = self.data_collator
        transform = getattr(training, "__self__", None)
        if self.eval_collator is not None:
            self.data_collator = self.eval_collator
        elif isinstance(transform, PolicyTransform) and training == transform.collate:
            self.data_collator = transform.collate_plain
        try:
            yield
        finally:
            self.data_collator = training

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights, all of them (the Trainer's hook)."""
        with loading_all(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, all of them (the Trainer's hook)."""
        with loading_all(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pairs.run(state.max_steps, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pairs.epoch(kwargs.get("train_dataloader"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pairs.updated()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        content = self._pairs.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_checkpoint(folder / STATE_NAME, content)


@contextlib.contextmanager
def loading_all(model: Any, folder: str | Path) -> Iterator[None]:
    """Load what a Trainer leaves out of a checkpoint that it loads inside.

    transformers 5 saves the tensors of many models (ViT, DeiT, BEiT, DINOv2, Swin) under the names
    of its older versions; its Trainer looks for the names of today and passes over what it does not
    find, ``from_pretrained`` translates them.

    Args:
        model: that is loaded into.
        folder: of the checkpoint.

    Yields:
        Nothing.

    Raises:
        ValueError: tensors of the model that the checkpoint does not have.
    """
    names = saved_names(Path(folder))
    missing = sorted(model.state_dict().keys() - names) if names else []
    translates = isinstance(model, PreTrainedModel)
    if missing and not translates:
        raise ValueError(_lacking(folder, missing, model))
    yield
    if missing and translates:
        loaded, told = type(model).from_pretrained(folder, output_loading_info=True)
        if told["missing_keys"]:
            raise ValueError(_lacking(folder, sorted(told["missing_keys"]), model))
        model.load_state_dict(loaded.state_dict())


def _lacking(folder: str | Path, missing: list[str], model: Any) -> str:
    return (
        f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, which would go on from "
        f"what they were initialised with: {', '.join(missing[:5])}"
    )


def saved_names(folder: Path) -> set[str]:
    """Names of the tensors in a checkpoint of a whole model; none where it is of another kind.

    Args:
        folder: of the checkpoint.

    Returns:
        The names.
    """
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            return set(json.loads((folder / name).read_text())["weight_map"])
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
            return set(file.keys())
    if (folder / WEIGHTS_NAME).is_file():
        return set(torch.load(folder / WEIGHTS_NAME, map_location="meta", weights_only=True))
    return set()
