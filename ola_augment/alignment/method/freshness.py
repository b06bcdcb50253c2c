"""Whose gradients the parameters hold: the captured batch's, or a later one's."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor, nn


class Freshness:
    """Tells whether the parameters' ``.grad`` are those of a batch after the capture, alone.

    Watches one parameter: the first backward that finds its ``.grad`` empty, or zero, starts anew.

    Args:
        parameters: those of the capture, by name.
        received: names of those that received a gradient in it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], received: Iterable[str]) -> None:
        self._parameters = parameters
        named = [name for name in received if parameters[name].grad is not None]
        # The smallest stands for all; where its gradient is zero nothing can be seen in it.
        named.sort(key=lambda name: parameters[name].numel())
        self._sentinel = next(
            (parameters[name] for name in named if holds_gradient(parameters[name])), None
        )
        self._old = None if self._sentinel is None else self._sentinel.grad
        self._seen = self._clean = self._sentinel is None
        if self._sentinel is not None:
            watcher = weakref.ref(self)  # the hook must not keep what it serves alive

            def backward(gradient: Tensor) -> None:
                if (fresh := watcher()) is not None:
                    fresh._backward()

            handle = self._sentinel.register_hook(backward)  # type: ignore[no-untyped-call]
            self._forget = weakref.finalize(self, handle.remove)

    def _backward(self) -> None:
        assert self._sentinel is not None
        self._seen = True
        if not holds_gradient(self._sentinel):
            self._clean = True
            self._forget()

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
            RuntimeError: there is none, no backward wrote one since the capture, or the captured
                batch's own gradient is still part of it.
        """
        direction = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not direction:
            raise RuntimeError(
                "no reference gradient: all parameters' .grad are None; run the next batch's "
                "backward before align(), or pass gradients"
            )
        if self._clean or self._sentinel is None or not holds_gradient(self._sentinel):
            return direction
        if self._seen:
            raise RuntimeError(NOT_ZEROED)
        if self._sentinel.grad is self._old:
            raise RuntimeError(
                "no reference gradient since the capture: the parameters' .grad are those of the "
                "captured backward; run the next batch's backward before align()"
            )
        return direction


def holds_gradient(parameter: nn.Parameter) -> bool:
    """Whether a parameter's ``.grad`` has a value other than zero."""
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


NOT_ZEROED = (
    "the parameters' .grad still hold the captured batch's own gradient: they were not zeroed "
    "before the next backward. Call optimizer.zero_grad() between the captured step and the next "
    "batch's, or pass gradients"
)
