"""The shape of a rule, and the table of them, which `method.rules` fills.

Both rooms read it: what a function's parameters receive, and where its examples may lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ola_augment.alignment.calls.arguments import Function
from ola_augment.alignment.calls.layout import Layout

# From the gradient of a function's output, and the layout of its examples, to a term.
MakeTerm = Callable[[Tensor, Layout], Any]
# A tensor argument that may hold a parameter, and the term its use gives.
Use = tuple[Tensor | None, MakeTerm]


@dataclass(frozen=True)
class Rule:
    """What a function's parameters receive.

    Args:
        uses: called with the function's own arguments; yields a `Use` per argument that may hold a
            parameter. Nothing is computed before the output's gradient arrives.
        leading: called with the function's own arguments and ``output``; the number of leading
            dimensions of the output among which the examples may lie.
        subject: the argument whose values tell examples apart when the layout is verified: the
            first one, or None for the output. Its leading dimensions are those of the output.
    """

    uses: Callable[..., Iterator[Use]]
    leading: Callable[..., int]
    subject: int | None = 0


#: Function -> its rule. A function without one is refused where it reads parameters and data.
RULES: dict[Function, Rule] = {}


def rule_of(function: Function) -> Rule | None:
    """The rule of a function; ``torch.ops.aten.f.overload`` has that of ``torch.f``."""
    rule = RULES.get(function)
    if rule is None and isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(function).partition(".")
        name = name.partition(".")[0]
        for home in (torch, Tensor, torch._C._nn) if namespace == "aten" else ():
            if (rule := RULES.get(getattr(home, name, None))) is not None:  # type: ignore[arg-type]
                break
    return rule


#: Function -> what to run and watch in its place, where parameters meet data in it.
COMPOSITES: dict[Function, Function] = {}
