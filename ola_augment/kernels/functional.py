"""Inside of the transforms of ``torch.func``, where tensors are wrapped and have no memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Private in torch: which tensors are wrapped, and how to compute beside the transforms.
_functorch = torch._C._functorch


def beside() -> AbstractContextManager[object]:
    """Within it tensors that are made are plain ones, as numbers that are no images must be."""
    if _functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return torch._C._DisableFuncTorch()


def unwrapped(values: Tensor) -> Tensor:
    """The tensor that ``grad``, ``vjp`` or ``jvp`` has wrapped; any other as it is.

    Raises:
        TypeError: inside of ``vmap``, where there is one tensor for many.
    """
    while _functorch.is_functorch_wrapped_tensor(values):
        if _functorch.is_batchedtensor(values):
            raise TypeError(
                "images inside of torch.func.vmap cannot be augmented, as what each of them draws "
                "differs: augment the whole batch before vmap, which may have several dimensions "
                "(..., C, H, W)"
            )
        values = _functorch.get_unwrapped(values)
    return values
