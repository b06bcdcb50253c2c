"""Pillow's own results for batches of tensors; the operations are those of the benchmark's loop."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.space import SearchSpace

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

from pillow_loop import PILLOW, pillow_chains, to_array, to_pil

__all__ = ["PILLOW", "draw", "one_operation", "pillow_apply", "to_array", "to_pil"]


def pillow_apply(
    images: Tensor,
    space: SearchSpace,
    actions: Actions,
    bilinear: bool = False,
    fill: Sequence[int] | None = None,
) -> Tensor:
    """What ``apply_actions`` must return for (B, C, H, W) uint8 images."""
    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.NEAREST
    color = None if fill is None else tuple(fill) if len(fill) > 1 else fill[0]
    chains = pillow_chains(
        [to_pil(image) for image in images.numpy()], space, actions, resample, color
    )
    return torch.from_numpy(np.stack([to_array(image) for image in chains]))


def one_operation(
    batch_size: int, op: int, magnitude_bin: int, sign: int = 1, seed: int = 0
) -> Actions:
    """The same operation for every example, cutouts at random centres."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 1)
    return Actions(
        num_ops=torch.ones(batch_size, dtype=torch.int64),
        ops=torch.full(shape, op),
        keep=torch.ones(shape, dtype=torch.bool),
        magnitude_bins=torch.full(shape, magnitude_bin),
        signs=torch.full(shape, sign, dtype=torch.int8),
        centers=torch.rand(*shape, 2, generator=generator),
        log_prob=torch.zeros(batch_size),
    )


def draw(
    space: SearchSpace, batch_size: int, slots: int, seed: int = 0, keep_prob: float = 1.0
) -> Actions:
    """Distinct operations for every example, everything else uniform."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, slots)
    scores = torch.rand(batch_size, len(space), generator=generator)
    return Actions(
        num_ops=torch.full((batch_size,), slots),
        ops=scores.argsort(1)[:, :slots].contiguous(),
        keep=torch.rand(shape, generator=generator) < keep_prob,
        magnitude_bins=torch.randint(space.num_magnitude_bins, shape, generator=generator),
        signs=torch.randint(2, shape, generator=generator).to(torch.int8) * 2 - 1,
        centers=torch.rand(*shape, 2, generator=generator),
        log_prob=torch.zeros(batch_size),
    )
