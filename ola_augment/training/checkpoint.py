"""Checkpoints of a run: everything random and everything learned, never half written."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ola_augment.files import write_atomically

_FORMAT = "ola_augment/checkpoint/1"


def random_states(generators: Iterable[torch.Generator]) -> dict[str, Any]:
    """States of torch, NumPy and Python, of all CUDA devices, and of generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_states(states: Mapping[str, Any], generators: Iterable[torch.Generator]) -> None:
    """Restore :func:`random_states`.

    Raises:
        ValueError: states of another number of generators.
    """
    generators = list(generators)
    if len(states["generators"]) != len(generators):
        raise ValueError(
            f"the checkpoint has {len(states['generators'])} generators, this run {len(generators)}"
        )
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, state in zip(generators, states["generators"], strict=True):
        generator.set_state(state)


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write plain data and tensors so that the file is the old one or the new one, whole."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read :func:`save_checkpoint`, without pickled code.

    Raises:
        ValueError: not such a file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever torch raises on bytes that are not its own
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of the format {_FORMAT!r}")
    return content
