"""The same rules, carried by BackPACK instead of the engine's own hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from backpack import backpack
from backpack.extensions.firstorder.base import (
    FirstOrderBackpropExtension,
    FirstOrderModuleExtension,
)
from torch import Tensor, nn

from ola_augment.alignment._torch import backward_id
from ola_augment.alignment.calls.expressions import Leaf
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.method.captured import Content, NotFinite, checked_gradients
from ola_augment.alignment.method.freshness import NOT_ZEROED, Freshness, holds_gradient
from ola_augment.alignment.method.modules import CALLS
from ola_augment.alignment.method.rules import RULES
from ola_augment.alignment.method.storage import Storage
from ola_augment.alignment.method.tape import Tape
from ola_augment.alignment.proof import SumCheck, refuse_sharded, trainable_parameters

_CALLED_TWICE = (
    "layer {} was called twice in one forward pass: BackPACK keeps only its last input; use "
    "GradientAlignment"
)


class _Receive(FirstOrderModuleExtension):  # type: ignore[misc]
    """Runs after the backward of each extended module."""

    def __call__(
        self,
        extension: BackPACKAlignment,
        module: Any,
        g_inp: tuple[Tensor, ...],
        g_out: tuple[Tensor, ...],
    ) -> None:
        if not hasattr(module, "input0"):
            raise RuntimeError(_CALLED_TWICE.format(type(module).__name__))
        extension.receive(module, module.input0, g_out[0])


class BackPACKAlignment(FirstOrderBackpropExtension):  # type: ignore[misc]
    """Per-example gradient alignments as a BackPACK extension.

    For who uses BackPACK already: it runs in one backward with BackPACK's other first-order
    quantities. `GradientAlignment` covers more models and needs no extension of the model.

    BackPACK sees whole modules, not functions: every trainable parameter must belong to a module of
    `SUPPORTED`, each module may run once per backward, and the examples lie along dimension 0.
    One backward is captured at a time; a new one replaces an earlier one.

    Args:
        model: the model given to ``backpack.extend``.
        reduction: how the loss was reduced: "sum" aligns the terms of the scalar as it stands,
            "mean" multiplies each by the batch size, so that it is <grad l_i, g>.
        storage: how pairs wait for g: "bfloat16" (half the room, relative error about 1e-3),
            "exact" or "int8" (a quarter, 1e-2).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no trainable parameter; a parameter of an unsupported module; a parameter tied
            between modules, which BackPACK would count wrongly.

    Example:
        >>> from backpack import backpack, extend
        >>> model = extend(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> extension = BackPACKAlignment(model)
        >>> with backpack(extension):
        ...     inputs = torch.randn(5, 4, requires_grad=True)  # or torch warns of BackPACK's hooks
        ...     nn.functional.cross_entropy(model(inputs), torch.arange(5) % 3).backward()
        >>> model.zero_grad()
        >>> nn.functional.cross_entropy(model(inputs), torch.arange(5) % 3).backward()
        >>> extension.align().shape
        torch.Size([5])

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__

        `BackPACK: Packing more into backprop <https://arxiv.org/abs/1912.10985>`__
    """

    SUPPORTED = tuple(CALLS)

    def __init__(
        self, model: nn.Module, *, reduction: str = "sum", storage: str = "bfloat16"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be one of sum, mean, got {reduction!r}")
        Storage(storage)
        refuse_sharded(model)
        self._parameters = trainable_parameters(model)
        _check(model, self._parameters)
        self.model = model
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._reduction = reduction
        self._storage = storage
        self._forget()
        self._last_backward = -1
        self._early: dict[str, Tensor] = {}
        self._handles = [
            parameter.register_hook(lambda grad, name=name: self._on_gradient(name, grad))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
        ]
        super().__init__("alignment", dict.fromkeys(CALLS, _Receive()), fail_mode="SILENT")

    def _forget(self) -> None:
        self._tape: Tape | None = None
        self._packer = Storage(self._storage)
        self._check = SumCheck(self._packer.rounding)
        self._modules: set[nn.Module] = set()
        self._backward = -1
        self._zeroed = False

    def capture(self) -> AbstractContextManager[None]:
        """Short for ``backpack(extension)``.

        Returns:
            A context manager; the forward and backward pass belong inside.
        """
        with_extension: AbstractContextManager[None] = backpack(self)
        return with_extension

    def receive(self, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        """Keep what a module's parameters need; called by BackPACK during the backward.

        Args:
            module: the module.
            x: its input, floating or whole, examples along dimension 0.
            delta: the gradient of its output, of the output's shape.

        Raises:
            RuntimeError: the module ran twice, or its batch is not the others'.
        """
        backward = backward_id()
        if backward != self._backward:
            self._forget()
            self._backward = backward
            self._tape = Tape(x.shape[0])
            if backward == self._last_backward:
                for name, gradient in self._early.items():
                    self._check.receive(name, gradient)
            self._early = {}
        if not any(id(p) in self._names for p in module.parameters(recurse=False)):
            return
        if module in self._modules:
            raise RuntimeError(_CALLED_TWICE.format(type(module).__name__))
        self._modules.add(module)
        assert self._tape is not None
        if x.shape[0] != self._tape.batch or delta.shape[0] != self._tape.batch:
            raise RuntimeError(
                f"layer {type(module).__name__} has {x.shape[0]} rows along dimension 0 where the "
                f"batch is {self._tape.batch}: examples must lie along dimension 0; use "
                "GradientAlignment"
            )
        function, arguments = CALLS[type(module)](module, x.detach())
        layout = Layout(0, 1, self._tape.batch, 1)
        with torch.no_grad():
            for argument, make_term in RULES[function].uses(*arguments):
                if argument is None or id(argument) not in self._names:
                    continue
                leaf, term = Leaf(self._names[id(argument)]), make_term(delta, layout)
                self._check.computed(leaf.names, delta.dtype)
                self._tape.terms.append((leaf, term.pack(self._packer, argument.shape)))

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        backward = backward_id()
        if backward != self._last_backward:
            self._early = {}
            if not self._zeroed:  # the first gradient of another backward: is there room for it?
                self._zeroed = not any(map(holds_gradient, self._parameters.values()))
        self._last_backward = backward
        if backward == self._backward:
            self._check.receive(name, gradient)
        else:
            self._early[name] = gradient  # it may come before its module's backward

    @torch.no_grad()
    def align(self, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """Align the captured examples with a reference gradient and forget them.

        Args:
            gradients: parameter name -> tensor of its shape; parameters that are not named count as
                zero. By default the parameters' ``.grad``: read them before gradient clipping.

        Returns:
            (B,) alignments, float32 or float64.

        Raises:
            RuntimeError: nothing captured, no backward since, the first capture's self-check found
                a use of a parameter that BackPACK did not see, or a result is not finite.
            TypeError: ``gradients`` is not a mapping of tensors.
            ValueError: ``gradients`` does not fit the parameters.
        """
        if self._tape is None or not self._tape.terms:
            raise RuntimeError(
                "nothing to align: run a backward of the extended model inside "
                "backpack(extension) first"
            )
        if gradients is not None:
            direction = checked_gradients(gradients, self._parameters)
        elif self._last_backward == self._backward:
            raise RuntimeError(
                "no reference gradient since the captured backward; run the next batch's backward "
                "before align(), or pass gradients"
            )
        elif not self._zeroed:
            raise RuntimeError(NOT_ZEROED)
        else:
            direction = Freshness(self._parameters, ()).gradient()
        factor = self._tape.batch if self._reduction == "mean" else 1
        like = next(iter(self._parameters.values())).detach()
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        content = Content(
            [self._tape], [factor], Freshness(self._parameters, ()), self._check, None, like
        )
        try:
            alignments = content.align(direction)
        except NotFinite:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"{error}; BackPACK sees modules only") from None
        self._forget()
        return alignments

    def close(self) -> None:
        """Forget what was captured and take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._forget()


def _check(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError(f"model {type(model).__name__} has no trainable parameter")
    names = {id(parameter): name for name, parameter in parameters.items()}
    for layer, module in model.named_modules():
        own = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
        if own and type(module) not in CALLS:
            raise ValueError(
                f"layer {layer!r} ({type(module).__name__}) owns parameter {own[0]!r} and has no "
                "BackPACK rule; freeze it or use GradientAlignment"
            )
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for key, count in owners.items():
        if count > 1 and key in names:
            raise ValueError(
                f"parameter {names[key]!r} is tied between modules: BackPACK would count it "
                "wrongly; use GradientAlignment"
            )
