"""Layer rules: for each function, how its parameters' per-example gradients meet a tangent."""

# The later ones replace what `generic` says of the same function.
from ola_augment.alignment.method.rules import generic, layers  # noqa: F401, I001
from ola_augment.alignment.method.rules import convolutions, elementwise, normalization  # noqa: F401
from ola_augment.alignment.calls.registry import RULES
from ola_augment.alignment.method.rules import composite  # noqa: F401
from ola_augment.alignment.method.rules.generic import differentiable
from ola_augment.alignment.method.rules.rule import register_rule

__all__ = ["RULES", "differentiable", "register_rule"]
