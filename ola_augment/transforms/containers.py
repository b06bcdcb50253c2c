"""Containers of other libraries that a transform of ours, as it is, would not do as told in."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

_CONTAINERS = "kornia.augmentation.container"


def refuse_deaf_containers(transform: object) -> None:
    """Refuse to draw for a container of kornia that asks for more than an image each.

    It hands a module that is none of its own the images alone and tells it nothing: masks, boxes
    and points would stay where they were, and what is to share a draw would not. Only the call
    stack shows it.

    Raises:
        TypeError: such a call, with the way out.
    """
    if _CONTAINERS not in sys.modules:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_CONTAINERS):
            container = frame.f_locals.get("self")
            if lost := _lost(container):
                kind = type(transform).__name__
                raise TypeError(
                    f"kornia's {type(container).__name__} gives {kind} the image alone and would "
                    f"{lost}; put ola_augment.kornia.PolicyAugmentation({kind}(...)) into it"
                )
        frame = frame.f_back


def _lost(container: Any) -> str | None:
    """What would come of a container's wishes, if it has any."""
    keys = getattr(getattr(container, "transform_op", None), "data_keys", None) or ()
    names = [key.name.lower() for key in keys]
    if unseen := [key for key in names if key not in ("input", "image", "class", "label")]:
        return f"leave {', '.join(unseen)} where they were"
    for shared, each in (("same_on_frame", "frame"), ("same_on_batch", "image")):
        if getattr(container, shared, False):
            return f"get a draw for each {each}, though {shared} is True"
    return None
