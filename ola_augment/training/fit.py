"""The interleaved training loop: an augmented step, then a plain one that rewards it.

Everything here is composed of the public parts and can be written in a user's own loop.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ola_augment.files import write_atomically
from ola_augment.training.batches import read_batch, set_epoch
from ola_augment.training.callbacks import Callback
from ola_augment.training.checkpoint import (
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)
from ola_augment.training.learner import OLALearner
from ola_augment.training.metrics import plain_numbers, progress_text, scale_to_float
from ola_augment.training.recommended import check_length
from ola_augment.training.run import Preprocess, Run
from ola_augment.training.signals import Engine
from ola_augment.training.updater import GARUpdater, NSLRUpdater
from ola_augment.transforms import PolicyTransform


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    augment: PolicyTransform | None = None,
    learner: OLALearner | None = None,
    updater: GARUpdater | NSLRUpdater | None = None,
    engine: Engine | None = None,
    preprocess: Preprocess | None = None,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    metrics_path: str | Path | None = None,
    progress: bool = True,
    clip_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    skip_bad_steps: bool = True,
    callbacks: Iterable[Callback] = (),
    checkpoint_path: str | Path | None = None,
    checkpoint_every: int = 1000,
    resume: str | Path | Mapping[str, Any] | None = None,
    generators: Iterable[torch.Generator] = (),
) -> list[dict[str, Any]]:
    """Train a model, and with a learner the policy that augments its images.

    Batches alternate, across epochs too: the first is augmented; the second has only the default
    pre-processing, and its gradient is both the reference of the first's rewards and an ordinary
    update of the model. Without a learner the same loop compares other augmentations. Where
    workers augment every batch (`PolicyTransform.collate`), the plain one is augmented as well, as
    in Algorithm 1. With a learner of ``reference="current"`` the plain batch comes first and a pair
    makes one update, from the sum of both gradients.

    Args:
        model: trained in place, on its own device.
        loader: batches (images, targets), with the workers' :class:`Actions` where they augment,
            or mappings with such entries; images as :meth:`PolicyTransform.augment` takes them. It
            and its samplers are told the epoch, from 0, where they have a ``set_epoch``.
        optimizer: of the model.
        epochs: passes over the loader.
        augment: applied to every other batch, on the model's device; None augments none, or takes
            the learner's.
        learner: of the policy; None makes one of ``augment``, ``updater`` and ``engine`` if there
            is an updater, and else leaves the policy as it is.
        updater: of ``augment``'s policy.
        engine: to align with; None makes a ``GradientAlignment(model)`` for a GARUpdater.
        preprocess: images -> the model's input, on both kinds of batches; None scales uint8
            and uint16 to float32 in [0, 1].
        criterion: (outputs, targets) -> mean loss; None is cross entropy.
        scheduler: stepped after every batch that was not skipped.
        evaluate: called after each epoch; what it returns joins the metrics.
        metrics_path: a file for the metrics, one JSON object an epoch (see Returns).
        progress: show a progress bar.
        clip_norm: largest norm of the model's gradient; the policy is rewarded with the whole one.
        scaler: of the loss, for float16.
        autocast: dtype of the forward passes on the model's device; None is the model's own.
        skip_bad_steps: a loss or gradient that is NaN or Inf (on any rank) changes nothing and is
            counted; False raises instead.
        callbacks: told of every step and epoch.
        checkpoint_path: a file to go on from, replaced every ``checkpoint_every`` batches and after
            each epoch, between the pairs.
        checkpoint_every: batches.
        resume: a checkpoint, or its path. The run goes on bit by bit (without DataLoader workers)
            as if it had not stopped; it must be set up as it was before.
        generators: that the data or pre-processing draw from. Attributes ``generator`` of the
            loader, its samplers, its dataset, ``preprocess`` and ``augment`` are found without.

    Returns:
        One dict an epoch: ``epoch`` (from 1), ``steps`` (so far), ``seconds`` (of training,
        without evaluation), ``augmented_loss``, ``plain_loss``, ``augmented_accuracy`` and
        ``plain_accuracy`` (means over the batches; None without such a batch, and accuracy only
        where outputs (B, classes) meet whole targets (B,)), ``skipped_steps``, what ``evaluate``
        gave, and with a policy that learns ``reward_mean``, ``reward_std`` (of raw rewards) and
        what :func:`policy_metrics` says, by the names of the operations.

    Raises:
        TypeError: an optimizer that needs a closure or has modes to switch (schedule-free), or a
            scheduler that needs a metric (``ReduceLROnPlateau``).
        ValueError: a number out of range, an updater without ``augment`` or beside a learner, a
            learner of another model or transform, a loader without batches or with batches of an
            unknown kind, or a checkpoint that does not fit.
        FloatingPointError: a bad step with ``skip_bad_steps=False``.

    Example:
        >>> from ola_augment import OLAAugment
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        >>> learner = OLALearner(model, OLAAugment())
        >>> images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
        >>> loader = [(images, torch.arange(8) % 2)] * 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> history = fit(model, loader, optimizer, epochs=1, learner=learner, progress=False)
        >>> history[0]["steps"], learner.pairs
        (2, 1)
    """
    if epochs < 1 or checkpoint_every < 1:
        raise ValueError(
            f"epochs and checkpoint_every must be at least 1, got {epochs} and {checkpoint_every}"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    _check_steps(optimizer, scheduler)
    if learner is None and updater is not None:
        if augment is None:
            raise ValueError("updater needs augment, the transform whose policy it updates")
        learner = OLALearner(model, augment, updater=updater, engine=engine)
    elif learner is not None:
        if updater is not None or engine is not None:
            raise ValueError("a learner has its own updater and engine: give it alone")
        if augment not in (None, learner.transform):
            raise ValueError("augment must be the learner's transform, got another one")
        learner.check_model(model)
        augment = learner.transform
    run = Run(
        model,
        optimizer,
        augment,
        learner,
        preprocess or scale_to_float,
        criterion or nn.CrossEntropyLoss(),
        scheduler,
        clip_norm,
        scaler,
        autocast,
        skip_bad_steps,
    )
    callbacks = tuple(callbacks)
    found = [*generators, *_generators(loader, preprocess, augment)]
    found = list({id(generator): generator for generator in found}.values())
    history: list[dict[str, Any]] = []
    first_epoch, batches_done, seconds, due = 1, 0, 0.0, False
    started: dict[str, Any] = {}
    paused: dict[str, Any] | None = None
    if resume is not None:
        paused = dict(resume) if isinstance(resume, Mapping) else load_checkpoint(resume)
        run.load_state_dict(paused)
        first_epoch, batches_done = paused["epoch"], paused["batches"]
        seconds, history = paused["seconds"], json.loads(paused["history"])

    lines = [json.dumps(record) for record in history]  # each once: runs have thousands of epochs

    def save(epoch: int, batches: int) -> None:
        if checkpoint_path is not None and run.between_pairs:
            content = run.state_dict() | {
                "epoch": epoch,
                "batches": batches,
                "seconds": seconds,
                "history": f"[{', '.join(lines)}]",
                "epoch_random": started,
                "random": random_states(found),
            }
            save_checkpoint(checkpoint_path, content)

    def write_metrics() -> None:
        if metrics_path is not None:
            write_atomically(metrics_path, "".join(line + "\n" for line in lines).encode())

    write_metrics()
    total = None
    with contextlib.suppress(TypeError):  # loaders over an IterableDataset have none
        total = epochs * len(loader)  # type: ignore[arg-type]
    if learner is not None and total is not None:
        check_length(learner, total // 2 + (learner.pairs if resume is None else 0))
    method = "none" if augment is None else type(augment).__name__
    with tqdm(total=total, initial=run.count, disable=not progress, unit="step") as bar:
        for epoch in range(first_epoch, epochs + 1):
            model.train()
            set_epoch(loader, epoch - 1)
            if learner is not None and learner.rejoins:
                learner.epoch.begin(loader)
            bar.set_description(f"{method}, epoch {epoch}/{epochs}")
            if paused is not None:
                # Go through the epoch's order again, as far as it was, without training.
                set_random_states(paused["epoch_random" if batches_done else "random"], found)
            started = random_states(found)
            batches = iter(loader)
            if paused is not None and batches_done:
                for batch in itertools.islice(batches, batches_done):
                    if learner is not None and learner.rejoins:
                        learner.epoch.with_batch(batch)
                set_random_states(paused["random"], found)
            paused = None
            before, start = seconds, time.perf_counter()
            for batch in batches:
                if learner is not None:
                    batch = learner.rejoin(batch)
                loss = run.step(read_batch(batch, run.device))
                batches_done += 1
                seconds = before + time.perf_counter() - start
                if bar.update():  # it was drawn
                    bar.set_postfix_str(progress_text(run.means() | run.policy()), refresh=False)
                for callback in callbacks:
                    callback.on_step(run.count, loss)
                due = due or run.count % checkpoint_every == 0
                if due and run.between_pairs:
                    save(epoch, batches_done)
                    due = False
            if not run.count:
                raise ValueError("loader must give at least one batch, got none")
            record: dict[str, Any] = {"epoch": epoch, "steps": run.count, "seconds": seconds}
            record |= run.metrics() | (plain_numbers(evaluate()) if evaluate else {})
            for callback in callbacks:
                callback.on_epoch(record)
            record = plain_numbers(record)
            history.append(record)
            lines.append(json.dumps(record))
            batches_done, seconds = 0, 0.0
            save(epoch + 1, 0)
            due = due or not run.between_pairs  # as soon as the open pair is complete
            write_metrics()
            bar.set_postfix_str(progress_text(record))
    return history


def _generators(*owners: Any) -> list[torch.Generator]:
    """Generators that these, and a loader's parts, draw from."""
    found = []
    for owner in owners:
        parts = [owner, *(getattr(owner, n, None) for n in ("sampler", "batch_sampler", "dataset"))]
        parts.append(getattr(getattr(owner, "batch_sampler", None), "sampler", None))
        found += [getattr(part, "generator", None) for part in parts]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _check_steps(optimizer: Any, scheduler: Any) -> None:
    """Refuse what is stepped in another way than by ``step()``."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps them
    kind = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"fit steps its optimizer once for each batch, {kind} asks for the loss several times "
            "(a closure): take another optimizer, or a loop of your own with OLALearner"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise TypeError(
            f"{kind} has modes for training and evaluation, which fit does not switch: train in a "
            "loop of your own with OLALearner"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "fit steps its scheduler after each batch, without a metric: step ReduceLROnPlateau in "
            'a callback, on_epoch(record): scheduler.step(record["plain_loss"])'
        )
