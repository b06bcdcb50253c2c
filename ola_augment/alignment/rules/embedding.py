"""Embedding tables: y = W[indices], so <d l_i / d W, g> = <delta_i, g[indices_i]>."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.rules.rule import Rule, Use, pair


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Use]:
    """The row of ``padding_idx`` receives no gradient."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise RuntimeError(
            "embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be aligned "
            "exactly; use an embedding without them"
        )
    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def rows(indices: Tensor, w: Tensor) -> Tensor:
        out = F.embedding(indices, w)
        return out if padding is None else out * (indices != padding).unsqueeze(-1)

    yield weight, pair(rows, input)


def _indices(input: Tensor, *_: Any, **__: Any) -> int:
    return input.dim()


RULES: dict[Callable[..., Any], Rule] = {F.embedding: Rule(embedding, _indices)}
