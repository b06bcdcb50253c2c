"""Real networks, with random weights at small sizes, against forward-mode derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from alignment_oracles import by_jvp, capture, random_direction, relative_error, sum_loss
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from ola_augment.alignment import GradientAlignment

#: Architectures of torchvision; those of many weights with fewer and narrower blocks.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": models.resnet18,
    "convnext": partial(models.ConvNeXt, [CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)]),
    "vit": partial(models.VisionTransformer, 32, 8, 3, 4, 64, 128),
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "efficientnet_b0": models.efficientnet_b0,
    "regnet_y_400mf": models.regnet_y_400mf,
    "swin": partial(
        models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.2
    ),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](num_classes=5).double()


@pytest.mark.parametrize("name", MODELS)
def test_exact_per_example_in_evaluation_mode(name: str) -> None:
    model = network(name).eval()
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 4])
    g = random_direction(model)
    engine = GradientAlignment(model)
    capture(engine, model, x, y)
    assert relative_error(engine.align(g), by_jvp(model, x, y, g)) < 1e-10


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "swin"])
def test_sums_to_the_derivative_in_training_mode(name: str) -> None:
    model = network(name).train()  # BatchNorm, dropout and stochastic depth
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 4, 1])
    g = random_direction(model)
    engine = GradientAlignment(model)
    with engine.capture():
        sum_loss(model(x), y).backward()
    expected = sum((p.grad * g[name]).sum() for name, p in model.named_parameters())
    alignments = engine.align(g)
    assert abs(alignments.sum() - expected) < 1e-10 * alignments.abs().sum()
