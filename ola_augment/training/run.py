"""One step after the other: what :func:`fit` does with a batch, and what it measures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.training.batches import Batch
from ola_augment.training.checks import warn_of_still_maps
from ola_augment.training.learner import OLALearner
from ola_augment.training.metrics import hits, policy_metrics
from ola_augment.training.pair import Step
from ola_augment.training.ranks import all_ranks
from ola_augment.training.restored import kept_buffers
from ola_augment.transforms import PolicyTransform

Preprocess = Callable[[Tensor], Tensor]


class Run:
    """The alternating steps of :func:`fit` and what they measured since the last epoch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        augment: PolicyTransform | None,
        learner: OLALearner | None,
        preprocess: Preprocess,
        criterion: Callable[[Tensor, Any], Tensor],
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        clip_norm: float | None,
        scaler: torch.amp.GradScaler | None,
        autocast: torch.dtype | None,
        skip: bool,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.optimizer = optimizer
        self.augment = augment
        self.learner = learner
        self.preprocess = preprocess
        self.criterion = criterion
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.scaler = scaler
        self.autocast = autocast
        self.skip = skip
        self.count = 0
        self.skipped = 0
        self.measured: dict[str, list[float]] = {
            f"{kind}_{what}": [] for what in ("loss", "accuracy") for kind in ("augmented", "plain")
        }
        self.rewards: list[list[float]] = []

    @property
    def between_pairs(self) -> bool:
        """Whether no pair waits for its other half."""
        return self.learner is None or self.count % 2 == 0

    def step(self, batch: Batch) -> float | None:
        """Train on one batch; its loss, or None if it was skipped."""
        plain_first = self.learner is not None and self.learner.plain_first
        second = self.count % 2 == 1
        augmented = self.augment is not None and second == plain_first
        # With the reference at theta_t one update follows both halves.
        begins, ends = not (plain_first and second), not plain_first or second
        if begins:
            self.optimizer.zero_grad()
        restore_buffers = kept_buffers(self.model)
        self.count += 1
        loss, right = self._backward(batch, augmented)
        good = math.isfinite(loss) and (not ends or self._gradients_are_finite())
        if not all_ranks(good, self.device):
            self._give_up(restore_buffers, loss)
            return None
        if ends and self._update() and self.scheduler is not None:
            for _ in range(1 + plain_first):  # a schedule counts batches
                self.scheduler.step()
        kind = "augmented" if augmented else "plain"
        self.measured[f"{kind}_loss"].append(loss)
        if right is not None:
            self.measured[f"{kind}_accuracy"].append(right)
        return loss

    def _backward(self, batch: Batch, augmented: bool) -> tuple[float, float | None]:
        """Loss of a batch, NaN if it is bad, and the share of right predictions, if it has one."""
        learner = self.learner
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        half: contextlib.AbstractContextManager[Step | None] = contextlib.nullcontext()
        images, actions = batch.images, batch.actions
        if augmented and self.augment is not None and batch.actions is None:
            warn_of_still_maps(images, batch.targets)
            if learner is None:
                images, actions = self.augment.augment(images, clips=True)
            else:
                images = learner.augment(images)
        if learner is not None:
            half = (
                learner.augmented_step(actions=actions, loss_scale=scale)
                if augmented
                else learner.plain_step(loss_scale=scale)
            )
        value, right = math.nan, None
        try:
            with half as step:
                kind = self.device.type
                with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
                    outputs = self.model(self.preprocess(images))
                    loss = self.criterion(outputs, batch.targets)
                right = hits(outputs, batch.targets)
                value = float(loss.detach())
                if step is not None:
                    step.loss = loss.detach()
                    step.accuracy = right
                scaled: Tensor = loss if self.scaler is None else self.scaler.scale(loss)
                scaled.backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            if math.isfinite(value):
                raise
            value = math.nan  # the engine refused what the bad loss brought
        if step is not None and step.stats is not None:
            self.rewards.append([step.stats.reward_mean, step.stats.reward_std])
        return value, right

    def _gradients_are_finite(self) -> bool:
        if self.scaler is not None:  # it looks itself, and lowers its scale
            return True
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return not gradients or math.isfinite(float(nn.utils.get_total_norm(gradients)))

    def _give_up(self, restore_buffers: Callable[[], None], loss: float) -> None:
        """Leave the model as it was before the bad batch."""
        self.optimizer.zero_grad()
        restore_buffers()
        if self.learner is not None:
            self.learner.drop()
        self.skipped += 1
        if not self.skip:
            raise FloatingPointError(
                f"loss or gradient of batch {self.count} is NaN or Inf (loss {loss}); the model is "
                "as it was before it"
            )

    def _update(self) -> bool:
        """Step the optimizer, unless a scaler finds that its gradients overflowed."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            overflowed = self.scaler.get_scale() < scale
            self.skipped += overflowed
            return not overflowed
        self.optimizer.step()
        return True

    def metrics(self) -> dict[str, Any]:
        """Return means since the last call, and the policy as it is now."""
        metrics: dict[str, Any] = self.means()
        for entries in self.measured.values():
            entries.clear()
        metrics["skipped_steps"], self.skipped = self.skipped, 0
        if self.learner is not None:
            columns = list(zip(*self.rewards, strict=True)) or [(), ()]
            for key, values in zip(("reward_mean", "reward_std"), columns, strict=True):
                metrics[key] = sum(values) / len(values) if values else None
            self.rewards.clear()
        return metrics | self.policy()

    def means(self) -> dict[str, float | None]:
        """Return means since the last epoch."""
        return {
            name: math.fsum(values) / len(values) if values else None
            for name, values in self.measured.items()
        }

    def policy(self) -> dict[str, Any]:
        """Return the learning policy as it is now."""
        return {} if self.learner is None else policy_metrics(self.learner.policy)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "learner": self.learner,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Of every part that has one, and of what was measured."""
        return {
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "count": self.count,
            "skipped": self.skipped,
            "measured": self.measured,
            "rewards": self.rewards,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the parts must be the same."""
        parts = self._parts()
        if state["parts"].keys() != parts.keys():
            raise ValueError(
                f"the checkpoint is of a run with {sorted(state['parts'])}, this one has "
                f"{sorted(parts)}"
            )
        # The learner refuses a state of another; what it does not know comes after it.
        for name in sorted(parts, key=lambda name: name != "learner"):
            parts[name].load_state_dict(state["parts"][name])
        self.count, self.skipped = state["count"], state["skipped"]
        self.measured = {name: list(values) for name, values in state["measured"].items()}
        self.rewards = [list(values) for values in state["rewards"]]
