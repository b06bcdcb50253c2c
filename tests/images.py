"""Images to test operations on: (B, C, H, W) uint8 batches, the same in every run."""

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor


@lru_cache(maxsize=1)
def photographs() -> Tensor:
    """The two photographs of scikit-learn, (2, 3, 427, 640)."""
    return torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)


def crops(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Crops of the photographs, every other one of a 4 times larger part."""
    generator = np.random.default_rng(seed)
    result = []
    for i in range(count):
        step = 1 + 3 * (i % 2)
        photograph = photographs()[i // 2 % 2]
        top = generator.integers(photograph.shape[1] - step * height + 1)
        left = generator.integers(photograph.shape[2] - step * width + 1)
        crop = photograph[:, top : top + step * height : step, left : left + step * width : step]
        result.append(crop)
    return torch.stack(result)


def patterns(height: int, width: int, seed: int = 0) -> Tensor:
    """What photographs do not show: flat, one-colour, checkered, noisy, narrow-range images."""
    generator = np.random.default_rng(seed)
    flat = [np.full((3, height, width), v) for v in (0, 1, 127, 255)]
    colors = [np.broadcast_to(np.array(rgb)[:, None, None], (3, height, width))
              for rgb in ((255, 0, 0), (0, 255, 0), (3, 77, 254))]  # fmt: skip
    rows, columns = np.indices((height, width))
    checkers = [
        np.broadcast_to(((rows // size + columns // size) % 2) * high, (3, height, width))
        for size, high in ((1, 255), (2, 255), (3, 9))
    ]
    noise = [generator.integers(0, 256, (3, height, width)) for _ in range(2)]
    narrow = [generator.integers(low, high, (3, height, width))
              for low, high in ((100, 103), (0, 2), (254, 256))]  # fmt: skip
    ramp = [np.broadcast_to(np.arange(height * width).reshape(height, width) % 256,
                            (3, height, width))]  # fmt: skip
    images = flat + colors + checkers + noise + narrow + ramp
    return torch.from_numpy(np.stack(images).astype(np.uint8))


def assorted(channels: int = 3) -> list[Tensor]:
    """More than 200 images in batches of one size each, most of them small."""
    batches = [
        torch.cat([crops(80, 16, 16), patterns(16, 16)]),
        torch.cat([crops(16, 32, 32, seed=1), patterns(32, 32)[:4]]),
        torch.cat([crops(10, 24, 40, seed=2), patterns(24, 40)[7:12]]),
        crops(2, 64, 48, seed=3),
        *(
            torch.cat([crops(4, height, width, seed=height), patterns(height, width)[9:14]])
            for height, width in ((1, 1), (1, 17), (23, 1), (2, 3), (3, 3), (5, 4), (6, 7), (4, 9))
        ),
    ]
    return [batch[:, :channels].contiguous() for batch in batches]
