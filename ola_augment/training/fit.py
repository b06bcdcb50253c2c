"""The interleaved training loop: an augmented step, then a plain one that rewards it.

Everything here is composed of the public parts and can be written in a user's own loop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ola_augment.actions import Actions
from ola_augment.alignment import GradientAlignment
from ola_augment.policy import Policy
from ola_augment.training.updater import GARUpdater, NSLRUpdater, UpdateStats
from ola_augment.transforms import PolicyTransform

Preprocess = Callable[[Tensor], Tensor]


def fit(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    augment: PolicyTransform | None = None,
    updater: GARUpdater | NSLRUpdater | None = None,
    engine: GradientAlignment | None = None,
    preprocess: Preprocess | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    metrics_path: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train a model, and with an updater the policy that augments its images.

    Batches alternate, across epochs too: the first is augmented; the second has only the default
    pre-processing, and its gradient is both the reference of the first's rewards and an ordinary
    update of the model. Without an updater the same loop compares other augmentations.

    Args:
        model: trained in place, on its own device.
        loader: batches (images, targets); images as :meth:`PolicyTransform.augment` takes them.
        optimizer: of the model.
        epochs: passes over the loader.
        augment: applied to every other batch, on the model's device; None augments none.
        updater: of ``augment``'s policy; None leaves the policy as it is.
        engine: to align with; None makes a ``GradientAlignment(model)`` for a GARUpdater.
        preprocess: images -> the model's input, on both kinds of batches; None scales uint8 to
            float32 in [0, 1].
        criterion: (outputs, targets) -> mean loss; None is cross entropy.
        scheduler: stepped after every step of the optimizer.
        evaluate: called after each epoch; what it returns joins the metrics.
        metrics_path: a file for the metrics, one JSON object an epoch (see Returns).
        progress: show a progress bar.

    Returns:
        One dict an epoch: ``epoch`` (from 1), ``steps`` (so far), ``seconds`` (of training,
        without evaluation), ``augmented_loss`` and ``plain_loss`` (means; None without such a
        batch), what ``evaluate`` gave, and with a policy that learns ``reward_mean``,
        ``reward_std`` (of raw rewards), ``entropy`` (nats), ``num_ops_probs`` (S numbers),
        ``keep_probs`` (A) and ``mean_magnitude_bins`` (A).

    Raises:
        ValueError: epochs below 1, an updater without ``augment``, or a loader without batches.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if updater is not None and augment is None:
        raise ValueError("updater needs augment, the transform whose policy it updates")
    if isinstance(updater, GARUpdater) and engine is None:
        engine = GradientAlignment(model)
    steps = _Steps(
        model,
        optimizer,
        augment,
        updater,
        engine if isinstance(updater, GARUpdater) else None,
        preprocess or scale_to_float,
        criterion or nn.CrossEntropyLoss(),
        scheduler,
    )
    if metrics_path is not None:
        Path(metrics_path).write_text("", encoding="utf-8")
    history: list[dict[str, Any]] = []
    total = epochs * len(loader) if isinstance(loader, Sized) else None
    with tqdm(total=total, disable=not progress, unit="step") as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            start = time.perf_counter()
            for images, targets in loader:
                steps.run(images, targets)
                bar.update()
            seconds = time.perf_counter() - start
            if not steps.count:
                raise ValueError("loader must give at least one batch, got none")
            record = {"epoch": epoch, "steps": steps.count, "seconds": seconds}
            record |= steps.metrics() | (evaluate() if evaluate else {})
            history.append(record)
            if metrics_path is not None:
                with Path(metrics_path).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            bar.set_postfix({k: f"{v:.3f}" for k, v in record.items() if isinstance(v, float)})
    return history


class _Steps:
    """The alternating steps of :func:`fit` and what they measured since the last epoch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        augment: PolicyTransform | None,
        updater: GARUpdater | NSLRUpdater | None,
        engine: GradientAlignment | None,
        preprocess: Preprocess,
        criterion: Callable[[Tensor, Tensor], Tensor],
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.optimizer = optimizer
        self.augment = augment
        self.updater = updater
        self.engine = engine
        self.preprocess = preprocess
        self.criterion = criterion
        self.scheduler = scheduler
        self.count = 0
        self.actions: Actions | None = None  # of an augmented step that awaits its reward
        self.losses: dict[str, list[Tensor]] = {"augmented_loss": [], "plain_loss": []}
        self.stats: list[UpdateStats] = []

    def run(self, images: Tensor, targets: Tensor) -> None:
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        if self.augment is not None and self.count % 2 == 0:
            images, self.actions = self.augment.augment(images)
            with self.engine.capture() if self.engine else nullcontext():
                loss = self.backward(images, targets)
            self.losses["augmented_loss"].append(loss)
        else:
            loss = self.backward(images, targets)
            self.losses["plain_loss"].append(loss)
            self.reward(loss)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.count += 1

    def backward(self, images: Tensor, targets: Tensor) -> Tensor:
        loss = self.criterion(self.model(self.preprocess(images)), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def reward(self, loss: Tensor) -> None:
        """Reward the actions of the step before, now that the next gradient is known."""
        actions, self.actions = self.actions, None
        if actions is None or self.updater is None:
            return
        signal = self.engine.align() if self.engine else loss
        self.stats.append(self.updater.step(actions, signal))

    def metrics(self) -> dict[str, Any]:
        """Return means since the last call, and the policy as it is now."""
        metrics: dict[str, Any] = {
            kind: float(torch.stack(losses).mean()) if losses else None
            for kind, losses in self.losses.items()
        }
        for losses in self.losses.values():
            losses.clear()
        if self.updater is not None and self.augment is not None:
            for key in ("reward_mean", "reward_std"):
                values = [getattr(stats, key) for stats in self.stats]
                metrics[key] = sum(values) / len(values) if values else None
            self.stats.clear()
            metrics |= policy_metrics(self.augment.policy)
        return metrics


def policy_metrics(policy: Policy) -> dict[str, Any]:
    """Probabilities of a policy as plain numbers, for metrics and plots."""
    with torch.no_grad():
        log_probs = policy.log_probs()
        bins = torch.arange(policy.space.num_magnitude_bins, device=log_probs.keep.device)
        return {
            "entropy": float(policy.entropy()),
            "num_ops_probs": log_probs.num_ops.exp().tolist(),
            "keep_probs": log_probs.keep.exp().tolist(),
            "mean_magnitude_bins": (log_probs.magnitude.exp() @ bins.float()).tolist(),
        }


def scale_to_float(images: Tensor) -> Tensor:
    """Uint8 images to float32 in [0, 1]; floating images as they are."""
    return images if images.is_floating_point() else images.float() / 255


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    preprocess: Preprocess = scale_to_float,
) -> float:
    """Share of correct predictions in [0, 1], in evaluation mode; the mode is restored.

    Raises:
        ValueError: no examples.
    """
    device = next(model.parameters()).device
    correct = examples = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images, targets in batches:
                outputs = model(preprocess(images.to(device)))
                correct += int((outputs.argmax(1).cpu() == targets.cpu()).sum())
                examples += len(targets)
    finally:
        model.train(training)
    if not examples:
        raise ValueError("batches must hold at least one example, got none")
    return correct / examples
