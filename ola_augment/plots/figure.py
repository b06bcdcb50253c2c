"""A figure, or what to install for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ola_augment.extras import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**settings: Any) -> Figure:
    """An empty matplotlib figure that pyplot does not know of."""
    with needs("demo"):
        from matplotlib.figure import Figure
    return Figure(**settings)
