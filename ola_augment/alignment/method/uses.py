"""One use of parameters by a call that meets them with data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment.calls.arguments import Function, name_of, tensors_in
from ola_augment.alignment.calls.expressions import Node, RandomState
from ola_augment.alignment.calls.layout import Assumed, Layout, candidates
from ola_augment.alignment.calls.registry import MakeTerm, rule_of
from ola_augment.alignment.method.tape import Tape
from ola_augment.alignment.proof import Decision, Located, Unrelated

# A node that a call reads, the shape of its tensor, and the term that the use gives.
NodeUse = tuple[Node, torch.Size, MakeTerm]


class Call:
    """A call that meets parameters with data, about to run.

    Args:
        function: called with ``args`` and ``kwargs``.
        args: its arguments.
        kwargs: the same.
        names: the parameters that it reads.
        uses: its rule's uses of them, None where it has no rule.
    """

    def __init__(
        self,
        function: Function,
        args: Any,
        kwargs: Any,
        names: frozenset[str],
        uses: list[NodeUse] | None,
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.names, self.uses = names, uses
        tensors = tensors_in((*args, *kwargs.values()))
        self._state = RandomState(next(tensors).device) if uses is None else None

    def draws(self) -> RandomState | None:
        """The random state before the call, where it has no rule and drew from it."""
        return self._state if self._state and self._state.moved() else None

    def without_rule(self) -> str:
        """The message where the function has none."""
        return (
            f"{name_of(self.function)} reads parameter {listed(self.names)} and has no alignment "
            "rule; freeze the parameter (requires_grad=False), register a rule (register_rule) or "
            "pass fallback=True, which differentiates that function twice more"
        )


class LocatedUse(Located):
    """One output of a call that reads parameters and data.

    ``constant``: the same whatever the examples are.
    """

    def __init__(
        self, function: Function, names: frozenset[str], output: Tensor, tape: Tape
    ) -> None:
        super().__init__(output, name_of(function), tape)
        self.names = names
        self.constant = False

    def by_contract(self, about: Call, output: Tensor, batch: int) -> None:
        """Outside of the forward pass (a head, the loss): dimension 0, where that is clear."""
        rule = rule_of(about.function)
        leading = output.dim()
        if rule is not None:
            leading = rule.leading(*about.args, output=output, **about.kwargs)
        possible = list(candidates(output.shape, range(leading), batch))
        clear = possible == [Layout(0, 1, batch, 1)]
        self.settle(Assumed(0, 1, batch, 1) if clear else Unrelated.UNCLEAR, batch)

    def settle(self, decision: Decision, batch: int) -> None:
        """Where the examples lie was found out; refused where it was not."""
        if isinstance(decision, Layout):
            self.layout = decision
            return
        if not self.shape:
            raise RuntimeError(
                f"{self.name} of parameter {listed(self.names)} gives one number, which belongs to "
                "no example: take a penalty outside of capture(), in a backward() of its own or as "
                "the optimizer's weight_decay, and multiply a learned weight with the examples' "
                'own losses (reduction="none") before their mean or sum. If it comes of data, '
                "call the model itself on them, not a part of it"
            )
        raise RuntimeError(
            f"{self.name} reads parameter {listed(self.names)} and gives a "
            f"tensor of shape {tuple(self.shape)} in which the {batch} examples of the batch "
            "could not be told apart: changing one example does not change its own rows alone. "
            "(The examples are the rows of the first tensor that the model is called with; an "
            "argument with as many rows is taken for theirs. Make a mask or table that only "
            "happens to have as many a buffer, and stack a list of images.) "
            "Keep examples along one dimension, do not mix them, or freeze the parameter. "
            "Where the number of rows depends on the data (a mixture of experts), run every "
            "expert on all rows and multiply by its gates, or use DirectionalAlignment"
        )


def differentiated(
    function: Function, args: Any, kwargs: Any
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Of a call of ``backward`` or ``autograd.grad``: losses, their gradients, and for what."""
    method = function is Tensor.backward
    args = (*args, *(None,) * 3)
    losses = list(tensors_in((kwargs.get("outputs", args[0]),)))
    weights = kwargs.get("gradient", args[1]) if method else kwargs.get("grad_outputs", args[2])
    inputs = kwargs.get("inputs", None if method else args[1])
    given: list[Tensor | None] = [*tensors_in((weights,))]
    return losses, given or [None for _ in losses], list(tensors_in((inputs,)))


def listed(names: Iterable[str]) -> str:
    """Names in a message."""
    return ", ".join(repr(name) for name in sorted(names))


def roundings_of(function: str, delta: Tensor, shape: torch.Size) -> float:
    """How many roundings torch's own gradient of a parameter may be off by.

    On a CPU a convolution adds up its bias's gradient one by one (off by 1e-3 at 224 pixels, a
    tenth of its summands' eps). A product's errors add up like random numbers, but where the
    summands cancel, as behind normalisations, they are those of larger numbers: seen in training
    was 1.2 times the root. In 16 bits most sums are kept in 32; those that are not come to a halt:
    of 1,024 rows, the gradient of a LayerNorm's bias is half of what it should be.
    """
    if not shape:
        return 0.0
    if torch.finfo(delta.dtype).bits == 16:
        one_by_one = delta.device.type == "cpu" and function in _ONE_BY_ONE
        return delta.numel() / max(1, shape[-1]) / 4 if one_by_one else 0.0
    summands = delta.numel() / max(1, shape[0])
    return summands / 4 if len(shape) == 1 else min(8 * summands**0.5, _MOST_ROUNDINGS)


#: Whose parameters' gradients torch adds up one by one in 16 bits, on a CPU.
_ONE_BY_ONE = ("layer_norm", "embedding")

#: Of a product: a hidden use of 1e-3 is seen in single precision.
_MOST_ROUNDINGS = 4096.0


NO_SECOND_ORDER = (
    "a differentiable backward (create_graph=True) inside capture() cannot be aligned; compute "
    "gradient penalties outside"
)

WITH_BACKPACK = (
    "a backward with BackPACK's extensions inside capture(): its hooks and the engine's change "
    "what each other sees; run them one after the other, or use BackPACKAlignment"
)

RELEASED = (
    "a second backward inside capture() went through a graph that the first one freed; pass "
    "retain_graph=True to the first"
)

TOO_EARLY = (
    "backward() inside forward() reached parameters before the pass was verified; run it after the "
    "model returned"
)
