"""Attributes that stay as they were made."""

from __future__ import annotations

from typing import Any, ClassVar


class FixedAttributes:
    """Refuses to change, once they are set, the attributes that others were built on."""

    _fixed: ClassVar[frozenset[str]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            kind = type(self).__name__
            raise AttributeError(f"{name} of {kind} cannot be changed; make a new {kind}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._fixed:
            raise AttributeError(f"{name} of {type(self).__name__} cannot be deleted")
        super().__delattr__(name)
