"""The images of the benchmarks."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor


def crops(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8, from two photographs."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    result = []
    for i in range(count):
        photograph = photographs[i % 2]
        top, left = (generator.integers(size - side + 1) for size in photograph.shape[:2])
        result.append(photograph[top : top + side, left : left + side].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(result)).contiguous()
