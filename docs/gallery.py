"""The pictures of the gallery: figures that a script has as variables, pyplot's or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figures that a block made, and show them under it."""
    variables = block_vars["example_globals"]
    shown = variables.setdefault("__shown__", [])
    paths = []
    for value in list(variables.values()):
        if isinstance(value, Figure) and not any(value is one for one in shown):
            shown.append(value)
            paths.append(next(block_vars["image_path_iterator"]))
            value.savefig(paths[-1], dpi=100)
    return figure_rst(paths, gallery_conf["src_dir"]) if paths else ""


def _get_sg_image_scraper() -> Callable[..., str]:
    return scrape
