"""Draw the pictures of docs/results.md from the runs of ``comparison.py``.

python examples/results_figures.py --runs runs/comparison
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from beds import BEDS
from comparison import AT_EQUAL_TIME, STRENGTHS
from learning_signal import ORACLES, read_oracles
from scipy.stats import spearmanr
from train import half_width

from ola_augment import PolicyTransform, load_policy

COLORS = {"none": "0.6", "randaugment": "#56b4e9", "trivialaugment": "#0072b2"}
COLORS |= {"uniform": "#e69f00", "ola": "#d55e00"}


def accuracies(runs: Path, bed: str, methods: list[str]) -> dict[str, list[float]]:
    """Test accuracies (%) by method, of the seeds that ran."""
    found = {}
    for method in methods:
        results = sorted((runs / bed / "runs").glob(f"{method}-seed*/result.json"))
        found[method] = [100 * json.loads(r.read_text())["accuracy"] for r in results]
    return {method: scores for method, scores in found.items() if scores}


def fewest_seeds(runs: Path, bed: str) -> int:
    """Of the methods of the table that ran on a bed."""
    return min(map(len, accuracies(runs, bed, AT_EQUAL_TIME).values()))


def compared(runs: Path, beds: list[str]) -> plt.Figure:
    """Test accuracy less the mean of UniformAugment's, with 95 % intervals, bed by bed."""
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.62 * len(beds)), layout="constrained")
    for row, bed in enumerate(beds):
        scores = accuracies(runs, bed, AT_EQUAL_TIME)
        base = statistics.mean(scores["uniform"])
        for place, (method, values) in enumerate(scores.items()):
            axes.errorbar(
                statistics.mean(values) - base,
                row + 0.13 * (place - 2),
                xerr=half_width(values),
                fmt="o",
                markersize=5,
                color=COLORS[method],
                label=method if row == 0 else None,
            )
    axes.set_yticks(range(len(beds)), beds)
    axes.invert_yaxis()
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_xlabel("test accuracy beyond UniformAugment's (points; 95 % intervals over seeds)")
    axes.set_title("Every method at equal time")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def against_oracle(runs: Path, bed: str) -> plt.Figure:
    """How useful each operation is alone, beside how often the learned policies draw it."""
    known = read_oracles(ORACLES)[bed]
    policies = [load_policy(p) for p in sorted((runs / bed / "runs").glob("ola-seed*/policy.json"))]
    probs = torch.stack([p.log_probs().ops.detach().exp() for p in policies])
    names = [operation.name for operation in policies[0].space.operations]
    alone = {name: [100 * score for score in known[name].values()] for name in names}
    useful = {name: statistics.mean(scores) for name, scores in alone.items()}
    learned = dict(zip(names, probs.mean(0).tolist(), strict=True))
    rank = spearmanr(list(useful.values()), list(learned.values())).statistic
    rows = sorted(names, key=useful.__getitem__)
    figure, (truth, drawn) = plt.subplots(1, 2, figsize=(7.5, 5), sharey=True, layout="constrained")
    truth.errorbar(
        [useful[name] for name in rows],
        rows,
        xerr=[half_width(alone[name]) for name in rows],
        fmt="o",
        markersize=5,
        color="0.3",
    )
    truth.axvline(useful["identity"], color="0.8", zorder=0)
    truth.set_xlabel(f"test accuracy with it alone (%; {len(alone[names[0]])} seeds)")
    drawn.barh(rows, [learned[name] for name in rows], color=COLORS["ola"])
    drawn.axvline(1 / len(names), color="0.8", zorder=0)
    drawn.set_xlabel(f"learned probability of drawing it ({len(policies)} seeds)")
    for axes in (truth, drawn):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
    figure.suptitle(f"{bed}: rank correlation {rank:+.2f}")
    return figure


def by_strength(runs: Path, beds: list[str]) -> plt.Figure:
    """Test accuracy beyond none's at given strengths, bed by bed, and at OLA's own choice."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(beds)).tolist())
    for bed, color in zip(beds, colors, strict=True):
        scores = accuracies(runs, bed, [*STRENGTHS, "ola"])
        seeds = len(scores["strength-0"])  # OLA's others are not on the curve
        means = {method: statistics.mean(values[:seeds]) for method, values in scores.items()}
        base, own = means["strength-0"], means.pop("ola")
        strengths = [float(method.removeprefix("strength-")) for method in means]
        axes.plot(strengths, [mean - base for mean in means.values()], "o-", color=color, label=bed)
        chosen = [
            mean_strength(runs / bed / "runs" / f"ola-seed{seed}" / "metrics.jsonl")
            for seed in range(seeds)
        ]
        star = {"marker": "*", "s": 220, "edgecolor": "black", "zorder": 3}
        axes.scatter(statistics.mean(chosen), own - base, color=color, **star)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set_xlabel("operations an image, in every other batch (stars: OLA, mean over its run)")
    axes.set_ylabel("test accuracy beyond no augmentation (points)")
    axes.set_title("How much to augment depends on the amount of data")
    axes.legend(frameon=False)
    return figure


def mean_strength(metrics: Path) -> float:
    """Applied operations an image over a run of OLA."""
    return statistics.mean(
        json.loads(line)["applied_ops"] for line in metrics.read_text().splitlines()
    )


def target(runs: Path, bed: str) -> plt.Figure:
    """Training images, images from where the model is used, and what was learned from them."""
    data = BEDS[bed].load({}, 0)
    policy = load_policy(runs / bed / "runs" / "ola-seed0" / "policy.json")
    augment = PolicyTransform(policy, generator=torch.Generator().manual_seed(0))
    images = data.train_images[:10]
    rows = {
        "training images": images,
        "where it is used": data.test_images[:10],
        "learned": augment.augment(images)[0],
    }
    figure, axes = plt.subplots(len(rows), 10, figsize=(9, 3), layout="constrained")
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, row, strict=True):
            place.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs/comparison"))
    add("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args(arguments)
    beds = [bed for bed in BEDS if (options.runs / bed).exists()]
    # An interval of two seeds says nothing.
    several = [b for b in beds if fewest_seeds(options.runs, b) > 2]
    figures = {"compared": compared(options.runs, several or beds)}
    steered = [b for b in beds if len(accuracies(options.runs, b, STRENGTHS)) == len(STRENGTHS)]
    if steered:
        figures["strength"] = by_strength(options.runs, steered)
    for bed in read_oracles(ORACLES):
        if bed in beds:
            figures[f"oracle_{bed}"] = against_oracle(options.runs, bed)
    if "rotated" in beds:
        figures["target"] = target(options.runs, "rotated")
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=110)
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
