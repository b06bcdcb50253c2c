"""Verifying where the examples lie, by running the model on a permuted batch."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ola_augment.alignment.layout import Layout, candidates
from ola_augment.alignment.rules import RULES
from ola_augment.alignment.tracking import Function, Tracker

# One use of parameters: the function, the parameters it reads, the shape of its output.
Key = tuple[Function, frozenset[str], torch.Size]


class Unrelated(Enum):
    """What a permuted batch says about a use whose examples do not lie along one dimension."""

    CONSTANT = "the values are the same for every order of the batch"
    UNCLEAR = "no layout, or more than one, agrees with the permutation"


Decision = Layout | Unrelated


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
}  # fmt: skip
# Noise is made constant, or it would not move with the examples. Bernoulli draws keep everything.
_NOISE: dict[Callable[..., Tensor], float] = {
    **dict.fromkeys((torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_), 1.0),
    **dict.fromkeys(
        (torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.normal,
         Tensor.uniform_, Tensor.normal_),
        0.5,
    ),
}  # fmt: skip


class _Fingerprints(Tracker):
    """Records, per use of parameters, a projection of its subject along each dimension."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buffers: list[Tensor],
        batch: int,
        constants: set[Key],
    ) -> None:
        super().__init__(parameters, buffers)
        self.batch = batch
        self.constants = constants
        self.seen: dict[Key, list[dict[int, Tensor]]] = defaultdict(list)
        self.leading: dict[Key, int] = {}

    def use(self, function: Function, args: Any, kwargs: Any, from_data: bool) -> Any:
        inputs = args[:1]
        rule = RULES.get(function)
        on_input = rule is not None and rule.subject is not None and inputs
        # An in-place function overwrites its input: look at it before.
        subject = inputs[0].detach().clone() if on_input and from_data else None
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor | tuple | list):
            return result
        if not from_data:
            self.follow(function, args, kwargs, result)
            return result
        for output in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(output, Tensor):
                continue
            key = (function, self.names(args, kwargs), output.shape)
            if key in self.constants:
                self.follow(function, args, kwargs, result)
                break
            leading = output.dim() if rule is None else rule.leading(*args, output=output, **kwargs)
            self.leading[key] = leading
            self.seen[key].append(self._project(output if subject is None else subject, leading))
        return result

    def other(self, function: Function, args: Any, kwargs: Any) -> Any:
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        result = function(*args, **kwargs)
        if function in _NOISE and result.is_floating_point():
            result.fill_(_NOISE[function])
        return result

    def _project(self, tensor: Tensor, leading: int) -> dict[int, Tensor]:
        """Dimension -> (its size,) random projection of the others; -1: of everything, (1,)."""
        tensor = tensor.detach()
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        dims = [d for d in range(min(leading, tensor.dim())) if tensor.shape[d] % self.batch == 0]
        if not dims:
            return {-1: _random_sum(tensor.reshape(1, -1))}
        return {d: _random_sum(tensor.movedim(d, 0).reshape(tensor.shape[d], -1)) for d in dims}


def _random_sum(matrix: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(matrix.shape[1])
    weights = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype)
    return (matrix @ weights.to(matrix.device)).double().cpu()


def _distance(left: Tensor, right: Tensor, scale: Tensor) -> float:
    return float((left - right).norm() / scale)


def _decide(
    key: Key,
    leading: int,
    plain: dict[int, Tensor],
    permuted: dict[int, Tensor],
    order: Tensor,
    tolerance: float,
) -> Decision | None:
    """Where the examples of one use lie; None where its values are not finite."""
    pairs = [(plain[dim], permuted[dim]) for dim in plain]
    if not all(bool(torch.isfinite(values).all()) for pair in pairs for values in pair):
        return None
    # A batch in another order changes a projection by its own size, or by next to nothing.
    if all(_distance(old, new, old.norm() + 1e-300) < 1e-4 * tolerance for old, new in pairs):
        return Unrelated.CONSTANT
    agreeing = []
    for layout in candidates(key[2], range(min(leading, len(key[2]))), len(order)):
        values = plain[layout.dim]
        spread = (values - values.mean()).norm()
        moved = layout.permute(values, order)
        if _distance(moved, permuted[layout.dim], spread + 1e-300) < tolerance:
            agreeing.append(layout)
    return agreeing[0] if len(agreeing) == 1 else Unrelated.UNCLEAR


def find_layouts(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
) -> dict[Key, Decision]:
    """Where the examples lie in each use of the parameters during ``model(*args, **kwargs)``.

    The forward pass runs without gradients on the batch and on a permutation of it; dropout and
    other noise are switched off; random states and buffers are left as they were. A layout is
    accepted where it is the only one that permutes the values in the same way. Uses whose values
    are not finite are absent.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(batch, generator=generator)
    while torch.equal(order, torch.arange(batch)):
        order = torch.randperm(batch, generator=generator)

    def move(tensor: Tensor) -> Tensor:
        return tensor[order.to(tensor.device)] if tensor.shape[:1] == (batch,) else tensor

    moved_args, moved_kwargs = tree_map_only(Tensor, move, (args, kwargs))
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters.values())
    tolerance = (
        0.2 if half or torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu") else 1e-2
    )
    buffers = list(model.buffers())
    constants: set[Key] = set()
    while True:
        runs: list[_Fingerprints] = []
        for inputs, named in ((args, kwargs), (moved_args, moved_kwargs)):
            fingerprints = _Fingerprints(parameters, buffers, batch, constants)
            with torch.no_grad(), _undisturbed(model, parameters), fingerprints:
                model(*inputs, **named)
            runs.append(fingerprints)
        decisions = _compare(runs[0], runs[1], order, tolerance)
        # What follows from a new constant was not looked at: look again.
        found = {key for key, decision in decisions.items() if decision is Unrelated.CONSTANT}
        if not found:
            return {**decisions, **dict.fromkeys(constants, Unrelated.CONSTANT)}
        constants |= found


def _compare(
    plain: _Fingerprints, permuted: _Fingerprints, order: Tensor, tolerance: float
) -> dict[Key, Decision]:
    decisions: dict[Key, Decision] = {}
    for key, occurrences in plain.seen.items():
        others = permuted.seen.get(key, [])
        found = {
            _decide(key, plain.leading[key], before, after, order, tolerance)
            for before, after in zip(occurrences, others, strict=False)
        }
        if len(occurrences) != len(others) or len(found) > 1:
            decisions[key] = Unrelated.UNCLEAR
        elif (decision := found.pop()) is not None:
            decisions[key] = decision
    return decisions


@contextlib.contextmanager
def _undisturbed(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Leave random states and buffers as they are."""
    devices = {p.device for p in parameters.values() if p.device.type == "cuda"}
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=list(devices)):
        try:
            # New storage for the while: the old one, and its version, stay untouched.
            for buffer, data in buffers:
                buffer.data = data.clone()
            yield
        finally:
            for buffer, data in buffers:
                buffer.data = data
