"""Write the table of torchvision's checks.

    python docs/torchvision_table.py

The checks are those of ``tests/torchvision_contract.py``, run here against both packages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from torchvision_contract import CHECKS, OURS, THEIRS, summary

TARGET = Path(__file__).with_name("_torchvision_table.md")


def version() -> str:
    """Of torchvision, without patch level and build."""
    return ".".join(torchvision.__version__.split(".")[:2])


def table() -> str:
    """All rows, in Markdown."""
    rows = [("", "`ola_augment`", f"torchvision {version()}"), ("---",) * 3]
    rows += [(sentence, summary(sentence, OURS), summary(sentence, THEIRS)) for sentence in CHECKS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
