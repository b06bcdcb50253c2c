"""What FSDP2 made of a model: its groups of parameters, and the forms that are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def is_shard(value: object) -> bool:
    """Whether it is a tensor of which every process has a part (a DTensor)."""
    return hasattr(value, "placements")


def most_rows(shard: Any) -> int:
    """Rows of a parameter that each process has, but for the last ones, which may have fewer."""
    rows: int = -(-shard.shape[0] // shard.device_mesh.size())
    return rows


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share a model's parameters."""
    return bool(states(model.modules()))


def states(modules: Iterable[nn.Module]) -> list[Any]:
    """FSDP2's own states of modules that were given to ``fully_shard``; imports no FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return []
    return [one._get_fsdp_state() for one in modules if isinstance(one, kind)]


def shards_of(modules: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    """For each parameter, by its id, whole or not, the one that the optimizer has."""
    found = {}
    for state in states(modules):
        for group in groups_of(state):
            for one in group.fsdp_params:
                found[id(one.sharded_param)] = one.sharded_param
                if hasattr(one, "_unsharded_param"):
                    found[id(one._unsharded_param)] = one.sharded_param
    return found


def refusal(model: nn.Module) -> str | None:
    """Why a model with sharded parameters cannot be aligned; None where it can, or has none."""
    modules = dict(model.named_modules())
    if not states(modules.values()):
        for name, parameter in model.named_parameters():
            if is_shard(parameter):
                return (
                    f"parameter {name!r} is sharded over processes (tensor parallel: a DTensor "
                    "that fully_shard did not make), and what its layer does with the examples "
                    "cannot be followed: where it is frozen give the engine the plain part of the "
                    "model alone, and call the sharded part before it; else use "
                    "DistributedDataParallel"
                )
        return None
    reason = _reason(model, modules)
    return reason and (
        f"the model is sharded over processes in a way that cannot be aligned: {reason}; call "
        "fully_shard(module) on parts of the model and then on the model itself, over all "
        "processes, or use DistributedDataParallel"
    )


def _reason(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    if not states([model]):
        return "a part of the model was given to fully_shard, and the model itself was not"
    for state in states(modules.values()):
        if reason := _refused(state):
            return reason
    managed = shards_of(modules.values())
    for name, parameter in model.named_parameters():
        if id(parameter) not in managed:
            return f"parameter {name!r} is one that fully_shard ignores, which no process averages"
    return None


def _refused(state: Any) -> str | None:
    """Why what one call of ``fully_shard`` made cannot be aligned."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.tensor import Shard

    groups = groups_of(state)
    if groups is _UNKNOWN:
        return f"this version of torch ({torch.__version__}) keeps its groups elsewhere"
    if len(state._modules) != 1 or len(groups) > 1:
        return "fully_shard was given a list of modules, or meshes of their own for parameters"
    for group in groups:
        mesh = group.fsdp_params[0].sharded_param.device_mesh
        if mesh.ndim != 1 or type(group.mesh_info).__name__ != "FSDPMeshInfo":
            return "its mesh has two dimensions, or copies parameters (HSDP)"
        if mesh.size() != dist.get_world_size():
            return "its mesh holds some of the processes only"
        if isinstance(group.offload_policy, CPUOffloadPolicy):
            return "its parameters are offloaded to the CPU"
        if group.post_forward_mesh_info not in (None, group.mesh_info):
            return "reshard_after_forward is a number of processes"
        for one in group.fsdp_params:
            if tuple(one.sharded_param.placements) != (Shard(0),):
                return "shard_placement_fn shards along another dimension than the first"
            if hasattr(one.sharded_param.to_local(), "fsdp_pre_all_gather"):
                return "its parameters are gathered in a format of their own"
    return None


_UNKNOWN: list[Any] = []


def groups_of(state: Any) -> list[Any]:
    """FSDP's own groups of one of its states."""
    groups: list[Any] = getattr(state, "_fsdp_param_groups", _UNKNOWN)
    return groups


def left_alone(model: nn.Module) -> dict[int, object]:
    """By their ids, what a copy of the model's state may not touch: parameters come and go."""
    alone: list[object] = []
    for state in states(model.modules()):
        for group in groups_of(state):
            for one in group.fsdp_params:
                alone += [one.sharded_param, getattr(one, "_unsharded_param", None)]
                alone += [owner._parameters for owner in _owners(one)]
    return {id(one): one for one in alone}


def _owners(entry: Any) -> list[nn.Module]:
    info = entry._module_info
    return [info.module, *info.shared_modules]


def is_machinery(value: object) -> bool:
    """Whether an object is torch.distributed's own, or ours, and no part of a model."""
    home = type(value).__module__
    return home.startswith(_MACHINERY) and not isinstance(value, nn.Module)


_MACHINERY = ("torch.distributed", "ola_augment.alignment")
