"""Table 2 of the paper in miniature: as many epochs of each method as the time allows."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from rows import Row, emit

sys.path.insert(0, str(Path(__file__).parents[1]))
METHODS = ("none", "uniform", "randaugment", "ola")


def arguments(options: argparse.Namespace, epochs: int, out: Path) -> list[str]:
    model = "small_cnn" if options.quick else "wrn-28-10"
    given = ["--data", options.data, "--model", model, "--epochs", str(epochs)]
    given += ["--batch-size", "128", "--lr", "0.1", "--cutout", "16", "--settings", "paper"]
    given += ["--device", options.device, "--out", str(out), "--quiet", "--resume"]
    return given + ["--train-size", "200"] * options.quick


def main(options: argparse.Namespace, out: Path) -> None:
    """Time an epoch, then train every method for what is left of the minutes."""
    import train
    from data import load_data

    data = load_data(options.data)
    # In the pair loop every method costs about the same but ola, which costs more.
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        train.run("ola", 0, data, train.parse_arguments(arguments(options, 1, out / "epoch")))
    epoch = time.perf_counter() - start
    left = options.seconds - 1.5 * epoch
    epochs = 1 if options.quick else max(1, int(left / (len(METHODS) * epoch)))
    deadline = time.perf_counter() + left
    given = train.parse_arguments(arguments(options, epochs, out / "runs"))
    for method in METHODS:
        if time.perf_counter() + 0.8 * epoch * epochs > deadline and not options.quick:
            emit(Row("Table 2", f"{method}, {given.model}, {data.name}", "no time left"))
            continue
        with contextlib.redirect_stdout(sys.stderr):
            result = train.run(method, 0, data, given)
        found = f"{100 * result['accuracy']:.2f} % after {epochs} epochs, "
        found += f"{result['ms_per_step']:.1f} ms a step"
        emit(Row("Table 2", f"{method}, {given.model}, {data.name}", found))
