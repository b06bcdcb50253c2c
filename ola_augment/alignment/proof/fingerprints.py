"""What a run of a forward pass shows at each use of parameters, and what several say together."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ola_augment.alignment.calls.arguments import Function, named, tensors_in, writes_in_place
from ola_augment.alignment.calls.expressions import Node
from ola_augment.alignment.calls.layout import Layout
from ola_augment.alignment.calls.paths import LookUp
from ola_augment.alignment.calls.registry import rule_of
from ola_augment.alignment.calls.watch import Step, Watch
from ola_augment.alignment.proof.decisions import Decision, follows

_STATISTICS, _AFFINE = ("running_mean", "running_var"), ("weight", "bias")
_REST = ("training", "momentum", "eps")
_BATCH_NORM: dict[Function, tuple[str, ...]] = {
    F.batch_norm: ("input", *_STATISTICS, *_AFFINE, *_REST),
    **dict.fromkeys(
        (torch.batch_norm, torch.ops.aten.batch_norm.default, torch.ops.aten.batch_norm),
        ("input", *_AFFINE, *_STATISTICS, *_REST, "cudnn_enabled"),
    ),
}


#: What masks add to scores is larger.
_MASK = 1e30


# Which examples' rows to move, (batch,) bool, at the uses whose layout is known.
Disturbance = tuple[Tensor, Mapping[Step, Decision]]


class Fingerprints(Watch[bool]):
    """Records, per use of parameters, a projection of its subject along each dimension."""

    def __init__(
        self,
        nodes: Mapping[int, tuple[Tensor, Node]],
        batch: int,
        constants: set[Step],
        statistics: list[tuple[Tensor, Tensor]] | None,
        disturbed: Disturbance | None,
    ) -> None:
        super().__init__(nodes)
        # Batch statistics of the run on the batch itself: BatchNorm's share of the other examples
        # is documented, and must not hide what else mixes them.
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self._given = statistics
        self.batch = batch
        self.constants = constants
        self._disturbed = disturbed
        self.seen: OrderedDict[Step, dict[int, Tensor]] = OrderedDict()
        self.shapes: dict[Step, tuple[torch.Size, int]] = {}
        self.rounding: dict[Step, float] = {}
        #: Uses of data that derivatives flow back to.
        self.attached: set[Step] = set()

    def before(
        self, function: Function, args: Any, kwargs: Any, origin: bool
    ) -> tuple[Callable[[Tensor], int], Tensor | None, bool]:
        """What tells the examples of a call's outputs apart: one of its arguments, or they do."""
        attached = any(
            tensor.grad_fn is not None and self.node(tensor) is None
            for tensor in tensors_in((*args, *kwargs.values()))
        )
        rule = rule_of(function)
        if rule is None:
            return Tensor.dim, None, attached
        subject = args[rule.subject].detach() if rule.subject is not None else None
        if subject is not None and writes_in_place(function):
            subject = subject.clone()
        return lambda output: rule.leading(*args, output=output, **kwargs), subject, attached

    def current(self) -> bool:
        """All data are the batch's."""
        return True

    def looks_up(self, found: LookUp, function: Function, args: Any, kwargs: Any) -> None:
        """Record the rows of what is looked up in, so that its layout is found."""
        bound = list(named(function, args, kwargs).values())
        for number, _ in found.subjects:
            if number >= 0:
                subject = bound[number].detach()
                self.record((found.path, -1 - number), subject, subject, subject.dim())

    def met(self, about: Any, step: Step, output: Tensor, origin: bool) -> bool:
        """Record its rows."""
        if step in self.constants:
            return False
        leading, subject, attached = about
        if attached:
            self.attached.add(step)
        self.record(step, output, output if subject is None else subject, leading(output))
        return True

    def after(self, result: Any, step: Step) -> Any:
        """Move the chosen examples' rows, sign for sign."""
        chosen, decisions = self._disturbed or (None, {})
        layout = decisions.get(step)
        if (
            chosen is None
            or not isinstance(result, Tensor)
            or not isinstance(layout, Layout)
            or not result.is_floating_point()
        ):
            return result
        rows = chosen.repeat_interleave(layout.inner).repeat(layout.outer).to(result.device)
        if result.shape[layout.dim] != len(rows):  # what was moved before led to another path
            return result
        rows = rows.view(-1, *(1,) * (result.dim() - layout.dim - 1)).to(result.dtype)
        own = result.detach()
        size = float(own.abs().mean())
        if not size < _MASK:
            ordinary = own.abs()[own.abs() < _MASK]
            size = float(ordinary.mean()) if len(ordinary) else 0.0
        shift = torch.copysign(rows * (0.01 * size or 0.01), own)
        return torch.addcmul(shift, result, 1 + 0.1 * rows)

    def record(self, step: Step, output: Tensor, subject: Tensor, leading: int) -> None:
        """Keep what a later run is compared with."""
        self.shapes[step] = output.shape, leading
        double = subject.dtype in (torch.float64, torch.complex128)
        self.rounding[step] = 1e-11 if double else 1e-6
        self.seen[step] = self._project(subject, leading)

    def follows(self, step: Step, layout: Layout, rolled: Fingerprints) -> bool:
        """Whether a use's rows are rolled by one example in the run of the rolled batch."""
        other = rolled.seen.get(step, {}).get(layout.dim)
        own = self.seen[step][layout.dim]
        return other is not None and other.shape == own.shape and follows(layout, own, other)

    def run(self, function: Function, args: Any, kwargs: Any) -> Any:
        """A BatchNorm takes the statistics of the run on the batch itself."""
        names = _BATCH_NORM.get(function)
        if names is None:
            return function(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("training", False):
            x, seen = given["input"], len(self.statistics)
            if self._given is not None and seen < len(self._given):
                mean, variance = self._given[seen]
            else:
                wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
                _, mean, scale = torch.native_batch_norm(wide, None, None, None, None, True, 0, 0)
                variance = scale**-2
            self.statistics.append((mean, variance))
            known = [given.get(name) for name in ("weight", "running_mean")]
            dtype = next((part.dtype for part in known if part is not None), x.dtype)
            given |= {"running_mean": mean.to(dtype), "running_var": variance.to(dtype)}
            given["training"] = False
        given.pop("cudnn_enabled", None)
        return F.batch_norm(**given)

    def _project(self, tensor: Tensor, leading: int) -> dict[int, Tensor]:
        """Dimension -> (its size,) random projection of the others; -1: of everything, (1,)."""
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if tensor.numel() and not max(map(abs, map(float, tensor.aminmax()))) < _MASK:
            small = tensor.nan_to_num().abs().log1p() * tensor.nan_to_num().sign()
            tensor = torch.where(tensor.abs() < _MASK, tensor, small)  # masks
        dims = [d for d in range(min(leading, tensor.dim())) if tensor.shape[d] % self.batch == 0]
        if not dims:
            return {-1: _random_sum(tensor.reshape(1, -1))}
        others = {d: math.prod(tensor.shape[:d]) * math.prod(tensor.shape[d + 1 :]) for d in dims}
        return {
            d: _random_sum(tensor.movedim(d, 0).reshape(tensor.shape[d], others[d])) for d in dims
        }


def _random_sum(matrix: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(matrix.shape[1])
    weights = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype, device="cpu")
    return (matrix @ weights.to(matrix.device)).double().cpu()
