"""Functions that are run as the calls they are made of, where parameters meet data in them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.registry import COMPOSITES


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V, as torch's documentation of the fused function has it.

    The same numbers up to rounding, and at the memory of the unfused kernel: only attention whose
    query, key, value or bias is made of parameters comes here.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, -3)
        value = value.repeat_interleave(groups, -3)
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.dropout(scores.softmax(-1), dropout_p, True) @ value


def broadcast_tensors(*tensors: Tensor) -> list[Tensor]:
    """Each on its own: one tensor's values do not matter to the others."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    return [tensor.expand(shape) for tensor in tensors]


COMPOSITES |= {
    F.scaled_dot_product_attention: attention,
    torch.broadcast_tensors: broadcast_tensors,
}
