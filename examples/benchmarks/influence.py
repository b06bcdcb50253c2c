"""Influence scores <grad l_i, g_r> of a batch for R references: the engine beside other ways.

The references are the gradients of R test examples. Processor time of one thread for all scores,
over that of a plain forward and backward pass; both in turns, medians. captum's and dattri's TracIn
take the test examples themselves: their time has the references' gradients in it. Every way is
compared with one backward for each example in double precision; libraries that are not installed
are left out.

    pip install captum opacus dattri traker
    OMP_NUM_THREADS=1 python examples/benchmarks/influence.py --references 1 16
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from networks import make_network
from timing import medians
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import GradientAlignment

# A stack of references, name -> (R, *shape), to the scores (R, B).
Scores = Callable[[dict[str, Tensor]], Tensor]
Batch = tuple[Tensor, Tensor]


def gradients_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of each example's loss: name -> (R, *shape)."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = F.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


def with_engine(model: nn.Module, x: Tensor, y: Tensor) -> Scores:
    engine = GradientAlignment(model, storage="exact")

    def scores(stack: dict[str, Tensor]) -> Tensor:
        with engine.capture() as captured:
            F.cross_entropy(model(x), y, reduction="sum").backward()
        model.zero_grad()
        return captured.align(stack)

    return scores


def with_vmap(model: nn.Module, x: Tensor, y: Tensor) -> Scores:
    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, parameters, image.unsqueeze(0))
        return F.cross_entropy(outputs, target.unsqueeze(0))

    gradients = vmap(grad(loss), (None, 0, 0))

    def scores(stack: dict[str, Tensor]) -> Tensor:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        found = gradients(parameters, x, y)
        return (
            torch.stack([found[n].flatten(1) @ one.flatten(1).T for n, one in stack.items()])
            .sum(0)
            .T
        )

    return scores


def with_backwards(model: nn.Module, x: Tensor, y: Tensor) -> Scores:
    def scores(stack: dict[str, Tensor]) -> Tensor:
        rows = []
        for image, target in zip(x.split(1), y.split(1), strict=True):
            loss = F.cross_entropy(model(image), target)
            own = torch.autograd.grad(loss, [p for _, p in model.named_parameters()])
            rows.append(
                sum(s.flatten(1) @ g.flatten() for s, g in zip(stack.values(), own, strict=True))
            )
        return torch.stack(rows, 1)  # type: ignore[arg-type]

    return scores


def with_opacus(model: nn.Module, x: Tensor, y: Tensor) -> Scores:
    module = importlib.import_module("opacus.grad_sample").GradSampleModule(
        copy.deepcopy(model).train(), loss_reduction="sum"
    )  # it sees nothing in evaluation mode; the network has no layer to which that matters

    def scores(stack: dict[str, Tensor]) -> Tensor:
        F.cross_entropy(module(x), y, reduction="sum").backward()
        own = {n.removeprefix("_module."): p.grad_sample for n, p in module.named_parameters()}
        module.zero_grad()
        return sum(one.flatten(1) @ own[n].flatten(1).T for n, one in stack.items())  # type: ignore[return-value]

    return scores


def captum_tracin(model: nn.Module, train: Batch, test: Batch) -> Callable[[], Tensor]:
    tracin = importlib.import_module("captum.influence").TracInCP(
        model,
        DataLoader(TensorDataset(*train), len(train[0])),
        ["as it is"],
        lambda *_: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=None,
        sample_wise_grads_per_batch=True,
    )
    return lambda: tracin.influence(test)


def dattri_tracin(
    model: nn.Module, train: Batch, test: Batch, exact: bool = True
) -> Callable[[], Tensor]:
    def loss(parameters: dict[str, Tensor], data: Batch) -> Tensor:
        image, target = data
        outputs = functional_call(model, parameters, (image.unsqueeze(0),))
        return F.cross_entropy(outputs, target.unsqueeze(0))

    task = importlib.import_module("dattri.task").AttributionTask(loss, model, model.state_dict())
    tracin = importlib.import_module("dattri.algorithm.tracin").TracInAttributor(
        task, torch.ones(1), normalized_grad=False
    )
    if exact:  # its constructor projects to 512 dimensions whatever it is given
        tracin.projector_kwargs = None
    train_loader, test_loader = (DataLoader(TensorDataset(*b), len(b[0])) for b in (train, test))

    def scores() -> Tensor:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            found: Tensor = tracin.attribute(train_loader, test_loader)
        return found.T

    return scores


def with_trak(model: nn.Module, x: Tensor, y: Tensor) -> Scores:
    """Gradients of the margin, without projection, times the loss's derivative by it."""
    computer = importlib.import_module("trak.gradient_computers").FunctionalGradientComputer(
        model,
        importlib.import_module("trak.modelout_functions").ImageClassificationModelOutput(),
        sum(p.numel() for p in model.parameters()),
        torch.float32,
        torch.device("cpu"),
    )

    def scores(stack: dict[str, Tensor]) -> Tensor:
        own = computer.compute_per_sample_grad((x, y))
        along = sum(one.flatten(1) @ own[n].flatten(1).T for n, one in stack.items())
        return -along * computer.compute_loss_grad((x, y)).flatten()  # type: ignore[operator]

    return scores


WAYS = {
    "engine": with_engine,
    "vmap of grad": with_vmap,
    "Opacus": with_opacus,
    "TRAK's gradients": with_trak,
    "one backward each": with_backwards,
}
# Of test examples, not of their gradients.
TRACIN = {
    "captum's TracInCP": captum_tracin,
    "dattri's TracInAttributor": functools.partial(dattri_tracin, exact=False),
    "dattri's TracInAttributor, no projection": dattri_tracin,
}


def time_of(run: Callable[[], object], plain: Callable[[], object], repeats: int) -> float:
    """Median processor time over that of a plain pass, in turns."""
    times = medians({"run": run, "plain": plain}, repeats)
    return times["run"] / times["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--references", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = make_network(arguments.model, 10).eval()
    x, y = torch.randn(arguments.batch, 3, 32, 32), torch.randint(10, (arguments.batch,))

    def plain() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    exact = with_backwards(copy.deepcopy(model).double(), x.double(), y)
    print("| references | way | of a plain pass | largest relative error |\n|---|---|---|---|")
    for references in arguments.references:
        test = torch.randn(references, 3, 32, 32), torch.randint(10, (references,))
        stack = gradients_of(model, *test)
        truth = exact({n: one.double() for n, one in stack.items()})
        for name in (*WAYS, *TRACIN):
            try:
                if name in WAYS:
                    run = functools.partial(WAYS[name](model, x, y), stack)
                else:
                    run = TRACIN[name](model, (x, y), test)
            except ImportError as missing:
                print(f"{name}: left out ({missing})", file=sys.stderr)
                continue
            error = float((run().detach() - truth).norm() / truth.norm())
            ratio = time_of(run, plain, arguments.repeats)
            print(f"| {references} | {name} | {ratio:.2f} | {error:.0e} |", flush=True)


if __name__ == "__main__":
    main()
