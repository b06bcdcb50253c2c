"""What ranks of ``torch.distributed`` have in common: sums, decisions, a policy each."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor
from torch import distributed as dist

from ola_augment.alignment._torch import gather_single
from ola_augment.logits import LogitsModule
from ola_augment.streams import rank_here, world_size

#: Numbers that travel in one message: as much again as they take is needed for it.
_BUCKET = 2**23
#: Whether all ranks are doing the same with the same numbers.
_ALIKE: ContextVar[bool] = ContextVar("alike", default=False)


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """A block in which every rank has all examples: sums and decisions need no message."""
    token = _ALIKE.set(True)
    try:
        yield
    finally:
        _ALIKE.reset(token)


def _summed() -> int:
    """Number of ranks whose values make a sum."""
    return 1 if _ALIKE.get() else world_size()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all ranks; the values themselves in a single process."""
    ranks = _summed()
    return values if ranks == 1 else sum_over_ranks(values) / ranks


def all_ranks(okay: bool, device: torch.device) -> bool:
    """Whether it is true on every rank: none goes a way of its own."""
    if _summed() == 1:  # without a word to the device
        return okay
    return not float(sum_over_ranks(torch.tensor(not okay, dtype=torch.float32, device=device)))


def most_of_ranks(count: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    told = gather_over_ranks(torch.tensor([count], device="cpu"), device)
    return max(int(one) for one in told)


def shared_outcome(bad: bool, count: int, device: torch.device) -> tuple[bool, int]:
    """Whether it is bad on any rank, and the sum of the counts, in one message."""
    if world_size() == 1:  # without a word to the device
        return bad, count
    told = sum_over_ranks(torch.tensor([bad, count], dtype=torch.float32, device=device))
    return bool(told[0]), int(told[1])


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all ranks of ``torch.distributed``; the values themselves in a single process.

    On the device of the values, or on one that the process group can reduce: NCCL takes no tensors
    of the CPU.
    """
    if _summed() == 1:
        return values
    total = values.to(_reducible(values.device), copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def sums_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """Sums of many tensors, in few messages.

    Args:
        values: any number, of any shapes.

    Returns:
        Tensors of their shapes; the values themselves in a single process.
    """
    if _summed() == 1:
        return list(values)
    found: list[Tensor] = []
    for _, group in itertools.groupby(values, lambda value: (value.dtype, value.device)):
        bucket: list[Tensor] = []
        waiting = list(group)
        while waiting:
            bucket.append(waiting.pop(0))
            if waiting and sum(part.numel() for part in bucket) < _BUCKET:
                continue
            total = sum_over_ranks(torch.cat([part.reshape(-1) for part in bucket]))
            parts = torch.split(total, [part.numel() for part in bucket])
            found += [part.view(old.shape) for part, old in zip(parts, bucket, strict=True)]
            bucket = []
    return found


def means_over_ranks(values: Sequence[Tensor], examples: int) -> list[Tensor]:
    """Means of many tensors over the examples of all ranks, in few messages.

    Args:
        values: means over the examples of this rank, of any shapes.
        examples: their number.

    Returns:
        Tensors of their shapes; the values themselves in a single process.
    """
    if _summed() == 1 or not values:
        return list(values)
    count = torch.tensor(float(examples), dtype=torch.float32, device=values[-1].device)
    *totals, everywhere = sums_over_ranks([*(value * examples for value in values), count])
    return [(total / everywhere).to(total.dtype) for total in totals]


def gather_over_ranks(values: Tensor, device: torch.device) -> list[Tensor]:
    """The values of every rank, in their order.

    Args:
        values: a tensor of the CPU, of one shape on all ranks.
        device: of the model; they travel there, or where the process group can gather.

    Returns:
        Tensors of the CPU.
    """
    sent = values.to(_reducible(device))
    found = sent.new_empty(world_size(), *sent.shape)
    gather_single(found, sent.unsqueeze(0))
    return list(found.cpu())


def own_policy(policy: object) -> None:
    """Make this process the one in which a policy learns, before its first update.

    Ranks that were started after the policy was made (``mp.spawn``, fork) share its memory, as
    DataLoader workers have to: each gets logits of its own. Rank 0 keeps that memory, where its
    parent finds what was learned.
    """
    if isinstance(policy, LogitsModule):
        policy.learns_here(alone=world_size() > 1 and rank_here() > 0)


def refuse_join(model: object) -> None:
    """Refuse a model under ``torch.distributed.algorithms.Join``.

    Ranks that have run out of batches answer the others' reductions of gradients, and no other sum.

    Raises:
        RuntimeError: the model is inside such a context.
    """
    config = getattr(model, "_join_config", None)
    if config is not None and config.enable:
        raise RuntimeError(
            "a policy cannot learn inside Join (model.join()): ranks that have run out of batches "
            "take no part in its sums. Give all ranks as many batches, as DistributedSampler does"
        )


def _reducible(device: torch.device) -> torch.device:
    kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    if device.type in kinds or not kinds[0]:
        return device
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
