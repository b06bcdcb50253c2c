"""Draws of a transform: from its policy, in whatever process, worker, rank and thread it is."""

from __future__ import annotations

import threading
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import get_worker_info
from torchvision.transforms import v2

from ola_augment.actions import Actions, check_actions
from ola_augment.draw import Draw
from ola_augment.kernels.functional import beside
from ola_augment.logits import started_by_another, warn_if_unshared
from ola_augment.policy import FixedAttributes, Policy
from ola_augment.space import SearchSpace
from ola_augment.streams import SharedGenerator, rank_here, shared, stream_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Drawing(FixedAttributes, v2.Transform):  # type: ignore[misc]
    """A transform that draws from a policy; as :class:`PolicyTransform` describes it."""

    def __init__(self, policy: Policy, generator: torch.Generator | None) -> None:
        super().__init__()
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, got {type(policy).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
        self.policy = policy
        self.generator = generator
        self.rank: int | None = None
        self._started_by = 0  # the rank that started this process, where it is a worker
        self._drawn = threading.local()
        self._shared: SharedGenerator | None = None  # the generator, where a worker draws
        self._checked_in_worker = False

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_drawn"]
        state["_shared"] = None
        if get_spawning_popen() is not None:
            state["_started_by"] = self._rank_here()
        if self.generator is not None:
            state["generator"] = shared(self.generator)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn = threading.local()
        if isinstance(self.generator, SharedGenerator):  # of a shallow copy
            self.generator = self.generator.generator

    @property
    def space(self) -> SearchSpace:
        """The policy's search space."""
        return self.policy.space

    @property
    def last_actions(self) -> Actions | None:
        """:class:`Actions` of the latest call in this thread, or None.

        Without a batch dimension if the images had none; in the order of the flattened batch if
        they had several, and of the list if it was one.
        """
        drawn = getattr(self._drawn, "actions", None)
        if isinstance(drawn, Draw):
            drawn = self._drawn.actions = drawn.actions()
        return drawn

    def freeze(self) -> Self:
        """Stop learning: the logits stay as they are, and the policy goes on augmenting.

        An :class:`OLALearner` then costs nothing, and a trial of it ends with what it has seen;
        ``augment.policy.requires_grad_()`` lets the policy learn again.

        Returns:
            The transform itself.
        """
        self.policy.requires_grad_(False)
        return self

    def _look_around_in_worker(self) -> None:
        if not self._checked_in_worker and (get_worker_info() or started_by_another()):
            warn_if_unshared(self.policy)
            self._checked_in_worker = True

    def _sample(self, n: int) -> Actions:
        self._look_around_in_worker()
        with beside():
            actions = self.policy.sample(n, self._generator_here())
        # What our own sampler draws is right; anything may come from a user's.
        if getattr(self.policy.sample, "__func__", None) is not Policy.sample:
            check_actions(actions, self.space, n)
        return actions

    def _sample_one(self) -> Draw:
        """For one image, without making a tensor of what was drawn."""
        self._look_around_in_worker()
        drawn = self._drawn.actions = self.policy.sample_one(self._generator_here())
        return drawn

    def _generator_here(self) -> torch.Generator | None:
        """Give each DataLoader worker and each rank a stream of its own."""
        return stream_of(self._seeded_here(), self._rank_here())

    def _seeded_here(self) -> torch.Generator | None:
        worker = get_worker_info()
        if self.generator is None or worker is None:
            return self.generator
        if self._shared is None or self._shared.generator is not self.generator:
            self._shared = shared(self.generator)
        return self._shared.in_worker(worker.seed)

    def _rank_here(self) -> int:
        return self.rank if self.rank is not None else rank_here() or self._started_by
