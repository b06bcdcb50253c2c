"""Layer rules: for each function, how its parameters' per-example gradients meet a tangent."""

# The later ones replace what `generic` says of the same function.
from ola_augment.alignment.rules import generic, layers, elementwise, normalization  # noqa: F401, I001
from ola_augment.alignment.rules.composite import COMPOSITES
from ola_augment.alignment.rules.generic import differentiable
from ola_augment.alignment.rules.rule import RULES, MakeTerm, Rule, Use, register_rule

__all__ = ["COMPOSITES", "RULES", "MakeTerm", "Rule", "Use", "differentiable", "register_rule"]
