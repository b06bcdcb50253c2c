"""Every method on every test bed: the runs behind docs/results.md.

    python examples/photographs.py PHOTOGRAPHS
    python examples/comparison.py --cifar CIFAR.zip --omniglot CHARACTERS.zip \\
      --photographs PHOTOGRAPHS --results docs/results_runs.jsonl

The comparison methods are in their usual form: they augment every batch, and train from the start
on the images that OLA holds out for a while. Each gets as many steps as OLA has time for, by
``COST``: what a run of OLA costs over one of the same steps without augmentation, and over one
with UniformAugment, side by side alone. ``ola-...`` are controls: rewards of other examples
(shuffled), operations that stay alike while their strength is tried (uniform), and learned ones at
strength 1 untried (fixed).

A line is added to ``--results`` after each run, and a run that is there is not repeated: the
command goes on where it was stopped. Seeds outside, so that whatever there is can be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import train
from beds import BEDS, COST, SHIFTED

from ola_augment import load_policy

COMPARED = ("none", "randaugment", "trivialaugment", "uniform")
#: Options of train.py that make a control of ola.
CONTROLS = {
    "ola-shuffled": ("--control", "shuffled"),
    "ola-uniform": ("--control", "uniform"),
    "ola-fixed": ("--strength", "1"),
}
METHODS = (*COMPARED, "ola", *CONTROLS)
#: Beds whose target domain is another one than that of the training images.
TARGET = ("rotated", "dark", "photographs-60", "photographs-240", *SHIFTED)


def epochs(bed: str, method: str) -> int:
    """Passes over the training images that cost as much as OLA's."""
    kind = "short" if bed == "photographs-60" else "target" if bed in TARGET else "own"
    cost = COST[kind][method != "none"] if method in COMPARED else 1.0
    return round(BEDS[bed].epochs * cost)


def run(bed: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once: test accuracy (%), seconds, and for OLA what it found out."""
    paths = {n: getattr(options, n) for n in ("cifar10", "omniglot", "photographs")}
    chosen = method if method in COMPARED else "ola"
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--epochs", str(epochs(bed, method)), "--out", out, "--quiet"]
        arguments += ["--model", BEDS[bed].model, *CONTROLS.get(method, ())]
        parsed = train.parse_arguments(arguments)
        result = train.run(chosen, seed, BEDS[bed].load(paths, seed), parsed)
        row = {
            "bed": bed,
            "method": method,
            "seed": seed,
            "epochs": parsed.epochs,
            "accuracy": round(100 * result["accuracy"], 2),
            "seconds": round(result["seconds"], 1),
        }
        if chosen == "ola":
            row |= {name: result[name] for name in ("strength", "t", "flat") if name in result}
            policy = load_policy(Path(out) / f"ola-seed{seed}" / "policy.json")
            probs = policy.log_probs().ops.detach().exp()
            names = [operation.name for operation in policy.space.operations]
            first = probs.argsort(descending=True).tolist()[:3]
            row["most"] = {names[i]: round(float(probs[i]), 2) for i in first}
    return row


def read(results: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracies with 95 % intervals, a row for each bed, and means over target domains."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [f"| bed | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    means: dict[str, list[float]] = {method: [] for method in methods}
    beds = [bed for bed in BEDS if any(row["bed"] == bed for row in rows)]
    for bed in beds:
        cells = []
        for method in methods:
            scores = [r["accuracy"] for r in rows if (r["bed"], r["method"]) == (bed, method)]
            cells.append(train.interval(scores) if scores else "")
            if scores and bed in TARGET:
                means[method].append(statistics.mean(scores))
        lines.append(f"| {bed} | {' | '.join(cells)} |")
    shifted = sum(bed in TARGET for bed in beds)
    cells = [
        f"{statistics.mean(means[m]):.2f}" if shifted and len(means[m]) == shifted else ""
        for m in methods
    ]
    return "\n".join((*lines, f"| mean of the {shifted} target domains | {' | '.join(cells)} |"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bed", nargs="+", choices=BEDS, default=[bed for bed in BEDS if bed not in SHIFTED])
    add("--seeds", type=int, default=3)
    add("--method", nargs="+", choices=METHODS, default=METHODS)
    add("--cifar", dest="cifar10", help="folder or zip of CIFAR-10 images, instead of a download")
    add("--omniglot", help="folder or zip of characters, for the bed of that name")
    add("--photographs", help="folder that examples/photographs.py made")
    add("--results", type=Path, default=Path("runs/comparison.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for bed in options.bed:
            for method in options.method:
                done = {(row["bed"], row["method"], row["seed"]) for row in read(options.results)}
                if (bed, method, seed) in done:
                    continue
                row = run(bed, method, seed, options)
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table([row for row in read(options.results) if row["bed"] in options.bed]))


if __name__ == "__main__":
    main()
