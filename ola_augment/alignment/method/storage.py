"""Formats in which pairs wait for the reference gradient."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ola_augment.alignment._torch import computes_bfloat16_on_cpu


def widen(tensor: Tensor) -> Tensor:
    """At least single precision for floating tensors, others as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def in_full_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """Without autocast on a type of device."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


class Packed(Protocol):
    """A tensor in its storage format."""

    def unpack(self) -> Tensor:
        """The tensor, in the precision to compute with."""
        ...


class Exact:
    """The tensor itself, by reference; refused if somebody wrote into it since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was modified in place since the capture.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a captured activation of shape {tuple(self.tensor.shape)} was modified in place "
                "between capture and align (a re-used input buffer?); clone it before the model "
                'reads it, or use storage="bfloat16", which keeps copies'
            )
        return widen(self.tensor)


class BFloat16:
    """Single precision rounded to bfloat16: relative error 2^-9 per element."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.to(torch.bfloat16)

    def unpack(self) -> Tensor:
        """The rounded tensor; in float32 where arithmetic in bfloat16 would be slow."""
        return self.tensor if computes_bfloat16(self.tensor.device) else self.tensor.float()


class Int8:
    """Eight bits with one scale per row and channel: absolute error 1/254 of the largest."""

    def __init__(self, tensor: Tensor) -> None:
        dims = tuple(range(2, tensor.dim())) or (tensor.dim() - 1,)
        self.scale = tensor.abs().amax(dims, keepdim=True).div_(127).clamp_(min=1e-30)
        self.levels = (tensor / self.scale).round_().to(torch.int8)

    def unpack(self) -> Tensor:
        """The nearest representable tensor in float32."""
        return self.levels * self.scale


@functools.cache
def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 (summing in float32) faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and computes_bfloat16_on_cpu()


# Only single precision is rounded: double precision is asked for by who wants exact numbers, half
# precision is small already, and integers are indices.
_FORMATS: dict[str, tuple[Callable[[Tensor], Packed], int]] = {
    "bfloat16": (BFloat16, 2),  # bytes an element
    "int8": (Int8, 1),
}
STORAGES = ("exact", *_FORMATS)
# Of a sum whose terms cancel, as behind BatchNorm; int8 was seen to be off by 0.16 in a WRN-16-4.
_ROUNDING = {"exact": 0.0, "bfloat16": 0.02, "int8": 0.4}

#: Bytes from which on a tensor is rounded; below it there is nothing to save.
_ROUNDED_FROM = 2**20


class Storage:
    """Packs tensors in one format; an input read by several layers is packed once.

    Args:
        name: one of `STORAGES`.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {name!r}")
        self.name = name
        self._format, self._bytes = _FORMATS.get(name, (Exact, 4))
        #: Relative error that rounding may add to a sum of terms.
        self.rounding = _ROUNDING[name]
        self._shared: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.name,)

    def size(self, tensor: Tensor) -> int:
        """Bytes that a tensor takes in this format."""
        return tensor.numel() * (self._bytes if self._rounds(tensor) else tensor.element_size())

    def pack(self, tensor: Tensor) -> Packed:
        """Pack one tensor."""
        return self._format(tensor) if self._rounds(tensor) else Exact(tensor)

    def _rounds(self, tensor: Tensor) -> bool:
        large = tensor.numel() * tensor.element_size() >= _ROUNDED_FROM
        return self._format is not Exact and tensor.dtype == torch.float32 and large

    def pack_shared(self, tensor: Tensor) -> Packed:
        """As `pack`, remembering a rounded copy for as long as ``tensor`` lives."""
        if not self._rounds(tensor):
            return Exact(tensor)  # remembering it would keep it alive
        packed: Packed | None = self._shared.get(tensor)  # type: ignore[no-untyped-call]
        if packed is None:
            packed = self._shared[tensor] = self.pack(tensor)
        return packed


class Detached:
    """Tensors without their graph: one object for each, so that it is packed once.

    Weak on both sides: what autograd frees during backward must go.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[_Weak, _Weak]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same values, as they are now."""
        source, kept = self._known.get(id(tensor), (_gone, _gone))
        detached = kept()
        if source() is not tensor or detached is None or detached._version != tensor._version:
            detached = tensor.detach()
            self._known[id(tensor)] = (weakref.ref(tensor), weakref.ref(detached))
        return detached


_Weak = Callable[[], Tensor | None]


def _gone() -> None:
    return None
