"""Per-example gradient alignments, exact, for the price of about one forward pass."""

from typing import TYPE_CHECKING, Any

from ola_augment.alignment.directional import DirectionalAlignment
from ola_augment.alignment.engine import GradientAlignment
from ola_augment.alignment.method.captured import NotFinite
from ola_augment.alignment.method.rules import register_rule

if TYPE_CHECKING:
    from ola_augment.alignment.backpack import BackPACKAlignment

__all__ = [
    "BackPACKAlignment",
    "DirectionalAlignment",
    "GradientAlignment",
    "NotFinite",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    """BackPACK is imported by who uses it, not by who imports the package."""
    if name == "BackPACKAlignment":
        from ola_augment.alignment.backpack import BackPACKAlignment

        return BackPACKAlignment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
