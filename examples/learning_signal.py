"""Does a signal see which operations help? Its rank correlation with how useful they truly are.

    python examples/learning_signal.py oracle --bed rotated --seeds 3     # an hour; once
    python examples/learning_signal.py signal --bed rotated --seeds 3     # minutes

``oracle`` trains with one operation alone on every other batch, for each operation, and adds the
test accuracies to ``oracles.json`` beside this script; what is there already is not trained again.

``signal`` trains with UniformAugment and looks, in every ``--every``-th augmented step, at each
example's gradient: its dot product and cosine with the gradient of a plain training batch, and of
images that are never trained on (64 from where the model is used on the beds ``rotated`` and
``dark``; elsewhere ``--held-out`` of the training images), before the step (theta_t), after it
(theta_{t+1}), the mean of both, and the running mean of those before it (smoothed, as in
``OLALearner``). Each is normalised within its batch and explained by the
operations that an image got (least squares); a signal is good where the order of these values is
that of the oracle. It prints Spearman's correlation over the operations, mean over seeds, for the
whole run and for its quarters, and the operations that a signal puts first and last.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from beds import BEDS
from data import Batches, ImageData, Preprocess
from networks import make_network
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ola_augment import SearchSpace, UniformAugment, UniformPolicy
from ola_augment.files import write_atomically
from ola_augment.training import accuracy, fit, normalize
from ola_augment.transforms import PolicyTransform

ORACLES = Path(__file__).parent / "oracles.json"
SPACE = SearchSpace.wide_long()
NAMES = [operation.name for operation in SPACE.operations]
MOMENTS = ("theta_t", "theta_t+1", "mean", "smoothed")
SMOOTHING = 0.8  # OLALearner's


class Training:
    """The network, optimizer and pre-processing that every run here has."""

    def __init__(self, data: ImageData, epochs: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.data = data
        self.model = make_network("small_cnn", data.num_classes, data.train_images.shape[1])
        self.batches = Batches(data.train_images, data.train_labels, 64, seed)
        self.preprocess = Preprocess(data, seed)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.epochs = epochs
        steps = epochs * len(self.batches)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(inputs), labels).backward()
        self.optimizer.step()
        self.scheduler.step()

    def test_accuracy(self) -> float:
        images, labels = self.data.test_images.split(500), self.data.test_labels.split(500)
        return accuracy(self.model, zip(images, labels, strict=True), self.preprocess.test)


def oracle(bed: str, operation: str, seed: int, options: argparse.Namespace) -> float:
    """Test accuracy after training with one operation on every other batch."""
    training = Training(BEDS[bed].load(paths(options), seed), epochs(bed, options), seed)
    alone = SearchSpace(tuple(o for o in SPACE.operations if o.name == operation))
    policy = UniformPolicy(alone, num_ops=1, keep_prob=1.0)
    fit(
        training.model,
        training.batches,
        training.optimizer,
        epochs=training.epochs,
        augment=PolicyTransform(policy, generator=torch.Generator().manual_seed(seed)),
        preprocess=training.preprocess,
        scheduler=training.scheduler,
        progress=False,
    )
    return training.test_accuracy()


def per_example_gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """(B, number of parameters)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, image[None]), label[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
    return torch.cat([row.flatten(1) for row in rows.values()], dim=1)


def gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """(number of parameters,)."""
    parts = torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def signals(rows: Tensor, references: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every signal of a batch: name -> (B,)."""
    norms = rows.norm(dim=1)
    found = {"gradient norm": norms}
    for name, g in references.items():
        found[f"dot, {name}"] = rows @ g
        found[f"cosine, {name}"] = rows @ g / norms.clamp(min=1e-12)
    return found


def run_with_signals(bed: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train with UniformAugment; values of each operation by each signal, by quarter."""
    data = BEDS[bed].load(paths(options), seed)
    if data.reference is None:
        held, kept = slice(0, options.held_out), slice(options.held_out, None)
        data = replace(
            data,
            reference=(data.train_images[held], data.train_labels[held]),
            train_images=data.train_images[kept],
            train_labels=data.train_labels[kept],
        )
    training = Training(data, epochs(bed, options), seed)
    model, preprocess = training.model, training.preprocess
    held_out = Batches(*data.reference, 64, seed + 1)
    augment = UniformAugment(SPACE, generator=torch.Generator().manual_seed(seed))
    total = training.epochs * len(training.batches) // 2
    stream, references = forever(training.batches), forever(held_out)
    recorded: list[tuple[Tensor, dict[str, Tensor]]] = []
    smoothed: dict[str, Tensor] = {}
    for pair in range(total):
        (images, labels), (plain, plain_labels) = next(stream), next(stream)
        images, actions = augment.augment(images)
        inputs, plain = preprocess(images), preprocess(plain)
        if pair % options.every:
            training.step(inputs, labels)
        else:
            known, known_labels = next(references)
            batches = {
                "held out": (preprocess.test(known), known_labels),
                "training": (plain, plain_labels),
            }
            before = {name: gradient(model, *batch) for name, batch in batches.items()}
            rows = per_example_gradients(model, inputs, labels)
            training.step(inputs, labels)
            every = {}
            for name, batch in batches.items():
                after = gradient(model, *batch)
                mean = torch.lerp(smoothed.get(name, before[name]), before[name], 1 - SMOOTHING)
                smoothed[name] = mean
                moments = (before[name], after, (before[name] + after) / 2, mean)
                every |= {f"{name}, {m}": g for m, g in zip(MOMENTS, moments, strict=True)}
            applied = F.one_hot(actions.ops.clamp(min=0), len(NAMES)) * actions.keep[..., None]
            recorded.append((applied.sum(1).double(), signals(rows, every)))
        training.step(plain, plain_labels)
    quarter = max(1, len(recorded) // 4)
    parts = {"run": recorded}
    parts |= {f"quarter {i + 1}": recorded[i * quarter : (i + 1) * quarter] for i in range(4)}
    return {
        "accuracy": training.test_accuracy(),
        "values": {part: values(records) for part, records in parts.items() if records},
    }


def values(recorded: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, list[float]]:
    """Least squares of every normalised signal on the operations that were applied."""
    squares = 4.0 * torch.eye(len(NAMES), dtype=torch.float64)
    moments: dict[str, Tensor] = {}
    for applied, found in recorded:
        centered = applied - applied.mean(0)
        squares = squares + centered.T @ centered
        for name, signal in found.items():
            product = centered.T @ normalize(signal).double()
            moments[name] = moments.get(name, 0) + product
    return {name: torch.linalg.solve(squares, moment).tolist() for name, moment in moments.items()}


def forever(batches: Batches):
    while True:
        yield from batches


def epochs(bed: str, options: argparse.Namespace) -> int:
    return options.epochs or BEDS[bed].epochs


def paths(options: argparse.Namespace) -> dict[str, str | None]:
    return {"cifar10": options.cifar, "omniglot": options.omniglot}


def read_oracles(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Bed -> operation -> seed -> test accuracy."""
    return json.loads(file.read_text()) if file.exists() else {}


def table(bed: str, runs: list[dict[str, Any]], known: dict[str, dict[str, float]]) -> str:
    """One row a signal: its correlation with the oracle, and what it puts first and last."""
    useful = [statistics.mean(known[name].values()) for name in NAMES]
    parts = list(runs[0]["values"])
    lines = [
        f"| {bed} | {' | '.join(parts)} | first | last |",
        "|---|" + "---|" * (len(parts) + 2),
    ]
    for signal in runs[0]["values"]["run"]:
        cells = []
        for part in parts:
            found = [spearmanr(run["values"][part][signal], useful).statistic for run in runs]
            cells.append(f"{statistics.mean(found):+.2f}")
        mean = [statistics.mean(column) for column in zip(*values_of(runs, signal), strict=True)]
        order = sorted(range(len(NAMES)), key=lambda i: -mean[i])
        cells += [", ".join(NAMES[i] for i in order[:4]), ", ".join(NAMES[i] for i in order[-4:])]
        lines.append(f"| {signal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def values_of(runs: list[dict[str, Any]], signal: str) -> list[list[float]]:
    return [run["values"]["run"][signal] for run in runs]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["oracle", "signal"])
    add("--bed", nargs="+", choices=BEDS, default=["digits-300", "rotated"])
    add("--seeds", type=int, default=3, help="runs of each kind (seeds 0, 1, ...)")
    add("--epochs", type=int, help="instead of the bed's")
    add("--every", type=int, default=4, help="look at every N-th augmented step")
    add("--held-out", type=int, default=64, help="training images held out where none are given")
    add("--cifar", help="folder or zip of CIFAR-10 images, instead of torchvision's download")
    add("--omniglot", help="folder or zip of characters, for the bed of that name")
    add("--oracles", type=Path, default=ORACLES, help="file of the oracles")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for bed in options.bed:
        known = read_oracles(options.oracles)
        if options.what == "oracle":
            for seed in range(options.seeds):
                for name in NAMES:
                    scores = known.setdefault(bed, {}).setdefault(name, {})
                    if str(seed) not in scores:
                        scores[str(seed)] = round(oracle(bed, name, seed, options), 4)
                        text = json.dumps(known, indent=1, sort_keys=True)
                        write_atomically(options.oracles, (text + "\n").encode())
                        print(f"{bed}, {name}, seed {seed}: {scores[str(seed)]:.4f}", flush=True)
        else:
            if missing := [name for name in NAMES if not known.get(bed, {}).get(name)]:
                raise SystemExit(f"{options.oracles} has no oracle of {bed} for {missing}")
            runs = [run_with_signals(bed, seed, options) for seed in range(options.seeds)]
            print("\n" + table(bed, runs, known[bed]), flush=True)


if __name__ == "__main__":
    main()
