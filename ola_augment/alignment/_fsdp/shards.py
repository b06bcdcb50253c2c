"""Weights and gradients between steps, of which every process has a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ola_augment.alignment._fsdp.forms import groups_of, is_shard, most_rows, states
from ola_augment.alignment._fsdp.passes import Sharded


def own_part(value: Any) -> Tensor:
    """This process's part of a shard; of a tensor that is none all of it."""
    part: Tensor = value.to_local() if is_shard(value) else value
    return part


def at_rest(model: nn.Module) -> None:
    """Free what an evaluation left whole: FSDP2 keeps its root's parameters for a backward."""
    for state in states(model.modules()):
        for group in groups_of(state):
            if group.is_unsharded:
                group.reshard()


def averaged_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of a loss, averaged over all processes, in shards, by parameter name.

    The parameters' own ``.grad`` stay as they are, and no hook of the user's runs.

    Args:
        model: under ``fully_shard``.
        loss: called once, on every process.
    """
    entries = Sharded(model).entries()
    switches: list[tuple[Any, str, Any]] = []
    for state in states(model.modules()):
        switches.append((state._state_ctx, "is_last_backward", True))
        for group in groups_of(state):
            switches += [(group, "reduce_grads", True), (group, "reshard_after_backward", True)]
    for one in entries.values():
        shard, whole = one.sharded_param, getattr(one, "_unsharded_param", None)
        switches += [(shard, "grad", None), (shard, "_post_accumulate_grad_hooks", None)]
        switches += [(one, "unsharded_accumulated_grad", None)]
        switches += [] if whole is None else [(whole, "grad", None)]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        loss().backward()  # type: ignore[no-untyped-call]
        found = {name: one.sharded_param.grad for name, one in entries.items()}
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def to_whole(value: Tensor) -> Tensor:
    """A copy of a tensor, whole on all processes where they share it."""
    shared: Any = value
    found: Tensor = shared.full_tensor() if is_shard(value) else value.clone()
    return found


def to_shard(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor as ``like``, of which this process may have a part."""
    shard: Any = like
    if not is_shard(like):
        return value.to(like, copy=True)
    from torch.distributed.tensor import DTensor

    mesh = shard.device_mesh
    rows = most_rows(shard)
    start = rows * mesh.get_local_rank()
    own = value[start : start + rows].to(shard.device, shard.dtype, copy=True)
    return DTensor.from_local(
        own, mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )
