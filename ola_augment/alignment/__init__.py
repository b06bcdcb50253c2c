"""Per-example gradient alignments, exact, for the price of about one forward pass."""

from ola_augment.alignment.backpack import BackPACKAlignment
from ola_augment.alignment.directional import DirectionalAlignment
from ola_augment.alignment.engine import GradientAlignment
from ola_augment.alignment.rules import register_rule
from ola_augment.alignment.tape import NotFinite

__all__ = [
    "BackPACKAlignment",
    "DirectionalAlignment",
    "GradientAlignment",
    "NotFinite",
    "register_rule",
]
