"""The tensors that a model is called with, and what they may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def tensors_with_rows(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors of a call that may hold examples."""
    plain = not kwargs and all(isinstance(value, Tensor) for value in args)
    flat = args if plain else tree_flatten((args, kwargs))[0]
    return [value for value in flat if isinstance(value, Tensor) and value.dim()]


def _is_list_of_tensors(value: Any) -> bool:
    kind = isinstance(value, (list, tuple))
    return kind and len(value) > 0 and all(isinstance(one, Tensor) for one in value)


def check_inputs(tensors: list[Tensor]) -> None:
    """Refuse a call without a batch, or with one whose rows cannot be told apart.

    Raises:
        ValueError: naming what is wrong.
    """
    if not tensors:
        raise ValueError(
            "the model was called without a tensor: no batch to align; give it the batch as "
            "tensors, alone or in tuples, lists and dictionaries, not in an object of another kind"
        )
    for tensor in tensors:
        if tensor.is_nested or tensor.layout != torch.strided:
            raise ValueError(
                f"an input of the model is a {'nested' if tensor.is_nested else 'sparse'} "
                "tensor, whose rows cannot be told apart: pad it, or call to_dense()"
            )
    if not tensors[0].shape[0]:
        raise ValueError(f"the batch is empty: an input has shape {tuple(tensors[0].shape)}")


def refuse_other_batch(args: Any, kwargs: Any, output: Any) -> None:
    """Refuse a batch of one that came out as another one, which an argument has too.

    Or a list of as many images.
    """
    nested = tree_flatten((args, kwargs), is_leaf=_is_list_of_tensors)[0]
    lists = {len(one) for one in nested if _is_list_of_tensors(one)} - {1}
    sizes = {tensor.shape[0] for tensor in tensors_with_rows(args, kwargs)[1:]} - {1}
    for tensor in tensors_with_rows((output,), {}):
        if tensor.requires_grad and tensor.shape[0] in lists and tensor.shape[1:2] != (1,):
            raise ValueError(
                "the examples lie along dimension 0 of the first tensor that the model is called "
                f"with, which holds one; a list of {tensor.shape[0]} tensors went in and "
                f"{tensor.shape[0]} rows came out: give the model one tensor, torch.stack(images)"
            )
        if tensor.requires_grad and tensor.shape[0] in sizes:
            raise ValueError(
                "the examples lie along dimension 0 of the first tensor that the model is called "
                f"with, which holds one; {tensor.shape[0]} came out: give the batch first, or "
                "expand() the first tensor to it"
            )
