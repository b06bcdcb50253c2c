"""Train with learned augmentation, beside the comparison methods.

    python examples/train.py --method none randaugment uniform ola --seeds 3

Writes per run ``metrics.jsonl`` (and for ola ``evidence.txt``, ``policy.json`` and, where it
learned, ``policy.png``; for every method that augments ``samples.png``) and prints one table. A run
that was killed goes on where it was, with the same result, when the same command is given again
with ``--resume``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from options import STRENGTHS, described, is_recommended, parse_arguments

if __name__ == "__main__":
    with contextlib.suppress(ValueError):  # which main meets again
        parse_arguments()  # --help and mistakes are answered before torch is imported

import torch
from data import ImageData, Preprocess, load_data
from networks import make_network
from recipe import hold_out, make_augment, make_batches, make_learner
from report import (
    another_option,
    check_device,
    check_out,
    command,
    data_lines,
    look_for_packages,
    one_a_class,
    run_line,
    too_short,
    verdict,
)
from torch import Tensor, nn
from torchvision.transforms import v2

from ola_augment import (
    OLAAugment,
    OLAPolicy,
    PolicyTransform,
    RandAugment,
    TrivialAugment,
    UniformAugment,
    load_policy,
    save_policy,
)
from ola_augment.files import write_atomically
from ola_augment.plots import augmented_samples, policy_over_time
from ola_augment.summary import magnitude_text
from ola_augment.training import accuracy, fit


class TorchvisionLoop:
    """A torchvision transform, image by image, with the interface of our batch transforms."""

    def __init__(self, transform: nn.Module) -> None:
        self.transform = transform

    def augment(self, images: Tensor, clips: bool = True) -> tuple[Tensor, None]:
        return torch.stack([self.transform(image) for image in images]), None


class EveryBatch:
    """Pre-processing that begins with an augmentation, of every batch."""

    def __init__(self, augment: Any, preprocess: Preprocess) -> None:
        self.augment, self.preprocess = augment, preprocess

    def __call__(self, images: Tensor) -> Tensor:
        return self.preprocess(self.augment.augment(images)[0])


#: The comparison methods.
METHODS: dict[str, Callable[[str, torch.Generator], Any]] = {
    "none": lambda space, generator: None,
    "randaugment": lambda space, generator: RandAugment(space=space, generator=generator),
    "trivialaugment": lambda space, generator: TrivialAugment(space=space, generator=generator),
    # AutoAugment's policy for CIFAR-10, which was searched for on that data set.
    "autoaugment": lambda space, generator: TorchvisionLoop(
        v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    ),
    "uniform": lambda space, generator: UniformAugment(space, generator=generator),
    # Any operation alike, that many an image: what OLA's strength is compared with.
    **{
        f"strength-{number}": lambda space, generator, number=number: OLAAugment(
            space, strength=number, generator=generator
        )
        for number in STRENGTHS
    },
}


def run(method: str, seed: int, data: ImageData, options: argparse.Namespace) -> dict[str, float]:
    """Train once; write its files; return test accuracy, seconds and milliseconds a step."""
    out = options.out / f"{method}-seed{seed}"
    if options.resume and (done := finished(out, options)):
        return done
    torch.manual_seed(seed)
    if options.train_size:
        data = data.subset(options.train_size, seed)
    channels = data.train_images.shape[1]
    model = make_network(options.model, data.num_classes, channels).to(options.device)
    batches, held_out = make_batches(data, options, seed, learns=method == "ola")
    preprocess = Preprocess(data, seed, cutout=options.cutout)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=options.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=options.weight_decay,
    )
    steps = options.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    learner, augment, whole = None, None, None
    if method == "ola":
        augment = make_augment(options.space, options, generator)
        learner = make_learner(
            model, augment, batches, held_out, preprocess, options, data.reference is not None
        )
    else:
        augment = METHODS[method](options.space, generator)
        if augment is not None and not options.interleave:
            whole = EveryBatch(augment, preprocess)
    # Now that nothing was refused.
    if not (options.resume and (out / "options.json").exists()):
        begin(out, options)
    checkpoint = out / "checkpoint.pt"
    history = fit(
        model,
        batches,
        optimizer,
        epochs=options.epochs,
        augment=augment if options.interleave else None,
        learner=learner,
        preprocess=whole or preprocess,
        generators=[preprocess.generator, generator],
        scheduler=scheduler,
        metrics_path=out / "metrics.jsonl",
        progress=not options.quiet,
        checkpoint_path=checkpoint,
        checkpoint_every=options.checkpoint_every,
        resume=checkpoint if options.resume and checkpoint.exists() else None,
    )
    tests = zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
    result = {
        "accuracy": accuracy(model, tests, preprocess.test),
        "seconds": sum(record["seconds"] for record in history),
        "skipped": sum(record["skipped_steps"] for record in history),
        "ms_per_step": 1e3 * statistics.median(r["seconds"] for r in history) / len(batches),
    }
    if isinstance(augment, PolicyTransform):
        shown, classes = one_a_class(data.train_images, data.train_labels)
        names = [data.classes[i] if data.classes else str(i) for i in classes]
        augmented_samples(augment, shown, labels=names).savefig(out / "samples.png", dpi=110)
    if learner is not None and learner.trial is not None:
        evidence, t = learner.evidence(), learner.trial.contrast().t
        result |= {
            "strength": learner.trial.chosen,
            "t": None if math.isnan(t) else t,
            "flat": learner.flat / max(1, learner.augmented),
        }
        write_atomically(out / "evidence.txt", f"{evidence}\n".encode())
    if method == "ola":
        save_policy(augment.policy, out / "policy.json")
        if learner.learn_pairs != 0:
            policy_over_time(history, augment.space).savefig(out / "policy.png", dpi=110)
    # Last: where it is, the run is finished.
    write_atomically(out / "result.json", (json.dumps(result) + "\n").encode())
    return result


def finished(out: Path, options: argparse.Namespace) -> dict[str, float] | None:
    """The result of a run that has ended; whether a stopped one may go on is checked first."""
    known = out / "options.json"
    if not known.exists():
        return None
    if text := another_option(known, settings(options)):
        raise ValueError(f"--resume needs the options of {known}, got {text}")
    result = out / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide a run's result."""
    others = ("out", "quiet", "resume", "checkpoint_every", "seeds", "method", "traceback")
    return {name: value for name, value in vars(options).items() if name not in others}


