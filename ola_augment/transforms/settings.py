"""Fill and interpolation of a transform as JSON values, and back."""

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


def to_json(interpolation: InterpolationMode, fill: Any) -> dict[str, Any]:
    """JSON values of both.

    Raises:
        TypeError: a fill for a type that files do not know.
    """
    if isinstance(fill, dict):
        names = {kind: name for name, kind in _TYPES.items()} | {"others": "others"}
        if unknown := [kind for kind in fill if kind not in names]:
            raise TypeError(f"a fill for {unknown[0]!r} cannot be saved; files know {[*_TYPES]}")
        fill = {names[kind]: value for kind, value in fill.items()}
    return {"interpolation": interpolation.value, "fill": fill}


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
    return arguments
