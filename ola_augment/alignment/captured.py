"""What a capture leaves behind until it is aligned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ola_augment.alignment.expressions import Node, Tangents
from ola_augment.alignment.probe import Decision, Key
from ola_augment.alignment.terms import Term


@dataclass
class Pass:
    """One forward pass of the model: its batch, layouts and, after backward, terms."""

    batch: int
    layouts: dict[Key, Decision]
    terms: list[tuple[Node, Term]] = field(default_factory=list)


class Reference:
    """Tells whether the parameters' gradients are newer than a capture.

    Args:
        parameters: those of the capture, by name.
        received: names of those that received a gradient in it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], received: Iterable[str]) -> None:
        self._parameters = parameters
        # The smallest gradient stands for all: a later backward replaces it or writes into it.
        self._sentinel = min(
            (name for name in received if parameters[name].grad is not None),
            key=lambda name: parameters[name].numel(),
            default=None,
        )
        self._old = None if self._sentinel is None else parameters[self._sentinel].grad
        self._version = None if self._old is None else self._old._version

    def check_unchanged(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Refuse a model whose parameters are not those of the capture.

        Raises:
            RuntimeError: naming a parameter that was added, removed or replaced.
        """
        for name in (*self._parameters, *parameters):
            if parameters.get(name) is not self._parameters.get(name):
                raise RuntimeError(
                    f"the model changed between capture and align: parameter {name!r} was added, "
                    "removed, frozen or replaced"
                )

    def gradient(self) -> dict[str, Tensor]:
        """The parameters' ``.grad``, by name.

        Raises:
            RuntimeError: there is none, or no backward wrote one since the capture.
        """
        direction = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not direction:
            raise RuntimeError(
                "no reference gradient: all parameters' .grad are None; run the next batch's "
                "backward before align(), or pass gradients"
            )
        current = None if self._sentinel is None else direction.get(self._sentinel)
        if current is not None and current is self._old and current._version == self._version:
            raise RuntimeError(
                "no reference gradient since the capture: the parameters' .grad are those of the "
                "captured backward; run the next batch's backward before align()"
            )
        return direction


class Captured:
    """Terms of one or more forward passes, waiting for the reference gradient.

    Args:
        parameters: those of the capture, by name.
        passes: forward passes in the order of the calls.
        values: parameters at the capture, for expressions.
        reference: made at the end of the capture.
        reduction: "sum" or "mean".
        loss_scale: what the loss was multiplied by.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        passes: list[Pass],
        values: dict[str, Tensor],
        reference: Reference,
        reduction: str,
        loss_scale: float,
    ) -> None:
        self.reference = reference
        self._parameters = parameters
        self._passes = passes
        self._values = values
        self._factors = [(p.batch if reduction == "mean" else 1) / loss_scale for p in passes]

    def contract(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Align every example of every pass with a direction, (sum of batches,)."""
        double = any(
            p.dtype in (torch.float64, torch.complex128) for p in self._parameters.values()
        )
        dtype = torch.float64 if double else torch.float32
        device = next(iter(self._parameters.values())).device
        tangents = Tangents(direction, self._values)
        parts = []
        with torch.autocast(device.type, enabled=False):
            for one, factor in zip(self._passes, self._factors, strict=True):
                total = torch.zeros(one.batch, dtype=dtype, device=device)
                for node, term in one.terms:
                    total += _contracted(node, term, tangents, total)
                parts.append(total * factor)
        return torch.cat(parts)


def _contracted(node: Node, term: Term, tangents: Tangents, like: Tensor) -> Tensor | float:
    tangent = tangents(node)
    return 0.0 if tangent is None else term.contract(tangent).to(like)


def checked_gradients(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A reference gradient given by name, checked against the parameters."""
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"gradients must be a mapping from parameter name to tensor, got "
            f"{type(gradients).__name__}"
        )
    for name, gradient in gradients.items():
        if name not in parameters:
            raise ValueError(f"gradients names {name!r}, which is no trainable parameter")
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradients[{name!r}] must be a tensor, got {type(gradient).__name__}")
        parameter = parameters[name]
        if gradient.shape != parameter.shape or gradient.device != parameter.device:
            raise ValueError(
                f"gradients[{name!r}] must have shape {tuple(parameter.shape)} on "
                f"{parameter.device}, got {tuple(gradient.shape)} on {gradient.device}"
            )
    if not gradients:
        raise ValueError("gradients is empty: name at least one parameter")
    return {name: gradient.detach() for name, gradient in gradients.items()}


def checked_result(alignments: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """The alignments, unless one is no number.

    Raises:
        RuntimeError: an alignment is inf or NaN, with where it comes from.
    """
    finite = torch.isfinite(alignments)
    if bool(finite.all()):
        return alignments
    bad = [name for name, g in direction.items() if not bool(torch.isfinite(g).all())]
    source = (
        f"the reference gradient of {bad[0]!r} is not finite"
        if bad
        else "the captured activations or their gradients are not finite (a diverged loss, or an "
        "overflow under autocast)"
    )
    raise RuntimeError(
        f"{int((~finite).sum())} of {len(finite)} alignments are inf or NaN: {source}; skip this "
        "update"
    )
