"""Layer rules: for each function, how its parameters' per-example gradients meet a tangent."""

from collections.abc import Callable
from typing import Any

from ola_augment.alignment.rules import convolution, elementwise, embedding, linear, normalization
from ola_augment.alignment.rules.rule import MakeTerm, Rule, Use

RULES: dict[Callable[..., Any], Rule] = {
    **linear.RULES,
    **convolution.RULES,
    **normalization.RULES,
    **embedding.RULES,
    **elementwise.RULES,
}

__all__ = ["RULES", "MakeTerm", "Rule", "Use"]
