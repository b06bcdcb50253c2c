"""All operations, and some pairs of a learner, on an XLA device against the CPU.

    pip install torch==2.9.1 torch_xla==2.9.0
    PJRT_DEVICE=CPU python examples/reliability/xla.py
    PJRT_DEVICE=CPU python examples/reliability/xla.py --space rand_augment color contrast

Every operation of WideLong at every bin and both signs, uint8, uint16 and float32, nearest and
bilinear: integers must be equal, floats within 0.001 of a grey level (bilinear: 0.01). torch_xla's
CPU plugin shows what its compiler does to integers, and to products that are added; it needs an
environment of its own, as torch_xla is built for one version of torch.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
from torch import nn
from torchvision.transforms import InterpolationMode

from ola_augment import Actions, OLAAugment, OLALearner, SearchSpace
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions, apply_geometry_to_masks

#: In grey levels; XLA fuses what the CPU rounds in between.
BOUNDS = {InterpolationMode.NEAREST: 1e-3, InterpolationMode.BILINEAR: 1e-2}


def images(count: int, height: int = 24, width: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(count, 3, 5, 5, generator=generator) * 255
    large = nn.functional.interpolate(smooth, (height, width), mode="bilinear")
    noise = 20 * torch.rand(large.shape, generator=generator)
    return (large * 0.9 + noise).round().byte()


def every_bin(space: SearchSpace, op: int) -> Actions:
    """Both signs of every bin, an image each."""
    bins = torch.arange(space.num_magnitude_bins).repeat(2)
    n = len(bins)
    generator = torch.Generator().manual_seed(1)
    return Actions(
        num_ops=torch.ones(n, dtype=torch.int64),
        ops=torch.full((n, 1), op),
        keep=torch.ones(n, 1, dtype=torch.bool),
        magnitude_bins=bins[:, None],
        signs=torch.tensor([1, -1], dtype=torch.int8).repeat_interleave(n // 2)[:, None],
        centers=torch.rand(n, 1, 2, generator=generator),
        log_prob=torch.zeros(n),
    )


def check_operation(space: SearchSpace, op: int, device: torch.device) -> list[str]:
    """What is wrong with one operation."""
    name, actions, wrong = space.operations[op].name, every_bin(space, op), []
    geometric, whole = TABLE[name].geometric, images(actions.batch_size)
    deep = (whole.int() * 257 + whole.flip(0).int() % 200).clamp(max=65535).to(torch.uint16)
    for mode, bound in BOUNDS.items():
        if mode is InterpolationMode.BILINEAR and not geometric:
            continue
        for given, allowed in ((whole, 0.0), (deep, 0.0), (whole / 255, bound)):
            expected = apply_actions(given, space, actions, interpolation=mode)
            out = apply_actions(given.to(device), space, actions, interpolation=mode).cpu()
            top = 255 if given.is_floating_point() else 1
            off = (out.double() - expected.double()).abs() * top
            if float(off.max()) > allowed:
                share = 100 * float((off > allowed).double().mean())
                wrong.append(
                    f"{name}, {given.dtype}, {mode.value}: {share:.3g} % of the values are off, at "
                    f"most by {float(off.max()):.3g} levels"
                )
    if geometric:
        masks = apply_geometry_to_masks(whole[:, 0].to(device), space, actions).cpu()
        if not torch.equal(masks, apply_geometry_to_masks(whole[:, 0], space, actions)):
            wrong.append(f"{name}: masks differ")
    return wrong


def learn(device: torch.device, pairs: int) -> list[torch.Tensor]:
    """Alignments of some pairs, and what became of the logits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 3)
    ).to(device)
    augment = OLAAugment(generator=torch.Generator().manual_seed(0))
    learner = OLALearner(model, augment)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    data, targets = images(8), (torch.arange(8) % 3).to(device)
    rewards = []

    for _ in range(pairs):
        with learner.augmented_step():
            loss = nn.functional.cross_entropy(
                model(learner.augment(data.to(device)) / 255), targets
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with learner.plain_step() as step:
            nn.functional.cross_entropy(model(data.to(device) / 255), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(torch.tensor([step.stats.reward_mean, step.stats.reward_std]))
    return [torch.stack(rewards), *augment.policy.named_logits().values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operations", nargs="*", help="by name; all of the space if none is given")
    parser.add_argument("--space", default="wide_long", choices=("wide_long", "rand_augment"))
    parser.add_argument("--pairs", type=int, default=4, help="of a learner")
    options = parser.parse_args()
    import torch_xla

    device = torch_xla.device()
    space = getattr(SearchSpace, options.space)()
    names = [operation.name for operation in space.operations]
    chosen = [names.index(name) for name in options.operations or names]
    wrong = [line for op in chosen for line in check_operation(space, op, device)]
    print(f"{len(chosen)} operations: {len(wrong) or 'nothing'} wrong")
    if options.pairs:
        here, there = learn(torch.device("cpu"), options.pairs), learn(device, options.pairs)
        for one, other in zip(here, there, strict=True):
            if not torch.allclose(one, other, rtol=1e-2, atol=1e-4):
                wrong.append(
                    f"learner: {other.flatten()[:4].tolist()}, not {one.flatten()[:4].tolist()}"
                )
        print(f"{options.pairs} pairs of a learner: rewards {there[0][:, 0].tolist()}")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
