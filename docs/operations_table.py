"""Write the table of built-in operations.

    python docs/operations_table.py

The rows are those of ``ola_augment.kernels.table``, the ranges those of the two search spaces.
"""

from __future__ import annotations

from pathlib import Path

from ola_augment import SearchSpace
from ola_augment.kernels.table import TABLE, Row

TARGET = Path(__file__).with_name("_operations_table.md")
HEAD = ("operation", "RandAugment space", "WideLong space", "Pillow", "float bound", "gradient")


def magnitudes(row: Row, space: SearchSpace) -> str:
    """Both ends of an operation's magnitudes in a space."""
    operation = {operation.name: operation for operation in space.operations}.get(row.name)
    if operation is None:
        return ""
    if operation.low is None:
        return "-"
    unit = f" {row.unit}".rstrip() + (f" of {operation.per}" if operation.side else "")
    unit += f" (of any larger side, too: up_to={operation.up_to})" if operation.up_to else ""
    sign = "± " if operation.signed else ""
    whole = ", whole" if operation.integer else ""
    return f"{sign}{operation.low:g} .. {operation.high:g}{unit}{whole}"


def table() -> str:
    """All rows, in Markdown."""
    spaces = SearchSpace.rand_augment(), SearchSpace.wide_long()
    rows = [HEAD, ("---",) * len(HEAD)]
    for row in TABLE.values():
        ranges = (magnitudes(row, space) for space in spaces)
        gradient = "yes" if row.gradient else "zero"
        rows.append((row.name, *ranges, row.pillow, f"{row.bound:g}", gradient))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
