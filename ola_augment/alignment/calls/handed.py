"""What calls that nobody watches hand on: tensors that stand for those that went in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ola_augment.alignment._torch import function_modes, in_backward
from ola_augment.alignment.calls.watch import Watch


def innermost() -> Watch[Any] | None:
    """What watches the calls that are made now; None: nothing, or it rests."""
    found = [mode for mode in function_modes() if isinstance(mode, Watch)]
    return found[-1] if found and not found[-1].paused and not in_backward() else None


def carry(watch: Watch[Any], given: Any, result: Any) -> None:
    """What came out is what went in, one by one, perhaps in another type.

    Args:
        watch: of the tensors.
        given: nested tensors.
        result: the same structure.

    Raises:
        RuntimeError: it is another one.
    """
    before, after = tree_leaves(given), tree_leaves(result)
    if len(before) != len(after):
        raise RuntimeError("what a module is given, or gives, changes its structure on the way")
    for one, other in zip(before, after, strict=True):
        if one is other or not isinstance(one, Tensor):
            continue
        if (origin := watch.origin(one)) is not None:
            watch.mark((other,), origin)
        elif (node := watch.node(one)) is not None:
            watch.stands_for(other, node)
