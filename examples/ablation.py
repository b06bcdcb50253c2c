"""What moves the policy, and does that help? One factor at a time, over several seeds.

    python examples/ablation.py --train-size 300 --epochs 300 --seeds 5

Every variant trains the same network with the same pairs of steps (an augmented one, a plain one).
``paper`` is the paper's setting: REINFORCE on normalised rewards, Adam with lr 0.1. Each other
variant changes what its name says and nothing else; ``shuffled`` is the control, in which the
rewards of a batch are dealt to its examples at random. Writes ``runs.jsonl``, one line a run, and
prints a table:

- accuracy: on the test images, mean ± 95 % interval over seeds;
- agreement: Spearman's rank correlation of the keep probabilities, mean over pairs of seeds;
- keep: mean keep probability, and that of the operations that mirror or invert digits;
- drawn, kept: how many operations an image gets in the end.

A second table has the keep probability of each operation and how many are drawn, for some variants.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from data import ImageData, Preprocess, load_data
from networks import make_network
from scipy.stats import spearmanr
from train import METHODS, interval
from variants import VARIANTS

from ola_augment import OLAAugment, OLALearner
from ola_augment.training import accuracy, fit, policy_metrics

HARMFUL = ("flip_lr", "flip_ud", "invert")
IN_DETAIL = ("paper", "lr 0.03", "lr 0.01", "shuffled, lr 0.01")


def run(name: str, seed: int, data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    variant = VARIANTS[name]
    if options.train_size:
        data = data.subset(options.train_size, seed)
    model = make_network(options.model, data.num_classes, data.train_images.shape[1])
    batches = variant.batches(data, options, seed)
    preprocess = Preprocess(data, seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = options.epochs * len(batches)
    generator = torch.Generator().manual_seed(seed)
    augment: Any = None
    learner = None
    if not variant.updater:
        augment = METHODS[name](options.space, generator)
    else:
        augment = OLAAugment(options.space, generator=generator)
        augment.policy = variant.policy(options.space)
        updater = variant.updater(augment.policy, steps // 2)
        learner = OLALearner(model, augment, cosine=variant.cosine, updater=updater)
    fit(
        model,
        batches,
        optimizer,
        epochs=options.epochs,
        augment=augment,
        learner=learner,
        preprocess=preprocess,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        progress=False,
    )
    tests = zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
    result = {"variant": name, "seed": seed, "accuracy": accuracy(model, tests, preprocess.test)}
    if learner:
        result |= policy_metrics(augment.policy)
    return result | {"seconds": time.perf_counter() - start}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | seeds | accuracy (%) | agreement | keep: mean | keep: flips, invert | "
        "drawn | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["variant"] for row in results):
        rows = [row for row in results if row["variant"] == name]
        cells = [name, str(len(rows)), interval([100 * row["accuracy"] for row in rows])]
        if "keep_probs" in rows[0]:
            keeps = [row["keep_probs"] for row in rows]
            values = [list(keep.values()) for keep in keeps]
            pairs = [spearmanr(*pair).statistic for pair in itertools.combinations(values, 2)]
            harmful = [keep[name] for keep in keeps for name in HARMFUL if name in keep]
            drawn = [sum(p * (i + 1) for i, p in enumerate(r["num_ops_probs"])) for r in rows]
            mean_keeps = [statistics.mean(keep) for keep in values]
            kept = [d * k for d, k in zip(drawn, mean_keeps, strict=True)]
            cells += [
                f"{statistics.mean(pairs):.2f}" if pairs else "",
                f"{statistics.mean(mean_keeps):.2f}",
                f"{statistics.mean(harmful):.2f}" if harmful else "",
                f"{statistics.mean(drawn):.2f}",
                f"{statistics.mean(kept):.2f}",
            ]
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def policies(results: list[dict[str, Any]]) -> str:
    """Keep probability of each operation, then that of each number of operations (mean ± std)."""
    learned = {
        name: rows
        for name in IN_DETAIL
        if (rows := [row for row in results if row["variant"] == name])
    }
    if not learned:
        return ""
    lines = ["| | " + " | ".join(learned) + " |", "|---|" + "---|" * len(learned)]
    first = next(iter(learned.values()))[0]
    labels = [f"keep {name}" for name in first["keep_probs"]]
    labels += [f"draw {i + 1}" for i in range(len(first["num_ops_probs"]))]
    for index, label in enumerate(labels):
        cells = []
        for rows in learned.values():
            values = [[*row["keep_probs"].values(), *row["num_ops_probs"]][index] for row in rows]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, cifar100 or imagefolder:PATH")
    add("--train-size", type=int, help="train on this many random images (default: all)")
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--space", choices=["wide_long", "rand_augment"], default="wide_long")
    add("--model", default="small_cnn")
    add("--epochs", type=int, default=300)
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=0.05)
    add("--seeds", type=int, default=5)
    add("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options.data)
    results = []
    with (options.out / "runs.jsonl").open("w", encoding="utf-8") as file:
        for seed in range(options.seeds):
            for name in options.variant:
                results.append(run(name, seed, data, options))
                file.write(json.dumps(results[-1]) + "\n")
                file.flush()
                print(f"{name}, seed {seed}: {results[-1]['accuracy']:.4f}", flush=True)
    size = options.train_size or len(data.train_images)
    print(f"\n{data.name}, {size} training images, {options.epochs} epochs, {options.model}\n")
    print(table(results))
    print("\n" + policies(results))


if __name__ == "__main__":
    main()
