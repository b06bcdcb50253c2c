"""Convolutions, whose pairs are large: Lemma 3.

<d l_i / d K, g> = <delta_i, x_i * g>, the layer run with g as kernel; the bias: <delta_i, g>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.registry import RULES, MakeTerm, Rule, Use
from ola_augment.alignment.method.rules.layers import gram_is_cheaper, gram_norms
from ola_augment.alignment.method.rules.rule import pair, sum_to_channels
from ola_augment.alignment.method.terms import Adjoint, Term

# stride, padding, dilation, transposed, output_padding, groups
Settings = tuple[Any, Any, Any, bool, Any, int]


def convolution(
    function: Callable[..., Tensor], settings_of: Callable[..., Settings]
) -> Callable[..., Iterator[Use]]:
    """For y = x * K + b, with whatever stride, padding, dilation and groups the layer has."""

    def uses(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
    ) -> Iterator[Use]:
        def operator(x: Tensor, w: Tensor) -> Tensor:
            return function(x, w, None, *settings, **named)

        if input.dim() < weight.dim():  # a single example without its dimension
            yield from _unbatched(uses(input.unsqueeze(0), weight, bias, *settings, **named))
            return
        adjoint = None  # torch has no backward by itself of complex ones on a CPU
        if not weight.is_complex():
            adjoint = of_kernel(weight.dim() - 2, settings_of(*settings, **named))
        yield weight, pair(operator, input, adjoint=adjoint)
        yield bias, sum_to_channels

    return uses


def _unbatched(uses: Iterator[Use]) -> Iterator[Use]:
    for w, term in uses:

        def of_one(delta: Tensor, layout: Layout, term: MakeTerm = term) -> Term:
            found: Term = term(delta.unsqueeze(0), layout)
            return found

        yield w, of_one


def of_kernel(spatial: int, settings: Settings) -> Adjoint | None:
    """Per-example kernel gradients; None for paddings by name.

    Args:
        spatial: number of spatial dimensions.
        settings: stride, padding, dilation, transposed, output_padding, groups.
    """
    if any(isinstance(setting, str) for setting in settings):
        return None
    stride, padding, dilation, transposed, output_padding, groups = settings
    stride, padding, dilation, output_padding = (
        _along_each(setting, spatial) for setting in (stride, padding, dilation, output_padding)
    )
    rest = (stride, padding, dilation, transposed, output_padding, groups)

    def products(delta: Tensor, input: Tensor, shape: torch.Size) -> _Products:
        input = input.to(delta.dtype)
        # A transposed convolution is one of delta, with x in place of the output's gradient.
        whole, part = (delta, input) if transposed else (input, delta)
        return _Products(whole, part, shape, stride, padding, dilation, groups)

    def gradients(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
        own = products(delta, input, shape)
        if own.are_rows(spatial) and own.positions() * shape.numel() <= _FEW:
            return own.gradients()
        found = delta.new_empty(len(delta), *shape)
        kernel = delta.new_empty(1).expand(shape)  # only its shape is read
        for one, x, gradient in zip(delta, input.to(delta.dtype), found, strict=True):
            gradient.copy_(
                torch.ops.aten.convolution_backward(
                    one, x, kernel, None, *rest, (False, True, False)
                )[1]
            )
        return found

    def norms(delta: Tensor, input: Tensor, shape: torch.Size) -> Tensor | None:
        own = products(delta, input, shape)
        if not own.are_rows(spatial) or not gram_is_cheaper(own.positions(), shape, groups):
            return None
        return torch.cat([gram_norms(given.mT, seen) for given, seen in own])

    return Adjoint(gradients, norms)


def _along_each(setting: Any, spatial: int) -> list[int]:
    """A number, or one in a tuple, is that of every dimension."""
    values = [setting] if isinstance(setting, int) else list(setting)
    return values * spatial if len(values) == 1 else values


#: Multiplications of an example's kernel gradient up to which a call of its own costs more.
_FEW = 2**22
#: Elements of the windows that are laid out together: they should stay in the processor's cache.
_AT_ONCE = 2**19


@dataclass(frozen=True)
class _Products:
    """A convolution's kernel gradients as products of matrices.

    Attributes:
        whole: what the kernel slides over, rows (B, n, C, ...).
        part: what it meets at each of its positions, (B, n, C', ...).
        shape: of the kernel.
        stride: along each spatial dimension, as the others.
        padding: of ``whole``.
        dilation: of the kernel.
        groups: of channels.
    """

    whole: Tensor
    part: Tensor
    shape: torch.Size
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def are_rows(self, spatial: int) -> bool:
        """Whether there is a dimension for the examples."""
        return self.part.dim() == spatial + 3

    def positions(self) -> int:
        """How many terms an entry of an example's gradient is the sum of."""
        return self.part.shape[1] * self.part.shape[3:].numel()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(b, groups, O, n T) and (b, groups, n T, *kernel I) of some examples at a time."""
        for whole, part in zip(
            *(self._split(rows) for rows in (self.whole, self.part)), strict=True
        ):
            yield self._given(part), self._seen(whole, part.shape[3:])

    def gradients(self) -> Tensor:
        """The examples' own, (B, *shape), a kernel's inputs next to each other in memory."""
        outputs, inputs, *kernel = self.shape
        found = self.part.new_empty(len(self.part), outputs, *kernel, inputs)
        for (given, seen), own in zip(self, self._split(found), strict=True):
            if given.shape[2] == 1:  # a channel of its own
                own.copy_((seen * given.mT).sum(2).view_as(own))
            else:
                product = own.view(-1, given.shape[2], seen.shape[3])
                torch.bmm(given.flatten(0, 1), seen.flatten(0, 1), out=product)
        return found.movedim(-1, 2)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Some examples at a time."""
        windows = self.positions() * self.groups * self.shape[1:].numel()
        return torch.split(rows, max(1, _AT_ONCE // windows))

    def _given(self, part: Tensor) -> Tensor:
        batch, n = part.shape[:2]
        rows = part.reshape(batch, n, self.groups, self.shape[0] // self.groups, -1)
        return rows.movedim(1, 3).flatten(3)

    def _seen(self, whole: Tensor, out: torch.Size) -> Tensor:
        """What each position sees: runs of neighbours in memory, so that they are copied fast."""
        batch, n = whole.shape[:2]
        channels, sides = self.shape[1], whole.shape[3:]
        new = whole.new_zeros if any(self.padding) else whole.new_empty
        padded = new(
            batch * n,
            self.groups,
            *(size + 2 * more for size, more in zip(sides, self.padding, strict=True)),
            channels,
        )
        middle = padded
        for dim, (size, more) in enumerate(zip(sides, self.padding, strict=True)):
            middle = middle.narrow(2 + dim, more, size)
        middle.copy_(whole.reshape(batch * n, self.groups, channels, *sides).movedim(2, -1))
        outer, inner = padded.stride()[:2], padded.stride()[2:-1]
        # (B n, groups, *out, *kernel, I)
        windows = padded.as_strided(
            (batch * n, self.groups, *out, *self.shape[2:], channels),
            (
                *outer,
                *(step * one for step, one in zip(self.stride, inner, strict=True)),
                *(step * one for step, one in zip(self.dilation, inner, strict=True)),
                1,
            ),
        )
        rows = windows.reshape(batch, n, self.groups, out.numel(), self.shape[1:].numel())
        return rows.movedim(1, 2).flatten(2, 3)


def _plain(stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Settings:
    return stride, padding, dilation, False, 0, groups


def _transposed(
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1
) -> Settings:
    return stride, padding, dilation, True, output_padding, groups


def _batched(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.dim() - (weight.dim() - 1)


_CONVOLUTIONS: dict[Callable[..., Tensor], Callable[..., Settings]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _plain),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed
    ),
}

RULES |= {f: Rule(convolution(f, settings), _batched) for f, settings in _CONVOLUTIONS.items()}
