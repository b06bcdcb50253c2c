"""Containers of other libraries that would leave annotations behind."""

from __future__ import annotations

import sys
from types import FrameType

_CONTAINER = "kornia.augmentation.container.augment"


def refuse_unseen_annotations(transform: object) -> None:
    """Refuse to draw for kornia's ``AugmentationSequential`` when it holds masks, boxes or points.

    It hands a module that is none of its own the image alone, asks nothing of it, and leaves the
    annotations where they were: only the call stack shows them.

    Raises:
        TypeError: such a call, with the way out.
    """
    if _CONTAINER not in sys.modules:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _CONTAINER and frame.f_code.co_name == "forward":
            keys = [key.name.lower() for key in frame.f_locals["self"].transform_op.data_keys or ()]
            unseen = [key for key in keys if key not in ("input", "image", "class", "label")]
            if unseen:
                kind = type(transform).__name__
                raise TypeError(
                    f"kornia's AugmentationSequential gives {kind} the image alone and would leave "
                    f"{', '.join(unseen)} where they were; put "
                    f"ola_augment.kornia.PolicyAugmentation({kind}(...)) into it"
                )
        frame = frame.f_back
