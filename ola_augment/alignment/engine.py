"""The alignment engine: <grad l_i(theta_t), g> for every example of a captured batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ola_augment.alignment._fsdp import Along, Sharded, is_shard, is_sharded
from ola_augment.alignment.method.captured import Captured, checked_gradients
from ola_augment.alignment.method.session import Session
from ola_augment.alignment.method.storage import Storage
from ola_augment.alignment.proof import Proof, check_model, trainable_parameters, unwrapped

REDUCTIONS = ("sum", "mean")


class GradientAlignment:
    """Exact per-example gradient alignments for the price of about one forward pass.

    Inside `capture` every call that reads a trainable parameter keeps its input x and the
    gradient delta of its output. `align` runs the same calls with the reference gradient g in the
    parameters' place: <d l_i / d W, g> = <delta_i, layer_g(x_i)>, summed over all calls (Lemmas 2
    and 3 of the OLA paper). No per-example gradient is ever formed.

    A model is either aligned exactly or refused. On the first batch of each new shape the engine
    verifies where the examples lie in every activation (four forward passes or more: on the batch,
    rolled, and with some examples changed), that the loss keeps them apart, and that each
    parameter's alignments sum to the gradient it received.

    Args:
        model: called inside `capture`, with the examples along dimension 0 of its first tensor
            argument; may be a DistributedDataParallel, whose own examples are then aligned
            with the averaged gradient.
        reduction: how the loss that is backpropagated was reduced. "sum": the alignments are
            those of the terms of that scalar as it stands, so that for any loss their sum is
            <grad L(theta_t), g>. "mean": each term is multiplied by what the loss divided by, so
            that each is <grad l_i, g>, l_i being the mean of the example's own positions (one, or
            its tokens that are not ignored), class weights included. What a loss divided by is
            seen where it is one of ``torch.nn.functional`` or ends in ``.mean()``; others are
            refused.
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

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> engine = GradientAlignment(model)
        >>> with engine.capture() as captured:
        ...     model(torch.ones(4, 3)).square().mean().backward()
        >>> model.zero_grad()
        >>> model(torch.ones(4, 3)).mean().backward()  # its gradient is the reference
        >>> captured.align().shape
        torch.Size([4])

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
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
        self._proof = Proof(next(self._model.parameters()).device)
        self._captured: Captured | None = None
        self._capturing = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with the model, without what was captured and verified.

        Raises:
            RuntimeError: inside :meth:`capture`.
        """
        if self._capturing:
            raise RuntimeError("an engine cannot be copied inside capture(): leave it first")
        return {**self.__dict__, "_captured": None, "_proof": Proof(self._proof.ranks.device)}

    @property
    def model(self) -> nn.Module:
        """What is aligned, without a wrapper such as ``DistributedDataParallel``."""
        return self._model

    @contextlib.contextmanager
    def capture(
        self,
        *,
        gradients: Mapping[str, Tensor] | None = None,
        norms: bool | Iterable[str] = False,
        loss_scale: float = 1.0,
    ) -> Iterator[Captured]:
        """Record forward and backward passes of the model.

        Any number of them: the alignments follow in the order in which the model was called. After
        an error inside, nothing is captured.

        Args:
            gradients: the reference gradient g, parameter name -> tensor of its shape, where it is
                known already (`gradients`): each term is contracted during the backward and
                nothing is kept. Parameters that are not named count as zero.
            norms: find the norms of the examples' gradients too (`Captured.norms`), over all
                trainable parameters or those of these names: exact, by parameter from Gram
                matrices or from the per-example gradients, whichever is cheaper.
            loss_scale: what the loss was multiplied by before its backward (the ``get_scale()``
                of a GradScaler); alignments are divided by it.

        Yields:
            The `Captured` examples, complete after the block. Several may wait at once.

        Raises:
            RuntimeError: gradients are disabled, captures are nested, no backward reached the
                model's parameters, or a use of a parameter was not understood: the message names
                it.
            TypeError: ``gradients`` is not a mapping of tensors.
            ValueError: ``loss_scale`` is not positive and finite, the batch is empty, or a name,
                shape or device in ``gradients`` or a name in ``norms`` does not fit.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise ValueError(f"loss_scale must be positive and finite, got {loss_scale}")
        if not torch.is_grad_enabled():
            raise RuntimeError("capture() needs gradients: it was entered under torch.no_grad()")
        if self._capturing:
            raise RuntimeError("capture() inside capture(): leave the first one before the second")
        parameters = check_model(self._model, self._fallback)
        self._captured = None
        direction: Mapping[str, Tensor] | None = None
        if gradients is not None:
            direction = checked_gradients(gradients, parameters)
        sharded = Sharded(self._model) if is_sharded(self._model) else None
        if sharded is not None:
            direction = _along(direction)
        measured = set(parameters if norms is True else norms or ())
        if unknown := measured - parameters.keys():
            raise ValueError(f"norms names {sorted(unknown)[0]!r}, which is no trainable parameter")
        captured = Captured(lambda: trainable_parameters(self._model))
        session = Session(
            self._model,
            parameters,
            self._storage,
            self._fallback,
            self._proof,
            direction,
            measured,
            self._reduction == "mean",
            sharded,
        )
        self._capturing = True
        try:
            with session:
                yield captured
        finally:
            self._capturing = False
        captured.complete(session.finish(loss_scale))
        self._captured = captured

    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Align the examples of the latest capture and forget them.

        After an error the capture is kept, unless an alignment was not finite.

        Args:
            gradients: parameter name -> tensor of its shape, g; parameters that are not named count
                as zero. By default the parameters' ``.grad``: read them before gradient clipping.
                None for a capture that was given its reference gradient.

        Returns:
            (B,) alignments, float32 (float64 for double precision models), in the order of the
            examples.

        Raises:
            RuntimeError: nothing is captured, or what `Captured.align` cannot align.
            TypeError: ``gradients`` is not a mapping of tensors.
            ValueError: ``gradients`` does not fit the parameters or the capture.
        """
        if self._captured is None:
            raise RuntimeError("nothing to align: run a forward and backward inside capture()")
        alignments = self._captured.align(gradients)
        self._captured = None
        return alignments

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the parameters' ``.grad`` by name: a reference gradient for `capture`.

        Returns:
            Parameter name -> tensor of its shape; parameters without a ``.grad`` are left out.

        Raises:
            RuntimeError: no parameter has one.
        """
        found = {
            name: parameter.grad.detach().clone()
            for name, parameter in trainable_parameters(self._model).items()
            if parameter.grad is not None
        }
        if not found:
            raise RuntimeError("all parameters' .grad are None: run a backward first")
        return found

    def forget(self) -> None:
        """Let go of the latest capture; what was verified stays."""
        self._captured = None

    def close(self) -> None:
        """Free what is kept, what was verified included. Nothing is attached to the model."""
        self._captured = None
        self._proof.forget()


def _along(direction: Mapping[str, Tensor] | None) -> Along:
    """A reference gradient of a model whose parameters processes share.

    Raises:
        ValueError: it is not known yet, or whole.
    """
    if direction is None:
        raise ValueError(
            "the parameters are sharded over processes (fully_shard), and what a capture keeps "
            "for a later reference gradient would need them whole: give the reference first, "
            "capture(gradients=...); an OLALearner does so with held-out batches and with "
            'reference="current"'
        )
    for name, one in direction.items():
        if not is_shard(one):
            raise ValueError(
                f"gradients[{name!r}] must be sharded as the parameter is, got a plain tensor: "
                "engine.gradients() gives what a backward left, or distribute_tensor it"
            )
    return Along(direction)
