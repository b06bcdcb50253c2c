"""Every method on every test bed at equal time: the table of docs/results.md.

    python examples/comparison.py --bed rotated --method ola shuffled
    python examples/comparison.py --cifar CIFAR.zip --omniglot CHARACTERS.zip --seeds 5

The comparison methods augment every batch (their usual form), train from the start on the images
that OLA holds out for a while, and for ``--time`` times the epochs, which is what OLA's learning
costs. ``strength-...`` augments every other batch, as OLA does, with all operations alike, so many
an image. Runs that are in ``--out`` are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import train
from beds import BEDS

from ola_augment import load_policy

COMPARED = ["none", "randaugment", "trivialaugment", "uniform"]
STRENGTHS = [name for name in train.METHODS if name.startswith("strength-")]
#: Those of the table.
AT_EQUAL_TIME = [*COMPARED, "ola"]
METHODS = [*AT_EQUAL_TIME, "shuffled", *STRENGTHS]


def run(bed: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Test accuracy, seconds, and for OLA what it draws most and least."""
    paths = {"cifar10": options.cifar, "omniglot": options.omniglot}
    compared = method in train.METHODS
    epochs = round(BEDS[bed].epochs * (options.time if method in COMPARED else 1))
    out = options.out / bed / ("shuffled" if method == "shuffled" else "runs")
    arguments = ["--epochs", str(epochs), "--out", str(out), "--quiet", "--resume"]
    arguments += ["--shuffle"] * (method == "shuffled") + ["--interleave"] * (method in STRENGTHS)
    chosen = method if compared else "ola"
    result = train.run(chosen, seed, BEDS[bed].load(paths, seed), train.parse_arguments(arguments))
    if not compared:
        policy = load_policy(out / f"ola-seed{seed}" / "policy.json")
        probs = policy.log_probs().ops.detach().exp()
        names = [operation.name for operation in policy.space.operations]
        order = probs.argsort(descending=True).tolist()
        result["most"] = [f"{names[i]} {probs[i]:.2f}" for i in order[:3]]
        result["least"] = [names[i] for i in order[-3:]]
        result["strength"] = policy.strength
    return result


def row(bed: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracies, and of OLA the strength in the end and its seconds over those of uniform."""
    cells = [train.interval([100 * r["accuracy"] for r in runs]) for runs in results.values()]
    if "ola" in results:
        cells.append(f"{statistics.mean(r['strength'] for r in results['ola']):.1f}")
    if {"ola", "uniform"} <= results.keys():
        ola, uniform = (
            statistics.median(r["seconds"] for r in results[m]) for m in ("ola", "uniform")
        )
        cells.append(f"{ola / uniform:.2f}")
    return f"| {bed} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bed", nargs="+", choices=BEDS, default=list(BEDS))
    add("--seeds", type=int, default=5)
    add("--method", nargs="+", choices=METHODS, default=AT_EQUAL_TIME, help="shuffled: a control")
    add("--time", type=float, default=1.2, help="OLA's time for an epoch over the others'")
    add("--cifar", help="folder or zip of CIFAR-10 images, instead of torchvision's download")
    add("--omniglot", help="folder or zip of characters, for the bed of that name")
    add("--out", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    methods, rows = options.method, []
    for bed in options.bed:
        results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for seed in range(options.seeds):
            for method in methods:
                results[method].append(run(bed, method, seed, options))
                last = results[method][-1]
                print(f"{bed}, {method}, seed {seed}: {last}", flush=True)
        rows.append(row(bed, results))
    head = [*methods, *["strength"] * ("ola" in methods)]
    head += ["time / uniform"] * ({"ola", "uniform"} <= {*methods})
    print(f"\n| bed | {' | '.join(head)} |")
    print("|---" * (len(head) + 1) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