def begin(out: Path, options: argparse.Namespace) -> None:
    """Nothing of an earlier run may be taken for this one's."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "checkpoint.pt"):
        (out / name).unlink(missing_ok=True)
    write_atomically(out / "options.json", (json.dumps(settings(options)) + "\n").encode())


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """One row a method: mean test accuracy with its 95 % interval, seconds, ratio of step times."""
    first = next(iter(results))
    base = statistics.median(r["ms_per_step"] for r in results[first])
    lines = [
        f"| method | test accuracy (%) | seconds a run | step time / {first} |",
        "|---|---|---|---|",
    ]
    for method, runs in results.items():
        scores = [100 * r["accuracy"] for r in runs]
        seconds = statistics.mean(r["seconds"] for r in runs)
        ratio = statistics.median(r["ms_per_step"] for r in runs) / base
        lines.append(f"| {method} | {interval(scores)} | {seconds:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def what_was_learned(folders: list[Path]) -> str:
    """The evidence of each run of ola, or what the policies of all have in common."""
    known = [folder / "evidence.txt" for folder in folders]
    texts = [f"{file.parent.name}: {file.read_text().rstrip()}" for file in known if file.exists()]
    return "\n\n".join(texts) or learned([load_policy(f / "policy.json") for f in folders])


def learned(policies: list[OLAPolicy]) -> str:
    """What policies of several seeds have in common beyond chance, in a sentence."""
    log_probs = [policy.log_probs() for policy in policies]
    given = policies[0].strength is not None
    each = torch.stack([(lp.ops if given else lp.keep).detach().exp() for lp in log_probs])
    probs, count = each.mean(0), len(policies)
    start = 1 / len(probs) if given else 0.5
    if count < 2:
        return "ola: one seed does not tell what it prefers from chance"
    chance = beyond_chance(count, len(probs)) * each.std(0) / count**0.5
    differs = (probs - start).abs() > chance
    magnitudes = torch.stack([lp.magnitude.detach().exp() for lp in log_probs]).mean(0)
    space = policies[0].space
    means = (magnitudes.double() * space.magnitudes(32, 32)).sum(1).tolist()
    names = []
    for operation, mean in zip(space.operations, means, strict=True):
        text = magnitude_text(operation, mean)
        names.append(
            f"{operation.name} {'±' * operation.signed}{text}".strip() if text else operation.name
        )
    order = probs.argsort(descending=True).tolist()
    use = [names[i] for i in order if differs[i] and probs[i] > 1.25 * start]
    avoid = [
        space.operations[i].name for i in order[::-1] if differs[i] and probs[i] < 0.75 * start
    ]
    parts = [("to use", use), ("to avoid", avoid)]
    text = "; ".join(f"{what}: {', '.join(found)}" for what, found in parts if found)
    return f"ola learned {text or 'nothing that differs from chance'} ({count} seeds)"


def beyond_chance(seeds: int, operations: int) -> float:
    """Standard errors that no operation exceeds by chance, in 19 of 20 runs where all are alike."""
    from scipy.stats import t

    return float(t.ppf(1 - 0.05 / (2 * operations), seeds - 1))


def interval(scores: list[float]) -> str:
    """Mean and 95 % interval of the mean; the mean alone for a single run."""
    mean = f"{statistics.mean(scores):.2f}"
    return mean if len(scores) < 2 else f"{mean} ± {half_width(scores):.2f}"


def half_width(scores: list[float]) -> float:
    """Of the 95 % interval of the mean, by Student's t; 0 for a single run."""
    if len(scores) < 2:
        return 0.0
    from scipy.stats import t

    return t.ppf(0.975, len(scores) - 1) * statistics.stdev(scores) / len(scores) ** 0.5


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    look_for_packages(options.seeds)
    check_device(options.device)
    if not options.resume:
        names = [f"{name}-seed{seed}" for name in options.method for seed in range(options.seeds)]
        check_out(options.out, names, settings(options))
    data = load_data(options.data, options.image_size)
    if options.no_mirror:
        data = replace(data, mirror=False)
    if options.held_out is not None and data.reference is not None:
        raise ValueError("--held-out is for data without reference images, which are held out here")
    kept = data.subset(options.train_size, 0) if options.train_size else data
    if "ola" in options.method and options.reference == "held-out":
        hold_out(kept, options, 0)  # is refused now, or never
    print(data_lines(data, options.train_size), flush=True)
    size = len(kept.train_images)
    if "ola" in options.method and is_recommended(options):
        whole = size if data.reference is None else size + len(data.reference[0])
        if text := too_short(whole, options.batch_size, options.epochs):
            print(text, flush=True)
    results: dict[str, list[dict[str, float]]] = {method: [] for method in options.method}
    # Seeds outside, methods inside: a slow minute of the machine then slows all methods alike.
    left, taken = options.seeds * len(results), []
    for seed in range(options.seeds):
        for method in results:
            results[method].append(result := run(method, seed, data, options))
            left, taken = left - 1, [*taken, result["seconds"]]
            print(run_line(f"{method}, seed {seed}", result, left, taken), flush=True)
    told = f", {described(options)}" * ("ola" in results)
    print(
        f"\n{data.name}, {size} training images, {options.model}, space {options.space}, "
        f"{options.epochs} epochs, {options.seeds} seed{'s' * (options.seeds > 1)}{told}\n"
    )
    print(table(results))
    if sentence := verdict(results):
        print(f"\n{sentence}")
    print(f"\nPictures and metrics: {options.out}/METHOD-seedN/")
    if "ola" in results:
        folders = [options.out / f"ola-seed{seed}" for seed in range(options.seeds)]
        print(f"\n{what_was_learned(folders)}")


if __name__ == "__main__":
    sys.exit(command(main))
