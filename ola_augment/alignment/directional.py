"""Alignments as directional derivatives at theta_t: almost no memory, more time."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ola_augment.alignment.method.captured import checked_gradients, checked_result
from ola_augment.alignment.method.freshness import Freshness
from ola_augment.alignment.proof import refuse_sharded, trainable_parameters, unwrapped
from ola_augment.alignment.proof.received import Received, check_sum
from ola_augment.alignment.proof.snapshot import Restore, random_states

METHODS = ("finite_difference", "jvp")
# What is given besides the batch: (model, *batch) -> losses (B,), one per example.
LossFunction = Callable[..., Tensor]


@dataclass
class _Batch:
    """All that is needed to compute one batch's losses again."""

    batch: tuple[Any, ...]
    losses: Tensor
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Restore
    freshness: Freshness
    received: Received


class DirectionalAlignment:
    """<grad l_i(theta_t), g> from the losses themselves: no activation is kept.

    The batch runs through the model once more, at theta_t, with the same dropout masks: shifted
    by h g ("finite_difference": (l_i(theta_t + h g) - l_i(theta_t)) / h, re-using the training
    losses; relative error about 2e-3, single precision or better only) or with tangents
    ("jvp": exact, about twice the time). Besides one copy of the parameters and of their gradient
    nothing is kept. Any model will do whose backward pass is the derivative of its forward pass:
    that the alignments sum to <gradient, g> is checked, and a model in which they do not (a
    stop-gradient, a straight-through estimator, a hook that changes gradients) is refused.

    With BatchNorm in training mode the result is the derivative of each example's own loss,
    through the batch's statistics too, where `GradientAlignment` gives its share of the
    total's; their sums agree.

    Args:
        model: the module that the losses depend on; may be a DistributedDataParallel.
        loss: called as ``loss(model, *batch)``, returns one loss per example, (B,).
        method: "finite_difference" or "jvp".

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no trainable parameter, or an unknown ``method``.

    Example:
        >>> def loss(model, inputs, targets):
        ...     return (model(inputs) - targets).square().mean(1)
        >>> model = torch.nn.Linear(3, 2)
        >>> engine = DirectionalAlignment(model, loss)
        >>> with engine.capture(torch.ones(4, 3), torch.zeros(4, 2)) as losses:  # step t
        ...     losses.mean().backward()
        >>> model.zero_grad()  # after the optimizer's step; then the next batch
        >>> model(torch.ones(4, 3)).mean().backward()
        >>> engine.align().shape
        torch.Size([4])

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    def __init__(
        self, model: nn.Module, loss: LossFunction, *, method: str = "finite_difference"
    ) -> None:
        self._inner = unwrapped(model)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        refuse_sharded(self._inner)
        if not trainable_parameters(self._inner):
            raise ValueError(f"model {type(model).__name__} has no trainable parameter")
        self._model = model
        self._loss = loss
        self._method = method
        self._captured: _Batch | None = None

    @property
    def model(self) -> nn.Module:
        """What is aligned, without a wrapper such as ``DistributedDataParallel``."""
        return self._inner

    @contextlib.contextmanager
    def capture(self, *batch: Any) -> Iterator[Tensor]:
        """The training step's forward pass; its backward belongs inside.

        Args:
            batch: passed to ``loss`` after the model; kept until `align`, not to be modified.

        Yields:
            (B,) losses, one per example, to reduce and run backward.

        Raises:
            ValueError: ``loss`` returned something else than one loss per example.
            RuntimeError: no backward reached the model's parameters.
        """
        refuse_sharded(self._inner)
        parameters = trainable_parameters(self._inner)
        before = {name: _state(p.grad) for name, p in parameters.items()}
        buffers = {name: buffer.clone() for name, buffer in self._inner.named_buffers()}
        random = random_states(next(iter(parameters.values())).device)
        self._captured = None
        losses = self._loss(self._model, *batch)
        if losses.dim() != 1:
            raise ValueError(
                f"loss must return one loss per example, (B,), got shape {tuple(losses.shape)}; "
                'use reduction="none"'
            )
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        gradients = Received(losses, parameters)
        try:
            yield losses
        finally:
            gradients.close()
        received = [name for name, p in parameters.items() if _state(p.grad) != before[name]]
        if not received:
            raise RuntimeError(
                "no gradient reached the model's parameters inside capture(): run the backward of "
                "the losses inside it"
            )
        freshness = Freshness(parameters, received)
        self._captured = _Batch(
            batch, losses.detach(), values, buffers, random, freshness, gradients
        )

    @torch.no_grad()
    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Align the last batch's examples with a reference gradient and forget them.

        Args:
            gradients: parameter name -> tensor of its shape; parameters that are not named count as
                zero. By default the parameters' ``.grad``: read them before gradient clipping.

        Returns:
            (B,) alignments of the example's own losses, in the losses' precision.

        Raises:
            RuntimeError: no batch, no reference gradient since its backward, a changed model,
                alignments that do not sum to <gradient, g>, or a result that is not finite.
            TypeError: ``gradients`` is not a mapping of tensors.
            ValueError: ``gradients`` does not fit the parameters.
        """
        captured = self._captured
        if captured is None:
            raise RuntimeError(
                "nothing to align: run a batch and its backward inside capture() first"
            )
        parameters = trainable_parameters(self._inner)
        captured.freshness.check_unchanged(parameters)
        direction = (
            captured.freshness.gradient()
            if gradients is None
            else checked_gradients(gradients, parameters)
        )
        with _restored(self._inner, captured):
            evaluate = functools.partial(self._evaluate, captured.batch)
            if self._method == "jvp":
                alignments = checked_result(_exact(evaluate, captured, direction), direction)
                check_sum(alignments, captured.received, direction, _JVP_ERROR, 0.0)
            else:
                alignments = _finite_difference(evaluate, captured, direction)
        self._captured = None
        return alignments

    def _evaluate(self, batch: tuple[Any, ...], parameters: Mapping[str, Tensor]) -> Tensor:
        call = functools.partial(_call, self._inner, dict(parameters))
        losses: Tensor = self._loss(call, *batch)
        return losses

    def close(self) -> None:
        """Forget the batch."""
        self._captured = None


