"""Draw the picture of docs/results.md from the runs of ``comparison.py``.

python examples/results_figures.py --results docs/results_runs.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from beds import BEDS
from comparison import COMPARED, read
from train import half_width

COLORS = {"none": "0.6", "randaugment": "#56b4e9", "trivialaugment": "#0072b2"}
COLORS |= {"uniform": "#e69f00", "ola": "#d55e00"}
#: Points beyond which a mark lies at the border, with its number.
_MOST = 12
#: Seeds before an interval says something.
_SEEDS = 3


def scores_of(rows: list[dict[str, Any]], bed: str, method: str) -> list[float]:
    """Test accuracies (%) of the seeds that ran."""
    return [row["accuracy"] for row in rows if (row["bed"], row["method"]) == (bed, method)]


def in_order(rows: list[dict[str, Any]]) -> list[str]:
    """Beds on which none and ola have run: photographs first, other domain shifts, the rest."""
    beds = [bed for bed in BEDS if all(scores_of(rows, bed, name) for name in ("none", "ola"))]

    def key(bed: str) -> tuple[bool, bool]:
        return not bed.startswith("photographs"), BEDS[bed].shift is None

    return sorted(beds, key=key)


def compared(rows: list[dict[str, Any]]) -> plt.Figure:
    """Test accuracy less the mean of none's, with 95 % intervals, bed by bed."""
    beds, named = in_order(rows), set()
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(beds)), layout="constrained")
    for row, bed in enumerate(beds):
        base = statistics.mean(scores_of(rows, bed, "none"))
        for place, method in enumerate((*COMPARED, "ola")):
            scores = scores_of(rows, bed, method)
            if not scores:
                continue
            gain = statistics.mean(scores) - base
            shown = max(-_MOST, min(gain, _MOST))
            at = row + 0.17 * (place - 2)
            axes.errorbar(
                shown,
                at,
                xerr=half_width(scores) if shown == gain and len(scores) >= _SEEDS else 0,
                fmt="o",
                markersize=5,
                color=COLORS[method],
                label=None if method in named else method,
            )
            named.add(method)
            if shown != gain:
                axes.annotate(f"   {gain:+.0f}", (shown, at), fontsize=6, va="center_baseline")
    axes.set_yticks(range(len(beds)), beds)
    axes.set_ylim(len(beds) - 0.4, -0.6)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_xlabel("test accuracy beyond no augmentation (points; intervals from three seeds on)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("docs/results_runs.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args(arguments)
    path = options.out / "compared.png"
    compared(read(options.results)).savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
