"""Images per second of augmentation, beside the libraries people use now.

    python examples/benchmarks/augment.py                    # CPU, with 1 and with 2 threads
    python examples/benchmarks/augment.py --device cuda      # the batched kernels, and their share
                                                             # of a WRN-28-10 training step

Every method gets the same images in the form it likes best (uint8 tensors, PIL images or float
tensors), prepared before the clock starts. Times are medians of repeats in which the methods take
turns. The CPU run exits with 1 if a ratio of the one-thread table is below its threshold. Single
images and loaders are in ``per_image.py``, albumentations and DALI in ``peers.py``, floats and 16
bits in ``depths.py``, the first call in ``startup.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Threads of the method before must not spin on the cores that the next one is given.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import kornia
import torch
from timing import medians, synchronised
from torch import Tensor
from torchvision.transforms import v2

from ola_augment import PolicyTransform, UniformPolicy
from ola_augment.operations import compile_kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from photographs import crops
from pillow_reference import pillow_chains, to_pil

SIZES = [(256, 32), (32, 224)]
SLOTS = 4

OURS = "ola_augment, uint8"
TORCHVISION = "torchvision RandAugment(num_ops=4), tensors"
TORCHVISION_PIL = "torchvision RandAugment(num_ops=4), PIL"
TRIVIAL = "torchvision TrivialAugmentWide, tensors"
KORNIA = "kornia RandAugment(n=4), float"
PILLOW = "Pillow loop, the same operations"
TIMM = "timm rand-m8-n4, PIL"

DRAWS = {
    OURS: "4 operations, magnitudes and signs per image",
    TORCHVISION: "4 operations and signs per image, one magnitude for all",
    TORCHVISION_PIL: "4 operations and signs per image, one magnitude for all",
    TRIVIAL: "1 operation, magnitude and sign per image",
    KORNIA: "4 operations for the whole batch",
    PILLOW: "4 operations, magnitudes and signs per image",
    TIMM: "4 operations per image, each applied with probability 1/2",
}

#: (side, method) -> how many times as fast ola_augment must be on one thread.
THRESHOLDS = {
    (32, TORCHVISION): 40,
    (32, KORNIA): 8,
    (32, PILLOW): 15,
    (224, TORCHVISION): 6,
    (224, KORNIA): 8,
    (224, PILLOW): 3,
}
#: Drawing 256 times may cost this share of applying what was drawn to 256 x 32x32.
DRAW_SHARE = 0.25


def ours(device: str = "cpu") -> PolicyTransform:
    """WideLong, four operations for every image, all of them applied."""
    return PolicyTransform(UniformPolicy("wide_long", num_ops=SLOTS, keep_prob=1.0)).to(device)


def methods(images: Tensor) -> dict[str, Callable[[], object]]:
    """What to time: each augments all of the images once."""
    floats, pictures = images / 255, [to_pil(image) for image in images.numpy()]
    augment, policy = ours(), UniformPolicy("wide_long", num_ops=SLOTS, keep_prob=1.0)
    rand_augment, trivial = v2.RandAugment(num_ops=SLOTS), v2.TrivialAugmentWide()
    kornia_augment = kornia.augmentation.auto.RandAugment(n=SLOTS, m=10)
    timed: dict[str, Callable[[], object]] = {
        OURS: lambda: augment.augment(images),
        TORCHVISION: lambda: [rand_augment(image) for image in images],
        TORCHVISION_PIL: lambda: [rand_augment(picture) for picture in pictures],
        TRIVIAL: lambda: [trivial(image) for image in images],
        KORNIA: lambda: kornia_augment(floats),
        PILLOW: lambda: pillow_chains(pictures, policy.space, policy.sample(len(pictures))),
    }
    if importlib.util.find_spec("timm"):
        from timm.data.auto_augment import rand_augment_transform

        timm_augment = rand_augment_transform("rand-m8-n4", {})
        timed[TIMM] = lambda: [timm_augment(picture) for picture in pictures]
    return timed


def measure_cpu(threads: int, repeats: int) -> dict[tuple[int, str], float]:
    """Print a table for a number of threads; return ours / theirs in images per second."""
    torch.set_num_threads(threads)
    ratios, rows = {}, {}
    for count, side in SIZES:
        # One thread's own time, whatever else the machine does.
        clock = time.process_time if threads == 1 else time.perf_counter
        times = medians(methods(crops(count, side)), repeats, clock, calls=10)
        for name, seconds in times.items():
            ratios[side, name] = seconds / times[OURS]
            rows.setdefault(name, []).append(f"{count / seconds:,.0f} | {ratios[side, name]:.1f}x")
    print(f"\n{threads} thread{'s' * (threads > 1)}:\n")
    print("| | draws |" + "".join(f" {count} x {side}x{side}, images/s | ratio |"
                                  for count, side in SIZES))  # fmt: skip
    print("|---|---|" + "---:|---:|" * len(SIZES))
    for name, cells in rows.items():
        print(f"| {name} | {DRAWS[name]} | {' | '.join(cells)} |")
    return ratios


def measure_draw(repeats: int) -> float:
    """Time of drawing over time of applying, for 256 images of 32x32."""
    images, augment = crops(256, 32), ours()
    _, actions = augment.augment(images)
    times = medians(
        {
            "draw": lambda: augment.policy.sample(256),
            "apply": lambda: augment.replay(images, actions),
        },
        10 * repeats,
        calls=10,
    )
    share = times["draw"] / times["apply"]
    print(f"\nDrawing 256 images takes {1e3 * times['draw']:.2f} ms, applying it to 32x32 "
          f"{1e3 * times['apply']:.2f} ms: {share:.2f} of it")  # fmt: skip
    return share


def measure_cuda(repeats: int) -> None:
    """Print the speed of the batched kernels and their share of a training step."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from networks import make_network

    print(f"\n{torch.cuda.get_device_name()}\n\n| | images/s |\n|---|---:|")
    augment = ours("cuda")

    for count, side in [(256, 32), (2048, 32), (32, 224), (256, 224)]:
        images = crops(count, side).cuda()
        floats = images / 255
        times = medians(
            {
                "uint8": synchronised(lambda images=images: augment.augment(images)),
                "float32": synchronised(lambda images=floats: augment.augment(images)),
            },
            repeats,
            time.perf_counter,
            calls=10,
        )
        for dtype, seconds in times.items():
            print(f"| {count} x {side}x{side} {dtype} | {count / seconds:,.0f} |")
    images = crops(256, 32).cuda()
    targets = torch.arange(256, device="cuda") % 10
    network = make_network("wrn-28-10", 10).cuda()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def step(augmented: bool) -> None:
        batch = augment.augment(images)[0] if augmented else images
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = network(batch / 255)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    times = medians(
        {
            "plain": synchronised(lambda: step(False)),
            "augmented": synchronised(lambda: step(True)),
        },
        repeats,
        time.perf_counter,
        calls=10,
    )
    share = 1 - times["plain"] / times["augmented"]
    print(f"\nWRN-28-10, batch 256 of 32x32, bfloat16 autocast: {1e3 * times['augmented']:.1f} ms "
          f"a step, of which augmentation {100 * share:.1f} %")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.device == "cuda":
        measure_cuda(options.repeats)
        return
    compile_kernels()
    missed = []
    for threads in options.threads:
        ratios = measure_cpu(threads, options.repeats)
        if threads == 1:
            missed += [
                f"{name} at {side}x{side}: {ratios[side, name]:.1f}x, at least {least}x wanted"
                for (side, name), least in THRESHOLDS.items()
                if ratios[side, name] < least
            ]
            share = measure_draw(options.repeats)
            if share > DRAW_SHARE:
                missed.append(f"drawing takes {share:.2f} of applying, at most {DRAW_SHARE} wanted")
    if missed:
        sys.exit("past a limit:\n" + "\n".join(missed))
    print("\nall limits kept")


if __name__ == "__main__":
    main()
