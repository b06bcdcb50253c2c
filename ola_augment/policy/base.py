"""What every policy can do, whatever its tables: draw, log-probability, entropy, summary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ola_augment.actions import Actions, check_actions
from ola_augment.draw import Draw, LogProbs, Tables, log_prob, repeats
from ola_augment.logits import LogitsModule
from ola_augment.policy.attributes import FixedAttributes
from ola_augment.policy.tables import check_probabilities, checked_tables, entropy_of
from ola_augment.space import SearchSpace, named_space
from ola_augment.summary import favour, table_of_operations

_MOST_SLOTS = 1000

_LogProbs = TypeVar("_LogProbs", bound=Callable[..., LogProbs])


def depends_on_logits_alone(log_probs: _LogProbs) -> _LogProbs:
    """Mark a ``log_probs`` method that reads nothing that changes but the policy's own logits.

    Draws then keep its tables until the logits change.
    """
    log_probs.depends_on_logits_alone = True  # type: ignore[attr-defined]
    return log_probs


class Policy(FixedAttributes, LogitsModule, ABC):
    """A distribution over :class:`Actions`, sampled as in Algorithm 2.

    Draw the number of operations r; draw r operations, uniformly unless ``log_probs().ops`` says
    otherwise; keep each with its own probability; draw a magnitude bin for each that is kept. Kinds
    of policies differ in :meth:`log_probs` only; those that learn assign their logits as
    ``nn.Parameter``, see :meth:`named_logits`.

    The logits are no parameters of a model that holds the policy: its optimizer, weight decay,
    averages and ``DistributedDataParallel`` pass them by, its ``state_dict`` has them. They are
    float32 (float64 after ``double()``), on the CPU and in shared memory, whatever the model's
    dtype and device. Copies have logits of their own. ``train()`` and ``eval()`` change nothing.

    Args:
        space: a :class:`SearchSpace` or its name.
        max_ops: number of slots S.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.
        replacement: whether an operation can be drawn twice for one image.
        once: with replacement: whether one that is drawn again after it was kept is dropped.

    All of them are attributes that cannot be changed afterwards.

    Raises:
        ValueError: ``max_ops`` below 1 or, without replacement, above the number of operations
            (with it, above 1,000); an unknown space name.
        TypeError: ``max_ops`` is not an int, or ``space`` neither a name nor a space.

    Example:
        >>> from ola_augment import UniformPolicy  # one of its kinds
        >>> policy = UniformPolicy("wide_long")
        >>> policy.sample(8).keep.shape
        torch.Size([8, 2])
    """

    _fixed = frozenset(
        ("space", "max_ops", "replacement", "once", "num_ops", "keep_prob", "magnitude")
    )

    def __init__(
        self,
        space: str | SearchSpace,
        max_ops: int,
        num_magnitude_bins: int = 31,
        *,
        replacement: bool = False,
        once: bool = False,
    ) -> None:
        super().__init__()
        self.space = named_space(space, num_magnitude_bins)
        if isinstance(max_ops, bool) or not isinstance(max_ops, int):
            raise TypeError(f"the number of operations must be an int, got {max_ops!r}")
        most = _MOST_SLOTS if replacement else len(self.space)
        if not 1 <= max_ops <= most:
            reason = "" if replacement else f" (the operations of space {self.space.name!r})"
            raise ValueError(
                f"the number of operations must be in 1 .. {most}{reason}, got {max_ops}"
            )
        self.max_ops = max_ops
        self.replacement = replacement
        self.once = once and replacement
        self._signed = np.array([operation.signed for operation in self.space.operations])
        self._tables_kept: tuple[list[bytes] | None, Tables] | None = None

    @abstractmethod
    def log_probs(self) -> LogProbs:
        """Return the tables of the distribution, differentiable in the logits.

        In every table, and in ``keep`` with ``drop``, probabilities add up to 1. In DataLoader
        workers logits may change at any moment: compute from a copy of each.

        Returns:
            Floating tensors of log-probabilities, in the shapes that :class:`LogProbs` names.
        """

    def sample(self, n: int, generator: torch.Generator | None = None) -> Actions:
        """Draw the augmentations of n images (Algorithm 2), on the CPU.

        Args:
            n: number of examples, 0 or more.
            generator: a CPU generator; None uses torch's global one.

        Returns:
            :class:`Actions` of n examples, with their ``log_prob`` and no gradient.

        Raises:
            TypeError, ValueError: tables of :meth:`log_probs` of another shape, or that are no
                probabilities (as when logits are NaN).
        """
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        return self._drawn_from().draw(n, generator)

    def sample_one(self, generator: torch.Generator | None = None) -> Draw:
        """As ``sample(1)``, in plain numbers: for one image, tensors cost more than the draw.

        Args:
            generator: a CPU generator; None uses torch's global one.

        Returns:
            What was drawn; its ``actions()`` are the :class:`Actions`, without a batch dimension.
        """
        return self._drawn_from().draw_one(generator)

    def log_prob(self, actions: Actions) -> Tensor:
        """Log-probability of actions under today's logits.

        Counts the draws that were made: the number of operations, the choice of each, each keep,
        the bin of each kept operation. Signs and centres, never learned, do not count.

        Args:
            actions: of B examples, from a policy over the same space.

        Returns:
            (B,), differentiable in the logits, on their device.

        Raises:
            TypeError, ValueError: the actions do not belong to this policy.
        """
        check_actions(actions, self.space)
        if actions.ops.shape[1] != self.max_ops:
            raise ValueError(
                f"actions have {actions.ops.shape[1]} slots, the policy draws {self.max_ops}"
            )
        if self.once and (repeats(actions.ops, actions.keep) & actions.keep).any():
            raise ValueError("an example's kept actions.ops must be distinct for this policy")
        if not self.replacement:
            ordered = np.sort(actions.ops.numpy(), axis=1)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                raise ValueError("actions.ops of an example must be distinct for this policy")
        log_probs = self._tables()
        device = log_probs.keep.device
        choices = self._log_choices(log_probs.num_ops)
        # Actions that were drawn in inference mode could not be saved for the backward pass.
        fields = (field.clone() if field.is_inference() else field for field in actions)
        on_device = Actions(*(field.to(device) for field in fields))
        return log_prob(on_device, log_probs, choices, self.once)

    def _drawn_from(self) -> Tables:
        """What draws read, kept until the logits change where nothing else can change it."""
        kept = getattr(self.log_probs, "depends_on_logits_alone", False)
        values = self._logits_now() if kept else None
        if kept and self._tables_kept is not None and self._tables_kept[0] == values:
            return self._tables_kept[1]
        with torch.no_grad():
            tables = (None if table is None else table.cpu() for table in self._tables())
            log_probs = LogProbs(*tables)  # type: ignore[arg-type]
            check_probabilities(log_probs, type(self).__name__)
            choices = self._log_choices(log_probs.num_ops)
            drawn_from = Tables(log_probs, choices, self._signed, self.replacement, self.once)
        # Another process may have written the logits meanwhile: then these serve this draw only.
        if kept and self._logits_now() == values:
            self._tables_kept = (values, drawn_from)
        return drawn_from

    def _logits_now(self) -> list[bytes]:
        return [logits.detach().numpy().tobytes() for logits in self._logits.values()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables_kept": None}

    def _tables(self) -> LogProbs:
        """Tables of the right kind and shape."""
        return checked_tables(self.log_probs(), self.max_ops, self.space, self.replacement)

    def _log_choices(self, like: Tensor) -> Tensor:
        """(S,), log of the number of ordered choices of 1 .. S operations."""
        size = len(self.space)
        factors = [size if self.replacement else size - slot for slot in range(self.max_ops)]
        return like.new_tensor(np.log(factors)).cumsum(0)

    def extra_repr(self) -> str:
        """Space, arguments and, of a policy that learns, the probabilities as they are now.

        Returns:
            The text between the parentheses of ``repr(policy)``.
        """
        arguments = {"space": self.space.name, **self.arguments()}
        described = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        if not self.named_logits():
            return described
        with torch.no_grad():
            log_probs = self.log_probs()
        num_ops, magnitude = log_probs.num_ops.exp().cpu(), log_probs.magnitude.exp().cpu()
        bins = (magnitude @ torch.arange(magnitude.shape[1], device="cpu").to(magnitude)).tolist()
        counts = ", ".join(f"{p:.2f}" for p in num_ops.tolist())
        favoured = favour(log_probs.keep, log_probs.ops)
        of_counts = f"\n1 .. {self.max_ops} operations: {counts}" * (favoured.verb != "drawn")
        rows = zip(self.space.operations, favoured.probs.tolist(), bins, strict=True)
        lines = [
            f"{operation.name}: {favoured.verb} {p:.2f}"
            + f", mean bin {mean:.1f}" * (operation.low is not None)
            for operation, p, mean in rows
        ]
        return "\n".join((described + of_counts, *lines))

    def summary(self, height: int = 32, width: int = 32) -> str:
        """What the policy does, as text: one line an operation, its favourites first.

        An operation is *kept* with its probability once it is drawn; of a policy that draws some
        more often than others it says how often each is *drawn*.

        Args:
            height: of the images in pixels, for magnitudes that scale with it.
            width: of the images in pixels.

        Returns:
            Several lines.

        Example:
            >>> from ola_augment import UniformPolicy
            >>> print(UniformPolicy("rand_augment").summary())  # doctest: +ELLIPSIS
            UniformPolicy over 'rand_augment' (14 operations)
            applied to an image on average: 1.00; drawn: 2
            identity: kept 0.50
            ...
            rotate: kept 0.50, mean ±15°
            ...
        """
        with torch.no_grad():
            tables = self._tables()
            favoured, magnitude = favour(tables.keep, tables.ops), tables.magnitude.exp()
            lines = table_of_operations(self.space, favoured, magnitude, height, width)
            applied = f"applied to an image on average: {float(self.applied_ops()):.2f}"
            probs = tables.num_ops.exp().tolist()
        drawn = ", ".join(f"{r} ({p:.2f})" for r, p in enumerate(probs, start=1))
        if max(probs) == 1:
            drawn = str(probs.index(1) + 1)
        title = f"{type(self).__name__} over {self.space.name!r} ({len(self.space)} operations)"
        return "\n".join((title, f"{applied}; drawn: {drawn}", *lines))

    def applied_ops(self) -> Tensor:
        """Expected number of applied operations of an image, differentiable in the logits.

        Returns:
            A scalar in 0 .. ``max_ops``.

        Example:
            >>> from ola_augment import UniformPolicy
            >>> float(UniformPolicy(num_ops=2, keep_prob=0.5).applied_ops())
            1.0
        """
        num_ops, keep, _, _, ops = self._tables()
        applied = self._open(keep, ops) @ keep.double().exp()  # of each slot
        return (num_ops.double().exp() @ applied.cumsum(0)).to(keep.dtype)

    def entropy(self) -> Tensor:
        """Entropy of the distribution, differentiable in the logits.

        Returns:
            A scalar in nats, 0 or more.
        """
        num_ops, keep, drop, magnitude, ops = self._tables()
        slot = entropy_of(torch.stack((keep, drop), -1)) + keep.exp() * entropy_of(magnitude)
        counts = torch.arange(1, self.max_ops + 1, device=num_ops.device)
        choice = self._log_choices(num_ops) if ops is None else counts * entropy_of(ops)
        slots = choice + (self._open(keep, ops).to(slot.dtype) @ slot).cumsum(0)
        return entropy_of(num_ops) + num_ops.exp() @ slots

    def _open(self, keep: Tensor, ops: Tensor | None) -> Tensor:
        """(S, A) float64, probability that a slot draws an operation and is free to keep it."""
        keep = keep.double()
        drawn = torch.full_like(keep, 1 / len(keep)) if ops is None else ops.double().exp()
        slots = torch.arange(self.max_ops, device=keep.device)[:, None]
        return drawn * (1 - drawn * keep.exp() * self.once) ** slots
