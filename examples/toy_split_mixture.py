"""The paper's toy experiment (Table 1, Figure 2): which split of the data should be drawn from?

    python examples/toy_split_mixture.py --data cifar10 --seeds 10

The training images are divided into equal random splits, and the labels of the first are replaced
by uniform random ones. A SplitPolicy draws each example of a batch, and the gradient-alignment
reward (GAR) or the next-step loss (NSLR) teaches it which splits to leave out. Writes ``toy.json``
(usage of the noisy splits and mean usage of the others, per net, method and seed) and ``toy.png``,
and prints the table.

The paper leaves input scaling and initialisation open. Here pixels are scaled to [-0.5, 0.5],
convolution weights start ten times torch's default, BatchNorm scales at 0.1 and the last layer at
zero. With pixels in [0, 1] the network without BatchNorm is unstable at the paper's lr of 0.1; with
torch's initialisation the one ReLU channel of the convolutional network dies within some steps.
``--pixel-offset``, ``--conv-scale``, ``--bn-weight`` and ``--last-layer`` change each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from data import ImageData, load_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train import interval

from ola_augment import (
    GARUpdater,
    GradientAlignment,
    NSLRUpdater,
    SplitBatchSampler,
    SplitPolicy,
)
from ola_augment.plots import split_usage

NETWORKS = {
    "fc": lambda c, h, w, k: nn.Sequential(
        nn.Flatten(), nn.Linear(c * h * w, 200), nn.ReLU(), nn.Linear(200, k)
    ),
    "fc_bn": lambda c, h, w, k: nn.Sequential(
        nn.Flatten(),
        nn.Linear(c * h * w, 200),
        nn.BatchNorm1d(200),
        nn.ReLU(),
        nn.Linear(200, k),
    ),
    "cnn_bn": lambda c, h, w, k: nn.Sequential(
        nn.Conv2d(c, 1, 3, padding=1),
        nn.BatchNorm2d(1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(h * w, k),
    ),
}
PAPER = {
    ("fc_bn", "gar"): (0.61, 0.93),
    ("fc", "gar"): (0.65, 0.93),
    ("cnn_bn", "gar"): (0.69, 0.92),
    ("fc_bn", "nslr"): (0.96, 0.89),
    ("fc", "nslr"): (0.86, 0.90),
    ("cnn_bn", "nslr"): (0.92, 0.90),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, digits or imagefolder:PATH")
    add("--net", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--method", nargs="+", choices=["gar", "nslr"], default=["gar", "nslr"])
    add("--noise", choices=["labels", "images"], default="labels")
    add("--splits", type=int, default=10)
    add("--noisy-splits", type=int, default=1)
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, help="default: a 50th of the training images (paper: 1000)")
    add("--lr", type=float, default=0.1)
    add("--pixel-offset", type=float, default=0.5, help="subtracted from pixels in [0, 1]")
    add("--conv-scale", type=float, default=10, help="factor on the initial convolution weights")
    add("--bn-weight", type=float, default=0.1, help="initial scale of BatchNorm; torch's: 1")
    add("--last-layer", choices=["zero", "default"], default="zero", help="its initialisation")
    add("--meta-lr", type=float, default=0.1)
    add("--accumulate", type=int, default=10, help="steps that make one update of the policy")
    add("--seeds", type=int, default=10)
    add("--out", type=Path, default=Path("runs/toy"))
    options = parser.parse_args(arguments)
    if not 1 <= options.noisy_splits < options.splits:
        parser.error("--noisy-splits must be at least 1 and fewer than --splits")
    return options


def planted(data: ImageData, options: argparse.Namespace, seed: int) -> tuple:
    """Divide into random splits and spoil the first ones; return the data and the splits."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_images), generator=generator)
    size = len(order) // options.splits
    splits = list(order[: size * options.splits].split(size))
    noisy = torch.cat(splits[: options.noisy_splits])
    images, labels = data.train_images.clone(), data.train_labels.clone()
    if options.noise == "labels":
        labels[noisy] = torch.randint(data.num_classes, (len(noisy),), generator=generator)
    else:
        shape = (len(noisy), *images.shape[1:])
        images[noisy] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return replace(data, train_images=images, train_labels=labels), splits


