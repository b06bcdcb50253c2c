"""A pair of steps with alignments on a compiled model, over a pair of compiled plain steps.

Two ways with the reference first: captured, where the engine runs the model as it was written; and
one compiled function of the losses and their forward-mode derivative along g, without the engine
and its checks (BatchNorm's shares and dropout are beyond it). Medians of turns in one process, in
seconds of this thread; the error is relative to the engine in double precision.

    OMP_NUM_THREADS=1 python examples/benchmarks/compiled.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from networks import make_network
from timing import medians
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ola_augment.alignment import GradientAlignment

Batch = tuple[Tensor, Tensor]
Gradient = dict[str, Tensor]


def backward(model: nn.Module, batch: Batch) -> Gradient:
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return {
        name.removeprefix("_orig_mod."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def captured(model: nn.Module, engine: GradientAlignment, g: Gradient, batch: Batch) -> Tensor:
    model.zero_grad()
    with engine.capture(gradients=g) as examples:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    return examples.align()


def derivative_of(model: nn.Module) -> Callable[[Gradient, Batch], Tensor]:
    parameters = dict(model.named_parameters())

    def losses(values: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        outputs = functional_call(model, values, (images,))
        return F.cross_entropy(outputs, targets, reduction="none") / len(images)

    @torch.compile
    def both(values: dict[str, Tensor], g: Gradient, images: Tensor, targets: Tensor) -> object:
        return jvp(lambda own: losses(own, images, targets), (values,), (g,))

    def run(g: Gradient, batch: Batch) -> Tensor:
        model.zero_grad()
        own, alignments = both(parameters, g, *batch)  # type: ignore[misc]
        own.sum().backward()
        return alignments.detach()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small_cnn", help="as in examples/networks.py")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_network(args.model, 10)
    size = (args.batch, 3, 32, 32)
    first, second = ((torch.randn(size), torch.randint(10, size[:1])) for _ in range(2))
    as_written, compiled = copy.deepcopy(model), torch.compile(model)
    engine, eager = GradientAlignment(compiled), GradientAlignment(as_written)
    derivative = derivative_of(copy.deepcopy(model))
    ways: dict[str, Callable[[], object]] = {
        "compiled, plain": lambda: (backward(compiled, first), backward(compiled, second)),
        "compiled, captured as written": lambda: captured(
            compiled, engine, backward(compiled, first), second
        ),
        "compiled, one function with its derivative": lambda: derivative(
            backward(compiled, first), second
        ),
        "not compiled, plain": lambda: (backward(as_written, first), backward(as_written, second)),
        "not compiled, captured": lambda: captured(
            as_written, eager, backward(as_written, first), second
        ),
    }
    starts = {}
    for name, run in ways.items():
        start = time.perf_counter()
        run()
        starts[name] = time.perf_counter() - start
        run()
    times = medians(ways, args.pairs, time.thread_time)
    print("| pair | of the compiled plain pair | first pair, s |\n|---|---:|---:|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / times['compiled, plain']:.2f} | {starts[name]:.1f} |")
    g = backward(model, first)
    double = copy.deepcopy(model).double()
    exact = captured(
        double,
        GradientAlignment(double),
        {name: one.double() for name, one in g.items()},
        (second[0].double(), second[1]),
    )
    error = (derivative(g, second) - exact).norm() / exact.norm()
    print(f"error of the function with its derivative: {float(error):.0e}")


if __name__ == "__main__":
    main()
