"""The precision that kernels compute in, where results are to be equal to Pillow's."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """Double precision, in which Pillow computes, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def apart(product: Tensor) -> Tensor:
    """A product, rounded before it is added to: XLA would fuse both, which rounds once.

    A limit that nothing reaches parts them, and it cannot tell that nothing does.
    """
    return product.clamp(min=-1e38) if product.device.type == "xla" else product
