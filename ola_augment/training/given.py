"""Numbers and tensors that come from people and from states, looked at before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def counted(number: float, noun: str) -> str:
    """Such as 1 pair, or 3 pairs."""
    return f"{number:.0f} {noun}{'s' * (number != 1)}"


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or below the least.

    Raises:
        ValueError: it is.
    """
    if not are_counts(value) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def are_counts(*values: Any) -> bool:
    """Whether these are whole numbers of 0 or more."""
    whole = (isinstance(value, int) and not isinstance(value, bool) for value in values)
    return all(whole) and all(value >= 0 for value in values)


def check_named(what: str, values: Any, known: Mapping[str, Tensor]) -> None:
    """Refuse a state's tensors that do not fit those of the same names.

    Raises:
        ValueError: with the first name of one that does not.
    """
    for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
        if name not in known or not isinstance(value, Tensor) or value.shape != known[name].shape:
            raise ValueError(f"state's {what} of {name!r} does not fit the model")
