"""Other batches of the same kind: examples rolled, or some of them replaced by others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

#: Up to so many examples all sets are looked at from the start: they are four at most.
TOLD_APART = 6


def sets_of(batch: int, seed: int = 0) -> list[Tensor]:
    """Which examples to change in each run, (batch,) bool.

    Every example is changed in half of the runs, up to six in an order of their own, more in one
    drawn from the seed. Up to 70 examples any two differ, so that a run changes the one and not
    the other, both ways; of more, two are the same with probability 1/70, and others when the
    verification is repeated. No shift of the batch maps the first set to itself: what treats all
    examples alike, and mixes each with another, is seen in it.
    """
    runs = next((n for n in range(2, 8) if math.comb(n, n // 2) >= batch), 8)
    codes = [code for code in range(2**runs) if code.bit_count() == runs // 2]
    if batch <= TOLD_APART:
        chosen = codes[:batch]
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = [0]
        while _repeats([code & 1 for code in chosen]):
            size = -(-batch // len(codes)) * len(codes)
            order = torch.randperm(size, generator=generator, device="cpu")
            chosen = [codes[i % len(codes)] for i in order[:batch].tolist()]
    return [
        torch.tensor([bool(code >> run & 1) for code in chosen], device="cpu")
        for run in range(runs)
    ]


def weights_of(batch: int, seed: int = 0) -> Tensor:
    """A power of two, with a sign, for each example: (batch,).

    What is linear in each example's weight, and in no other's, is multiplied by it to the last bit.
    Up to 26 examples no two have the same, of more those drawn from the seed.
    """
    powers = 2.0 ** torch.arange(-6, 7, device="cpu")
    values = torch.cat([powers, -powers])
    generator = torch.Generator().manual_seed(seed)
    times = -(-batch // len(values))
    order = [torch.randperm(len(values), generator=generator, device="cpu") for _ in range(times)]
    return values[torch.cat(order)[:batch]]


def _repeats(values: list[int]) -> bool:
    """Whether a shift by less than their number maps the values to themselves, or all are equal."""
    return len(set(values)) < 2 or any(
        values == values[shift:] + values[:shift]
        for shift in range(1, len(values) // 2 + 1)
        if len(values) % shift == 0
    )


def tensors_of(arguments: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [value for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)]


def reordered(args: Any, kwargs: Any, order: Tensor) -> Any:
    """The arguments with their examples in another order."""

    def reorder(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != order.shape:
            return tensor
        return tensor.detach()[order.to(tensor.device)].requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, reorder, (args, kwargs))


def changes(args: Any, kwargs: Any, chosen: Tensor) -> Iterator[Any]:
    """Ways to replace the chosen examples: by one other, which moves means far, or by the next.

    The last resort, where that removes the only ones that need a mask, say: by each other.
    """
    batch = len(chosen)
    others = (~chosen).nonzero().flatten().tolist()
    for other in (others[0], others[-1]):
        yield _change(
            args, kwargs, chosen, torch.where(chosen, other, torch.arange(batch, device="cpu"))
        )
    flat = [t for t in tensors_of((args, kwargs)) if t.shape[:1] == (batch,)]
    following = torch.arange(batch, device="cpu")
    for example in chosen.nonzero().flatten().tolist():
        following[example] = next(
            (
                other % batch
                for other in range(example + 1, example + batch)
                if not all(torch.equal(t[other % batch], t[example]) for t in flat)
            ),
            example,
        )
    yield _change(args, kwargs, chosen, following)
    among = torch.arange(batch, device="cpu")
    among[chosen] = among[chosen].roll(1)
    yield _change(args, kwargs, chosen, among)


def _change(args: Any, kwargs: Any, chosen: Tensor, order: Tensor) -> Any:
    """The arguments with each chosen example replaced by that at ``order``.

    Examples that are equal to it are changed in another way.
    """
    batch = len(chosen)
    alike = chosen.clone()
    for tensor in tensors_of((args, kwargs)):
        if tensor.shape[:1] == (batch,):
            same = tensor == tensor[order.to(tensor.device)]
            alike &= same.reshape(batch, tensor[0].numel()).all(1).to(alike.device)

    def change(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != (batch,):
            return tensor
        changed = tensor.detach()[order.to(tensor.device)].clone()
        rows = alike.to(tensor.device)
        if alike.any() and (tensor.is_floating_point() or tensor.is_complex()):
            changed[rows] = changed[rows] * 0.5 + 0.25
        elif alike.any():
            changed[rows] = torch.stack([_other_indices(row) for row in changed[rows]])
        return changed.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, change, (args, kwargs))


def _other_indices(row: Tensor) -> Tensor:
    """Other integers, that lie where the row's own do."""
    if row.dtype == torch.bool:
        return ~row
    rolled = row.flatten().roll(1).view_as(row)
    return rolled if not torch.equal(rolled, row) else torch.where(row == 0, 1, row - 1)
