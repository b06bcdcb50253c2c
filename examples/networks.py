"""Networks for the examples and benchmarks; none of them is part of the package."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three strided convolutions with GroupNorm: trains on some hundred images within seconds."""

    def __init__(self, num_classes: int, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 5, padding=2, stride=2)
        self.norm1 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.norm2 = nn.GroupNorm(8, 2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2)
        self.norm3 = nn.GroupNorm(8, 2 * width)
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(images)))
        out = F.relu(self.norm2(self.conv2(out)))
        out = F.relu(self.norm3(self.conv3(out)))
        return self.linear(out.mean((2, 3)))


class _WideBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        active = F.relu(self.norm1(inputs))
        out = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (inputs if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis, 2016) for 32x32 images."""

    def __init__(self, depth: int, width: int, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth of a WRN must be 6 n + 4, got {depth}")
        if width < 1:
            raise ValueError(f"width of a WRN must be at least 1, got {width}")
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for group, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            for block in range((depth - 4) // 6):
                stride = 2 if group > 0 and block == 0 else 1
                blocks.append(_WideBlock(outputs if block else inputs, outputs, stride))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.norm(self.blocks(self.conv(images))))
        return self.linear(out.mean((2, 3)))


def make_network(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """Build ``small_cnn``, ``wrn-DEPTH-WIDTH`` or any classification model of torchvision.

    Raises:
        ValueError: an unknown name.
    """
    if name == "small_cnn":
        return SmallCNN(num_classes, channels)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return WideResNet(int(match[1]), int(match[2]), num_classes, channels)
    from torchvision import models

    makers: dict[str, Callable[..., nn.Module]] = {
        known: models.get_model_builder(known) for known in models.list_models(models)
    }
    if name not in makers:
        raise ValueError(
            f"unknown model {name!r}; known are small_cnn, wrn-DEPTH-WIDTH (wrn-16-4, wrn-28-10) "
            f"and torchvision's: {', '.join(makers)}"
        )
    return makers[name](weights=None, num_classes=num_classes)