def make_network(net: str, data: ImageData, options: argparse.Namespace) -> nn.Module:
    model = NETWORKS[net](*data.train_images.shape[1:], data.num_classes)
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.weight, options.bn_weight)
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(options.conv_scale)
    if options.last_layer == "zero":
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
    return model


def run(net: str, method: str, data: ImageData, options: argparse.Namespace, seed: int) -> dict:
    """Train one network with one method; return the usage and the loss of every step."""
    start = time.perf_counter()
    data, splits = planted(data, options, seed)
    torch.manual_seed(seed)
    model = make_network(net, data, options)
    inputs = data.train_images
    if net == "cnn_bn":  # a convolution to one channel is four times faster in this layout
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    policy = SplitPolicy(options.splits)
    kind = {"gar": GARUpdater, "nslr": NSLRUpdater}[method]
    updater = kind(policy, lr=options.meta_lr, accumulate=options.accumulate)
    batch_size = options.batch_size or max(1, len(data.train_images) // 50)
    steps = options.epochs * (len(data.train_images) // batch_size)
    sampler = SplitBatchSampler(policy, splits, batch_size, steps)

    # For GAR every step is captured for its own rewards while its gradient rewards the step
    # before, so two engines take turns.
    engine, previous = GradientAlignment(model), GradientAlignment(model)
    gar = method == "gar"
    actions = None
    usage, losses = [], []
    for indices in sampler:
        drawn = sampler.actions(indices)
        images = inputs[indices].float().div_(255).sub_(options.pixel_offset)
        optimizer.zero_grad()
        with engine.capture() if gar else nullcontext():
            loss = cross_entropy(model(images), data.train_labels[indices])
            loss.backward()
        if actions is not None:
            updater.step(actions, previous.align() if gar else loss)
        optimizer.step()
        actions, engine, previous = drawn, previous, engine
        usage.append(policy.usage())
        losses.append(loss.detach())
    table: Tensor = torch.stack(usage)
    return {
        "net": net,
        "method": method,
        "seed": seed,
        "noisy": float(table[:, : options.noisy_splits].mean()),
        "others": float(table[:, options.noisy_splits :].mean()),
        "final_loss": float(torch.stack(losses[-20:]).mean()),
        "seconds": time.perf_counter() - start,
        "usage": [
            [float(row[: options.noisy_splits].mean()), float(row[options.noisy_splits :].mean())]
            for row in table[:: max(1, steps // 100)]
        ],
        "losses": torch.stack(losses)[:: max(1, steps // 100)].tolist(),
    }


def table(results: list[dict]) -> str:
    """Like Table 1: usage of the noisy and of the other splits, mean ± 95 % interval."""
    lines = [
        "| net | method | noisy | others | paper: noisy / others | final loss | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for net, method in dict.fromkeys((r["net"], r["method"]) for r in results):
        rows = [r for r in results if (r["net"], r["method"]) == (net, method)]
        columns = [interval([r[key] for r in rows]) for key in ("noisy", "others")]
        paper = "{} / {}".format(*PAPER[net, method])
        loss = statistics.mean(r["final_loss"] for r in rows)
        seconds = statistics.mean(r["seconds"] for r in rows)
        cells = [net, method, *columns, paper, f"{loss:.2f}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options.data)
    results = []
    for seed in range(options.seeds):
        for net in options.net:
            for method in options.method:
                results.append(run(net, method, data, options, seed))
                shown = {k: v for k, v in results[-1].items() if not isinstance(v, list)}
                print(shown, flush=True)
                (options.out / "toy.json").write_text(json.dumps(results))
    split_usage(results, options.epochs).savefig(options.out / "toy.png", dpi=110)
    print(f"\n{data.name}, {options.seeds} seeds, noise in the {options.noise}\n")
    print(table(results))


if __name__ == "__main__":
    main()
