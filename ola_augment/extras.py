"""What an optional part of the package says when the package it stands on is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import optional packages; a missing one is reported with the extra that brings it.

    Args:
        extra: of ``pip install 'ola_augment[extra]'``.

    Yields:
        None: the imports stand inside.

    Raises:
        ModuleNotFoundError: one is not installed; the message says how to install it.

    Example:
        >>> with needs("kornia"):
        ...     import no_such_package
        Traceback (most recent call last):
        ModuleNotFoundError: no_such_package is not installed: pip install 'ola_augment[kornia]'
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("ola_augment"):
            raise
        raise ModuleNotFoundError(
            f"{missing.name} is not installed: pip install 'ola_augment[{extra}]'",
            name=missing.name,
            path=missing.path,
        ) from None
