"""Blocks after which a model is as it was: its weights, its buffers, its dropout, its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ola_augment.alignment._fsdp import at_rest
from ola_augment.alignment.proof import all_parameters


def kept_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that gives a model's buffers the values of now."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)

    return restore


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """A block that leaves the buffers as they were: running means of BatchNorm, counts."""
    restore = kept_buffers(model)
    try:
        yield
    finally:
        restore()


@contextmanager
def other_weights(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which the parameters have other values, given by their names."""
    parameters = all_parameters(model)
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def put(weights: Mapping[str, Tensor]) -> None:
        at_rest(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    try:
        put(values)
        yield
    finally:
        put(own)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """A block in which nothing is dropped, and BatchNorm goes on as in training."""
    kind = nn.modules.dropout._DropoutNd
    dropouts = [part for part in model.modules() if isinstance(part, kind) and part.training]
    for part in dropouts:
        part.training = False
    try:
        yield
    finally:
        for part in dropouts:
            part.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in evaluation mode; then each part has its own mode again, a frozen one too."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for part, training in modes:
            part.training = training
