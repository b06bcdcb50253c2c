"""One model against its oracle: is the engine exact on it, does it refuse, or is it wrong?"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import ola_augment
from ola_augment.alignment import GradientAlignment

BATCH = 4
PACKAGE = str(Path(ola_augment.__file__).parent)


@dataclass
class Case:
    """A model in double precision, its inputs for a seed, and what it may be told.

    ``inputs``: generator -> (args, kwargs), examples along dimension 0 of every tensor.
    ``call``: how a step runs the model, where that is not ``model(*args, **kwargs)``.
    """

    model: nn.Module
    inputs: Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    call: Callable[..., Any] | None = None
    randomize: bool = True


@dataclass
class Verdict:
    """``status``: exact, refused, wrong, crashed, not finished in time, or broken: the model fails
    without the engine.
    """

    status: str
    error: float = 0.0
    cause: str = ""


def check(case: Case, fallback: bool = False) -> dict[str, Verdict]:
    """Verdicts in evaluation and training mode, each after a first and a later capture."""
    model = case.model.double()
    generator = torch.Generator().manual_seed(0)
    if case.randomize:
        randomize(model, generator)
    batches = [case.inputs(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return {
        mode: _judge(_Run(model, case.call or _call, mode == "train", fallback), batches)
        for mode in ("eval", "train")
    }


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Move every weight, so that layer scales that start at zero hide nothing."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point():
                continue
            spread = 0.2
            if p.dim() > 1:
                fan_in = p[0].numel()
                spread = max(0.3 * float(p.std()), 0.3 * fan_in**-0.5) if p.numel() > 1 else 0.2
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_(noise.clamp(-3, 3).to(p), alpha=spread)


def _call(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def losses(outputs: Any) -> Tensor:
    """(B,) one loss an example, of every floating tensor that has a row for each."""
    total: Any = 0.0
    for index, leaf in enumerate(_tensors(outputs)):
        if leaf.is_floating_point() and leaf.requires_grad and leaf.shape[:1] == (BATCH,):
            rows = leaf.reshape(BATCH, -1)
            generator = torch.Generator().manual_seed(index)
            weights = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
            total = total + (rows * weights.to(rows) + 0.3 * rows**2).mean(1).double()
    if not isinstance(total, Tensor):
        raise ValueError("no output has a row for each example")
    return total


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors of an output; of a dictionary (Hugging Face's outputs are), of its values."""
    if isinstance(outputs, dict):
        outputs = [value for key, value in outputs.items() if key != "past_key_values"]
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _seeded(function: Callable[..., Any], *args: Any) -> Any:
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    return function(*args)


class _Casts(TorchFunctionMode):
    """Notes whether a model rounds to single precision inside (some norms do)."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.requires_grad:
            self.found = True
        return result


@dataclass
class _Truth:
    alignments: Tensor | None  # None where BatchNorm mixes: then only their sum is compared
    sum: float
    gradients: dict[str, Tensor]
    rounds: bool


def direction(model: nn.Module) -> dict[str, Tensor]:
    """The reference gradient: random."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _mixes(model: nn.Module) -> bool:
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()
    )


def _oracle(model: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> _Truth:
    """One autograd.grad per loss term."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    g = direction(model)
    with _Casts() as casts:
        terms = losses(_seeded(call, model, args, kwargs))
    rows, sums = [], {n: torch.zeros_like(p) for n, p in parameters.items()}
    for term in terms:
        found = torch.autograd.grad(
            term, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        total = 0.0
        for (name, _), gradient in zip(parameters.items(), found, strict=True):
            if gradient is not None:
                total += float((gradient * g[name].conj()).sum().real)
                sums[name] += gradient
        rows.append(total)
    alignments = torch.tensor(rows, dtype=torch.float64)
    return _Truth(None if _mixes(model) else alignments, float(alignments.sum()), sums, casts.found)


@dataclass
class _Run:
    """One model in one mode."""

    model: nn.Module
    call: Callable[..., Any]
    training: bool
    fallback: bool
    frozen_statistics: bool = False

    def begin(self) -> None:
        """Into its mode, by way of the other one: some models keep caches in evaluation mode."""
        self.model.zero_grad()
        self.model.train()
        self.model.train(self.training)
        for module in self.model.modules():
            if self.frozen_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _judge(run: _Run, batches: list[Any]) -> Verdict:
    model, worst = run.model, 0.0
    engine = None
    for args, kwargs in batches:
        run.begin()
        try:
            truth = _oracle(copy.deepcopy(model), run.call, args, kwargs)
        except Exception as error:
            return Verdict("broken", cause=_first_line(error))
        if not math.isfinite(truth.sum):
            return Verdict("broken", cause="its gradients are not finite")
        try:
            engine = engine or GradientAlignment(model, storage="exact", fallback=run.fallback)
            with engine.capture():
                losses(_seeded(run.call, model, args, kwargs)).sum().backward()
            damaged = _damaged(model, truth)
            found = engine.align(direction(model)).double()
        except Exception as error:
            return _refusal(error)
        worst = max(worst, _error(found, truth))
        if damaged or not worst < (1e-4 if truth.rounds else 1e-9):
            return Verdict("wrong", worst, damaged)
    if _mixes(model):  # so that only sums were compared: now example by example
        verdict = _judge(dataclasses.replace(run, frozen_statistics=True), batches)
        verdict.error = max(verdict.error, worst)
        return verdict
    return Verdict("exact", worst)


def _error(found: Tensor, truth: _Truth) -> float:
    if truth.alignments is None:
        return abs(float(found.sum()) - truth.sum) / float(found.abs().sum())
    return float((found - truth.alignments).norm() / truth.alignments.norm())


def _damaged(model: nn.Module, truth: _Truth) -> str:
    """Parameters whose gradient inside the capture is not the true one."""
    largest = max(float(g.abs().max()) for g in truth.gradients.values() if g.numel())
    tolerance = (1e-3 if truth.rounds else 1e-8) * largest
    bad = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad
        and not torch.allclose(
            torch.zeros_like(p) if p.grad is None else p.grad,
            truth.gradients[name],
            rtol=1e-3 if truth.rounds else 1e-8,
            atol=tolerance,
        )
    ]
    return f"the capture changed the gradient of {bad[0]}" if bad else ""


def _refusal(error: Exception) -> Verdict:
    """Raised on purpose by the package, or by accident somewhere else."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    meant = last.filename.startswith(PACKAGE) and (last.line or "").lstrip().startswith("raise")
    where = "" if meant else f" ({Path(last.filename).name}:{last.lineno})"
    status = "refused" if meant else "crashed"
    return Verdict(status, cause=f"{type(error).__name__}: {_first_line(error)}{where}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