def _call(model: nn.Module, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(model, parameters, args, kwargs)


def _finite_difference(
    evaluate: Callable[[Mapping[str, Tensor]], Tensor],
    captured: _Batch,
    direction: Mapping[str, Tensor],
) -> Tensor:
    """(l_i(theta + h g) - l_i(theta)) / h; where the loss is curved, from both sides."""
    # Rounding of the losses (eps / h) against curvature (h): a step of relative size sqrt(eps).
    theta = _norm(captured.parameters.values())
    size = _norm(direction.values())
    eps = torch.finfo(captured.losses.dtype).eps
    step = float(_STEP * eps**0.5 * theta / size) if size > 0 else 1.0

    def shifted(by: float) -> Tensor:
        return evaluate(
            {
                name: value.add(direction[name], alpha=by) if name in direction else value
                for name, value in captured.parameters.items()
            }
        )

    ahead = shifted(step)
    alignments = checked_result((ahead - captured.losses) / step, direction)
    weighted = captured.received.weights * captured.losses
    rounding = _ROUNDINGS * eps / step * float(torch.linalg.vector_norm(weighted.double()))
    difference, sizes = captured.received.off_by(alignments, direction)
    if difference > _DIFFERENCE_ERROR * sizes + rounding:
        alignments = checked_result((ahead - shifted(-step)) / (2 * step), direction)
        check_sum(alignments, captured.received, direction, 2 * _DIFFERENCE_ERROR, rounding)
    return alignments


# Factor on sqrt(eps) |theta| / |g|, where rounding and curvature were found to balance.
_STEP = 0.05
#: Of the alignments' sizes: what their sum may be off by, beside rounding of the losses.
_DIFFERENCE_ERROR = 0.01
_JVP_ERROR = 1e-3
#: Of a loss, in units of its precision.
_ROUNDINGS = 4


def _exact(
    evaluate: Callable[[Mapping[str, Tensor]], Tensor],
    captured: _Batch,
    direction: Mapping[str, Tensor],
) -> Tensor:
    """Forward-mode derivative along g."""
    with warnings.catch_warnings(), forward_ad.dual_level(), _differentiable_attention():
        # torch's own table of forward derivatives is built with a deprecated function.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        duals = {
            name: forward_ad.make_dual(  # type: ignore[no-untyped-call]
                value, direction[name].to(value.dtype)
            )
            if name in direction
            else value
            for name, value in captured.parameters.items()
        }
        losses = forward_ad.unpack_dual(evaluate(duals))  # type: ignore[no-untyped-call]
        tangent: Tensor | None = losses.tangent
    return torch.zeros_like(captured.losses) if tangent is None else tangent


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Fused attention has no forward derivative."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _state(gradient: Tensor | None) -> tuple[int, int] | None:
    return None if gradient is None else (id(gradient), gradient._version)


def _norm(tensors: Any) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


@contextlib.contextmanager
def _restored(model: nn.Module, captured: _Batch) -> Iterator[None]:
    """Buffers and random states as they were at the batch's forward, for the while."""
    after = random_states(captured.losses.device)
    today = [(buffer, buffer.data) for buffer in model.buffers()]
    try:
        captured.random()
        for name, buffer in model.named_buffers():
            buffer.data = captured.buffers[name]
        yield
    finally:
        after()
        for buffer, data in today:
            buffer.data = data
