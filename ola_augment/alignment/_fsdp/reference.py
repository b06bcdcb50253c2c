"""A reference gradient in shards, whole where a backward pass needs it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment._fsdp.forms import most_rows
from ola_augment.alignment._torch import gather_single


class Along(Mapping[str, Tensor]):
    """A reference gradient in shards, whole for the group that a backward pass is in.

    Args:
        shards: parameter name -> DTensor, laid out as the parameter is.
    """

    def __init__(self, shards: Mapping[str, Any]) -> None:
        self._shards = shards
        self._parts: dict[str, Tensor] = {}  # (processes, numel of a part and its padding)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shards:
            raise KeyError(name)
        if name not in self._parts:
            raise RuntimeError(
                f"parameter {name!r} is used outside of the passes of the module that was given to "
                "fully_shard with it: call it inside of that module's forward"
            )
        shape = self._shards[name].shape
        whole: Tensor = self._parts[name].reshape(-1, *shape[1:])[: shape[0]]
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def gather(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Make a group's part whole, on all processes at once.

        Args:
            dtypes: of its parameters as they are used, by name.
        """
        waiting: dict[torch.dtype, dict[str, Any]] = {}
        for name, dtype in dtypes.items():
            if name not in self._shards or name in self._parts:
                continue
            bucket = waiting.setdefault(dtype, {})
            bucket[name] = self._shards[name]
            if sum(one.numel() for one in bucket.values()) >= _BUCKET:  # the same on all
                self._parts |= _gathered(waiting.pop(dtype), dtype)
        for dtype, bucket in waiting.items():
            self._parts |= _gathered(bucket, dtype)

    def release(self, names: Collection[str]) -> None:
        """Let go of a group's part."""
        for name in names:
            self._parts.pop(name, None)

    def not_finite(self) -> list[str]:
        """Names of those of which this process's part is not finite."""
        shards = self._shards.items()
        return [name for name, one in shards if not bool(one.to_local().isfinite().all())]


#: Numbers of all processes that one message gathers: of its own each needs a copy meanwhile.
_BUCKET = 2**21


def _gathered(shards: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts that all processes have of tensors along dimension 0, in one message."""
    mesh = next(iter(shards.values())).device_mesh
    sizes = [most_rows(one) * math.prod(one.shape[1:]) for one in shards.values()]
    local = [one.to_local().detach() for one in shards.values()]
    sent = local[0].new_zeros(sum(sizes), dtype=dtype)
    for part, own in zip(torch.split(sent, sizes), local, strict=True):
        part[: own.numel()].copy_(own.reshape(-1))
    found = sent.new_empty(mesh.size(), len(sent))
    gather_single(found.view(-1), sent, mesh.get_group())
    return dict(zip(shards, torch.split(found, sizes, 1), strict=True))
