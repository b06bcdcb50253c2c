"""The alignment engine: <grad l_i(theta_t), g> for every example of a captured batch."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ola_augment.alignment.captured import Captured, checked_gradients, checked_result
from ola_augment.alignment.probe import Decision, Key
from ola_augment.alignment.session import Session
from ola_augment.alignment.storage import Storage
from ola_augment.alignment.validation import check_model, trainable_parameters, unwrapped

REDUCTIONS = ("sum", "mean")


class GradientAlignment:
    """Exact per-example gradient alignments for the price of about one forward pass.

    Inside `capture` every call that reads a trainable parameter keeps its input x and the
    gradient delta of its output. `align` runs the same calls with the reference gradient g in the
    parameters' place: <d l_i / d W, g> = <delta_i, layer_g(x_i)>, summed over all calls (Lemmas 2
    and 3 of the OLA paper). No per-example gradient is ever formed.

    A model is either aligned exactly or refused. On the first batch of each new shape the engine
    verifies where the examples lie in every activation (three forward passes: on the batch, and
    with its first and its last example changed) and that each parameter's alignments sum to the
    gradient it received.

    Args:
        model: called inside `capture`, with the examples along dimension 0 of its first tensor
            argument; may be a DistributedDataParallel, whose own examples are then aligned
            with the averaged gradient.
        reduction: how the loss that is backpropagated was reduced. "sum": the alignments are
            those of the terms of that scalar as it stands, so that for any loss their sum is
            <grad L(theta_t), g>. "mean": each term is multiplied by the batch size, so that each
            is <grad l_i, g>.
        storage: how pairs wait for g: "bfloat16" (half the room, relative error about 1e-3),
            "exact" or "int8" (a quarter, 1e-2). Only single precision tensors of a mebibyte or more
            are rounded. Where the per-example weight gradient takes less than half the room of a
            large pair it is kept instead, as it is.
        fallback: a function without a rule is differentiated along g at theta_t (one backward
            and one double backward of that function per use) instead of refused.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no trainable parameter or a layer that cannot be aligned;
            ``reduction`` or ``storage`` is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: str = "sum",
        storage: str = "bfloat16",
        fallback: bool = False,
    ) -> None:
        self._model = unwrapped(model)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        check_model(self._model, fallback)
        self._reduction = reduction
        self._storage = Storage(storage)
        self._fallback = fallback
        self._layouts: dict[object, dict[Key, Decision]] = {}
        self._captured: Captured | None = None
        self._capturing = False

    @contextlib.contextmanager
    def capture(self, *, loss_scale: float = 1.0) -> Iterator[None]:
        """Record forward and backward passes of the model.

        Any number of them: the alignments follow in the order in which the model was called. Pairs
        of an earlier capture that were never aligned are dropped with a warning. After an error
        inside, nothing is captured.

        Args:
            loss_scale: what the loss was multiplied by before its backward (the ``get_scale()``
                of a GradScaler); alignments are divided by it.

        Raises:
            RuntimeError: gradients are disabled, captures are nested, no backward reached the
                model's parameters, or a use of a parameter was not understood: the message names
                it.
            ValueError: ``loss_scale`` is not positive and finite, or the batch is empty.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise ValueError(f"loss_scale must be positive and finite, got {loss_scale}")
        if not torch.is_grad_enabled():
            raise RuntimeError("capture() needs gradients: it was entered under torch.no_grad()")
        if self._capturing:
            raise RuntimeError("capture() inside capture(): leave the first one before the second")
        check_model(self._model, self._fallback)
        if self._captured is not None:
            warnings.warn(
                "capture() replaces a capture that was never aligned", RuntimeWarning, stacklevel=3
            )
            self._captured = None
        session = Session(self._model, self._storage, self._fallback, self._layouts)
        self._capturing = True
        try:
            with session:
                yield
        finally:
            self._capturing = False
        self._captured = session.finish(self._reduction, loss_scale)

    @torch.no_grad()
    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Align the captured examples with a reference gradient and forget them.

        Args:
            gradients: parameter name -> tensor of its shape, g; parameters that are not named count
                as zero. By default the parameters' ``.grad``: read them before gradient clipping.

        Returns:
            (B,) alignments, float32 (float64 for double precision models), in the order of the
            examples; zero for examples that no backward reached.

        Raises:
            RuntimeError: nothing is captured (never, or aligned already), no backward since the
                capture, the model's parameters are not those of the capture, or the result is not
                finite. The capture is kept, but for the last.
            TypeError: ``gradients`` is not a mapping of tensors.
            ValueError: a name, shape or device in ``gradients`` does not fit.
        """
        captured = self._captured
        if captured is None:
            raise RuntimeError("nothing to align: run a forward and backward inside capture()")
        parameters = trainable_parameters(self._model)
        captured.reference.check_unchanged(parameters)
        if gradients is None:
            direction = captured.reference.gradient()
        else:
            direction = checked_gradients(gradients, parameters)
        alignments = captured.contract(direction)
        self._captured = None
        return checked_result(alignments, direction)

    def close(self) -> None:
        """Free what is kept. Outside `capture` nothing is attached to the model."""
        self._captured = None
