"""Rules that need no formula: the function itself, run with g in a parameter's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ola_augment.alignment.calls.arguments import Function, functional, writes_in_place
from ola_augment.alignment.calls.expressions import RandomState, again, jvp
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.registry import RULES, MakeTerm, Rule, Use
from ola_augment.alignment.method.rules.rule import broadcast, everywhere, keep, pair
from ola_augment.alignment.method.storage import widen
from ola_augment.alignment.method.terms import (
    ExampleGradient,
    Pair,
    Term,
    squared_norms,
)


class Call:
    """A call as a function of its tensors, ``(*others, w) -> output``, w being that at ``slot``.

    Args:
        function: called again, without writing.
        leaves: its arguments, flattened.
        spec: how they nest.
        slot: index of w among them.
        output: index of the output among the flattened results.
        linear_jointly: floating others count as zero, and only their shapes are kept.
        draws: the random state before the call, where it drew from it.
    """

    def __init__(
        self,
        function: Function,
        leaves: list[Any],
        spec: TreeSpec,
        slot: int,
        output: int,
        linear_jointly: bool,
        draws: RandomState | None,
    ) -> None:
        self._function = functional(function)
        self._draws = draws
        self._spec = spec
        self._output = output
        self._slots: list[int] = []
        self._zeros: dict[int, Tensor] = {}
        self.others: list[Tensor] = []
        for index, leaf in enumerate(leaves):
            if index == slot or not isinstance(leaf, Tensor):
                continue
            if linear_jointly and (leaf.is_floating_point() or leaf.is_complex()):
                self._zeros[index] = leaf.new_zeros(()).expand(leaf.shape)
            else:
                self._slots.append(index)
                self.others.append(leaf)
        self._slots.append(slot)
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Run it."""
        w = tensors[-1]
        filled = dict(zip(self._slots, tensors, strict=True))
        filled |= {index: zeros.to(w.dtype) for index, zeros in self._zeros.items()}
        leaves = [filled.get(index, leaf) for index, leaf in enumerate(self._leaves)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return again(self._function, args, kwargs, self._output, self._draws)


def _by_slot(
    function: Function,
    make: Callable[[Call, Tensor], MakeTerm],
    output: int = 0,
    linear_jointly: bool = False,
    draws: RandomState | None = None,
) -> Callable[..., Iterator[Use]]:
    """A use for every parameter among a function's arguments, nested ones too."""

    def uses(*args: Any, **kwargs: Any) -> Iterator[Use]:
        leaves, spec = tree_flatten((args, kwargs))
        own = list(leaves)
        if writes_in_place(function) and not linear_jointly:
            own[0] = leaves[0].detach().clone()  # about to be overwritten
        for slot, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                call = Call(function, own, spec, slot, output, linear_jointly, draws)
                yield leaf, make(call, own[slot])

    return uses


def linear(function: Function) -> Callable[..., Iterator[Use]]:
    """Linear in each tensor while the others are held (products)."""
    return _by_slot(function, lambda call, w: pair(call, *call.others))


def linear_jointly(function: Function) -> Callable[..., Iterator[Use]]:
    """Linear in all tensors together (what moves, selects and joins rows)."""
    return _by_slot(function, lambda call, w: pair(call, *call.others), linear_jointly=True)


def differentiable(
    function: Function, output: int = 0, draws: RandomState | None = None
) -> Callable[..., Iterator[Use]]:
    """Neither: the derivative at theta_t, by two reverse passes of this one function."""

    def make(call: Call, w: Tensor) -> MakeTerm:
        kept = tuple(keep(tensor) for tensor in (*call.others, w))
        return lambda delta, layout: Derivative(Directional(call), kept, widen(delta), layout)

    return _by_slot(function, make, output, draws=draws)


class Directional:
    """``(*others, w, tangent) -> `` the derivative of a call along the tangent of w."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self, *tensors: Tensor) -> Tensor:
        """By two reverse passes."""
        *others, value, tangent = tensors
        return jvp(lambda moved: self.call(*others, moved), [value], [tangent])


class Derivative(Pair):
    """Of a function at theta_t, whose operator is `Directional`."""

    operator: Directional

    def contract(self, tangent: Tensor) -> Tensor:
        """By two reverse passes; by one for each example where there is no double backward."""
        try:
            return super().contract(tangent)
        except (RuntimeError, NotImplementedError):
            return ExampleGradient(self.gradients(tangent.shape)).contract(tangent)

    def _form(self, shape: torch.Size) -> Tensor:
        """One reverse pass of the function for each example."""
        inputs = [x.to(self.delta.dtype) if x.is_floating_point() else x for x in self.inputs]
        with torch.enable_grad():
            w = inputs[-1].detach().requires_grad_()
            output = self.operator.call(*inputs[:-1], w)
        return torch.stack(
            [
                torch.autograd.grad(output, w, own, retain_graph=True, materialize_grads=True)[0]
                for own in self.layout.each(self.delta)
            ]
        )

    def squared_norms(self, shape: torch.Size) -> Tensor:
        """Of the gradients."""
        return squared_norms(self.gradients(shape))


def elementwise(function: Function) -> Callable[..., Iterator[Use]]:
    """Elementwise with broadcasting: the gradient of an expanded w is summed down to w's shape."""

    def make(call: Call, w: Tensor) -> MakeTerm:
        shape, w = w.shape, w.detach()
        others = [tensor.detach() for tensor in call.others]

        def gradient(delta: Tensor) -> Tensor:
            with torch.enable_grad():
                moved = widen(w).expand(delta.shape).requires_grad_()
                output = call(*map(widen, others), moved)
            return torch.autograd.grad(output, moved, delta.to(output.dtype))[0]

        def term(delta: Tensor, layout: Layout) -> Term:
            found: Term = broadcast(shape, gradient)(delta, layout)
            return found

        return term

    return _by_slot(function, make)


_NAMES: dict[Callable[[Function], Callable[..., Iterator[Use]]], str] = {
    elementwise: (
        "addcmul addcdiv lerp pow float_power atan2 arctan2 maximum minimum fmax fmin max min "
        "clamp clip clamp_min clamp_max hypot xlogy copysign logaddexp logaddexp2 remainder fmod "
        "div divide true_divide where ldexp polar complex copy mul multiply __truediv__ __pow__ "
        "__mod__ __imul__ __itruediv__ __ipow__ __imod__ __div__ __rtruediv__ __idiv__"
    ),
    linear: (
        "matmul __matmul__ mm bmm mv dot vdot inner outer ger tensordot kron cross vecdot einsum "
        "index_select gather take take_along_dim __getitem__ masked_select repeat_interleave "
        "grouped_mm _grouped_mm index"
    ),
    linear_jointly: (
        "masked_fill index_fill fill index_add index_copy index_put scatter scatter_add "
        "masked_scatter slice_scatter select_scatter diagonal_scatter as_strided_scatter "
        "__setitem__ put hstack vstack dstack column_stack row_stack stack"
    ),
    differentiable: (
        "cdist dist cosine_similarity pairwise_distance grid_sampler addmv addr addbmm "
        "scatter_reduce index_reduce embedding_bag mse_loss l1_loss smooth_l1_loss huber_loss "
        "soft_margin_loss binary_cross_entropy kl_div binary_cross_entropy_with_logits "
        "cosine_embedding_loss margin_ranking_loss triplet_margin_loss"
    ),
}

for _make, _names in _NAMES.items():
    for _name in _names.split():
        for _home in (torch, Tensor, torch._VF, torch.linalg, torch._C._nn, F):
            # With what writes in place.
            for _spelling in (_name, f"{_name}_"):
                _function = getattr(_home, _spelling, None)
                if _function is not None:
                    RULES[_function] = Rule(_make(_function), everywhere, None)
