"""Per-example gradient alignments, exact, for the price of about one forward pass."""

from .backpack import BackPACKAlignment
from .directional import DirectionalAlignment
from .engine import GradientAlignment

__all__ = ["BackPACKAlignment", "DirectionalAlignment", "GradientAlignment"]
