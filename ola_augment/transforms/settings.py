"""Settings of a transform as JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode

#: Types that a fill may be given for, by their names in files.
_TYPES = {
    "PIL": PIL.Image.Image,
    "Tensor": torch.Tensor,
    "ndarray": np.ndarray,
    "Image": tv_tensors.Image,
    "Video": tv_tensors.Video,
    "Mask": tv_tensors.Mask,
}


def to_json(
    interpolation: InterpolationMode,
    fill: Any,
    value_range: tuple[float, float] | None = None,
    grey_weights: tuple[float, ...] | None = None,
) -> dict[str, Any]:
    """JSON values of all of them; what is None but the fill is left out.

    Raises:
        TypeError: a fill for a type that files do not know.
    """
    if isinstance(fill, dict):
        names = {kind: name for name, kind in _TYPES.items()} | {"others": "others"}
        if unknown := [kind for kind in fill if kind not in names]:
            raise TypeError(f"a fill for {unknown[0]!r} cannot be saved; files know {[*_TYPES]}")
        fill = {names[kind]: value for kind, value in fill.items()}
    settings = {"interpolation": interpolation.value, "fill": fill}
    given = {"value_range": value_range, "grey_weights": grey_weights}
    return settings | {name: list(value) for name, value in given.items() if value is not None}


def from_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a transform; what is not there is left out.

    Raises:
        TypeError, ValueError: values that :func:`to_json` does not write.
    """
    arguments: dict[str, Any] = {}
    if "interpolation" in settings:
        arguments["interpolation"] = InterpolationMode(settings["interpolation"])
    if "fill" in settings:
        fill = settings["fill"]
        if isinstance(fill, dict):
            known: dict[str, Any] = {**_TYPES, "others": "others"}
            if unknown := fill.keys() - known.keys():
                raise ValueError(f"fill is for unknown types {sorted(unknown)}")
            fill = {known[name]: value for name, value in fill.items()}
        arguments["fill"] = tuple(fill) if isinstance(fill, list) else fill
    for name in ("value_range", "grey_weights"):
        if name in settings:
            arguments[name] = settings[name]
    return arguments
