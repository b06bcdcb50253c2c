"""A domain shift in photographs, and what learned augmentation makes of it: `make demo`.

    python examples/demo.py

Trains every method on crops of photographs that are upright and well lit; the target domain, of
which 60 labelled crops are given, is rotated and dark (``examples/photographs.py``). Two runs at a
time where there are two cores, one thread each. Prints a table as soon as every method has run
once, and again with each seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

METHODS = ("none", "randaugment", "uniform", "ola")


def arguments(options: argparse.Namespace) -> list[str]:
    """Of ``train.py``, for every run."""
    data = f"imagefolder:{options.out / 'photographs'}"
    given = ["--data", data, "--epochs", str(options.epochs), "--batch-size", "32"]
    given += ["--quiet", "--no-mirror"]
    return [*given, "--seeds", str(options.seeds), "--out", str(options.out / "runs"), "--resume"]


def one_run(method: str, seed: int, given: list[str]) -> dict[str, float]:
    """In a process of its own, with one thread."""
    import torch
    import train
    from data import load_data

    torch.set_num_threads(1)
    options = train.parse_arguments(given)
    return train.run(method, seed, load_data(options.data, options.image_size), options)


class Progress:
    """Epochs that all runs have done, which ones are under way, and what ola favours."""

    def __init__(self, runs: list[tuple[str, int]], epochs: int, folder: Path) -> None:
        from tqdm import tqdm

        self.folder = folder
        self.bar = tqdm(total=len(runs) * epochs, unit="epoch", desc="starting")

    def records(self, method: str, seed: int) -> list[str]:
        """Lines of a run's metrics, of which there is one an epoch."""
        file = self.folder / f"{method}-seed{seed}" / "metrics.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def show(self, running: Iterable[tuple[str, int]], finished: int) -> None:
        """Look at what the runs have written.

        Args:
            running: method and seed of each.
            finished: epochs of those that have ended.
        """
        done, names = finished, []
        for method, seed in running:
            lines = self.records(method, seed)
            done += len(lines)
            names.append(f"{method} {seed}{favours(lines) if method == 'ola' else ''}")
        self.bar.set_description(", ".join(names) or "done", refresh=False)
        self.bar.n = done
        self.bar.refresh()


def favours(lines: list[str]) -> str:
    """What the policy draws most, once it draws anything more than the rest."""
    if not lines:
        return " (starting)"
    probs = json.loads(lines[-1]).get("draw_probs") or {}
    if not probs or max(probs.values()) < 1.1 * min(probs.values()):
        return " (measuring)"
    return f" (favours {max(probs, key=lambda name: probs[name])})"


def collect(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run everything, the methods of a seed together; print a table after each seed."""
    import train

    given = arguments(options)
    runs = [(method, seed) for seed in range(options.seeds) for method in options.method]
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in options.method}
    progress = Progress(runs, options.epochs, options.out / "runs")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        futures: dict[tuple[str, int], Future] = {
            run: pool.submit(one_run, *run, given) for run in runs
        }
        ended = 0
        while ended < len(runs):
            time.sleep(0.3 if sys.stderr.isatty() else 5)  # a log needs no film
            done = [run for run in runs if futures[run].done()]
            under_way = [run for run in runs if run not in done][: options.jobs]
            progress.show(under_way, len(done) * options.epochs)
            while ended < len(runs) and futures[runs[ended]].done():
                method, seed = runs[ended]
                results[method].append(futures[runs[ended]].result())
                ended += 1
                if ended % len(options.method) == 0:
                    progress.bar.write(f"\nafter {seed + 1} of {options.seeds} seeds:\n")
                    progress.bar.write(train.table(results) + "\n")
    progress.bar.close()
    return results


def picture(options: argparse.Namespace) -> Path:
    """Training images, the target domain, and what ola and a uniform policy make of training."""
    import torch
    from data import load_data
    from matplotlib.figure import Figure
    from report import one_a_class

    from ola_augment import PolicyTransform, UniformAugment, load_policy

    data = load_data(f"imagefolder:{options.out / 'photographs'}")
    images, _ = one_a_class(data.train_images, data.train_labels)
    target, _ = one_a_class(data.test_images, data.test_labels)
    policy = load_policy(options.out / "runs" / "ola-seed0" / "policy.json")
    torch.manual_seed(0)
    rows = {
        "training": images,
        "target domain": target,
        "learned": PolicyTransform(policy).augment(images)[0],
        "uniform": UniformAugment().augment(images)[0],
    }
    figure = Figure(figsize=(1.6 * len(images) + 1, 1.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes, (title, row) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(title)
        for ax, image in zip(axes, row, strict=True):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
    path: Path = options.out / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", default=list(METHODS), help="as in train.py")
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=100)
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    add("--out", type=Path, default=Path("runs/demo"), help="a folder; runs in it are kept")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = parse_arguments(given)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs
    photographs = options.out / "photographs"
    print(f"photographs for the demo: {photographs}", flush=True)
    from report import data_lines, look_for_packages, verdict

    look_for_packages(options.seeds)
    if not photographs.exists():
        import photographs as made

        unfinished = options.out / "photographs.part"
        made.write(unfinished, train=81, test=60, reference=12, side=96, size=32, seed=0)
        unfinished.rename(photographs)
    from data import load_data
    from train import what_was_learned

    print(data_lines(load_data(f"imagefolder:{photographs}")), flush=True)
    results = collect(options)
    if "ola" in results:
        folders = [options.out / "runs" / f"ola-seed{seed}" for seed in range(options.seeds)]
        print(f"\n{what_was_learned(folders)}")
        print(f"\nWhat that looks like: {picture(options)}")
    print(f"\n{verdict(results)}")


if __name__ == "__main__":
    from report import command

    sys.exit(command(main))
