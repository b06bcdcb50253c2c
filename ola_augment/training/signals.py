"""What an augmented step and its reference say about the actions: one protocol for all kinds."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ola_augment.alignment import DirectionalAlignment, GradientAlignment
from ola_augment.alignment._fsdp import to_whole
from ola_augment.alignment.proof import trainable_parameters


class Engine(Protocol):
    """An alignment engine: those of :mod:`ola_augment.alignment`, or a user's own.

    ``capture`` takes ``gradients=``, ``norms=`` and ``loss_scale=`` where the engine has them.
    """

    @property
    def model(self) -> torch.nn.Module:
        """What is aligned, without a wrapper such as ``DistributedDataParallel``."""

    def capture(self, *arguments: Any, **options: Any) -> contextlib.AbstractContextManager[Any]:
        """Record one augmented step."""

    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B,) alignments of the latest capture."""


class Signal(Protocol):
    """Turns an augmented step into what an updater rewards."""

    @property
    def needs(self) -> str:
        """What it needs of each step beside a backward pass, in words."""

    @property
    def takes_batch(self) -> bool:
        """Whether it computes the losses of an augmented batch itself."""

    def capture(
        self, batch: tuple[Any, ...], gradients: Mapping[str, Tensor] | None, loss_scale: float
    ) -> contextlib.AbstractContextManager[Any]:
        """Record one augmented micro-batch; its reference gradient, where it is known already."""

    def read(
        self, gradients: Mapping[str, Tensor] | None, loss: Tensor | None, loss_scale: float
    ) -> tuple[Tensor, ...]:
        """What the updater's step takes after the actions; what was recorded is forgotten."""

    def clear(self) -> None:
        """Forget what was recorded."""


class Alignments:
    """<grad l_i, g> of every example, or its cosine, and the norms where they are asked for.

    Args:
        engine: that captures.
        cosine: divide by the norms of the example's gradient and of g.
        norms: read the norms of the examples' gradients too.

    Raises:
        ValueError: ``cosine`` or ``norms`` of an engine whose captures have no norms.
    """

    def __init__(self, engine: Engine, cosine: bool, norms: bool) -> None:
        accepted = frozenset(inspect.signature(engine.capture).parameters)
        if (cosine or norms) and "norms" not in accepted:
            raise ValueError(
                "cosine=True and rewards that take norms need an engine with "
                f"capture(norms=True), {type(engine).__name__} has none; use GradientAlignment"
            )
        self._engine = engine
        self._cosine = cosine
        self._norms = norms
        self._accepted = accepted
        self.takes_batch = isinstance(engine, DirectionalAlignment)
        self.needs = (
            "the batch of each augmented step (DirectionalAlignment)" if self.takes_batch else ""
        )
        self._read: list[Callable[[Mapping[str, Tensor] | None], tuple[Tensor, ...]]] = []

    @contextlib.contextmanager
    def capture(
        self, batch: tuple[Any, ...], gradients: Mapping[str, Tensor] | None, loss_scale: float
    ) -> Iterator[Any]:
        """Record one augmented micro-batch."""
        options: dict[str, Any] = {}
        first = gradients is not None and "gradients" in self._accepted
        if first:
            options["gradients"] = gradients
        if self._cosine or self._norms:
            options["norms"] = True
        if loss_scale != 1:
            if "loss_scale" not in self._accepted:
                raise ValueError(
                    f"{type(self._engine).__name__} cannot take loss_scale={loss_scale}"
                )
            options["loss_scale"] = loss_scale
        with self._engine.capture(*batch, **options) as captured:
            yield captured
        align = getattr(captured, "align", self._engine.align)

        def read(reference: Mapping[str, Tensor] | None) -> tuple[Tensor, ...]:
            size = self._norm(reference) if self._cosine else None  # on all ranks, or on none
            alignments: Tensor = align() if first else align(reference)
            if size is not None:
                sizes = captured.norms() * size
                alignments = torch.where(sizes > 0, alignments / sizes, torch.zeros_like(sizes))
            return (alignments, captured.norms()) if self._norms else (alignments,)

        self._read.append(read)

    def read(
        self, gradients: Mapping[str, Tensor] | None, loss: Tensor | None, loss_scale: float
    ) -> tuple[Tensor, ...]:
        """(B,) alignments or cosines, in the order of the examples, and their (B,) norms.

        Args:
            gradients: g; None reads the parameters' ``.grad``.
            loss: not used.
            loss_scale: what g is to be divided by.

        Raises:
            RuntimeError: nothing was captured, or what the engine refuses.
        """
        readers, self._read = self._read, []
        if not readers:
            raise RuntimeError("nothing to align: no augmented step was captured")
        parts = zip(*(read(gradients) for read in readers), strict=True)
        found, *norms = (torch.cat(part) for part in parts)
        self.clear()
        return (found if self._cosine else found / loss_scale, *norms)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._read.clear()
        if isinstance(self._engine, GradientAlignment):  # it keeps the latest capture
            self._engine.forget()

    def _norm(self, gradients: Mapping[str, Tensor] | None) -> Tensor:
        if gradients is None:
            parameters = trainable_parameters(self._engine.model).values()
            held = [p.grad for p in parameters if p.grad is not None]
        else:
            held = list(gradients.values())
        norm = torch.nn.utils.get_total_norm([gradient.float() for gradient in held])
        return to_whole(norm)


class NextStepLoss:
    """The loss of the step after: one number for all examples."""

    needs = "the loss of each plain step (NSLRUpdater)"
    takes_batch = False

    def capture(
        self, batch: tuple[Any, ...], gradients: Mapping[str, Tensor] | None, loss_scale: float
    ) -> contextlib.AbstractContextManager[None]:
        """Nothing needs to be recorded."""
        return contextlib.nullcontext()

    def read(
        self, gradients: Mapping[str, Tensor] | None, loss: Tensor | None, loss_scale: float
    ) -> tuple[Tensor, ...]:
        """Scalar.

        Raises:
            RuntimeError: the loss is not known.
        """
        if loss is None:
            raise RuntimeError(
                "the next-step loss is not known: `with learner.plain_step() as step:` "
                "step.loss = loss"
            )
        return (loss.detach(),)

    def clear(self) -> None:
        """Nothing is kept."""


def trained_gradients(model: torch.nn.Module, loss_scale: float) -> dict[str, Tensor]:
    """Gradients that a backward pass left, by parameter name.

    Args:
        model: without a wrapper.
        loss_scale: what they are divided by.

    Raises:
        RuntimeError: there are none.
    """
    parameters = trainable_parameters(model)
    held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not held:
        raise RuntimeError("no gradient reached the model: run backward inside plain_step()")
    return {name: gradient.detach() / loss_scale for name, gradient in held.items()}
