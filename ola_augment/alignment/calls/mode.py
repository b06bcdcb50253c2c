"""Torch function modes of captures: which are active, when they rest, and what they refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.overrides import TorchFunctionMode


class Mode(TorchFunctionMode):
    """One that can rest, alone or with all others."""

    def __init__(self) -> None:
        super().__init__()
        #: Calls are run as they are.
        self.paused = False
        #: Whether to go on to the end, paused, after a refusal: other processes wait.
        self.defers = False
        #: What was refused, for whoever ends the pass to raise.
        self.refused: Exception | None = None

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is watched for a while, by this and by what other engines have active."""
        watching = [watch for watch in (self, *_ACTIVE) if not watch.paused]
        for watch in watching:
            watch.paused = True
        try:
            yield
        finally:
            for watch in watching:
                watch.paused = False

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """What is refused in the block is raised, or kept where other processes wait."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not self.defers:
                raise
            self.refuse(error)

    def refuse(self, error: Exception) -> None:
        """Keep a refusal, and watch no more."""
        self.refused = self.refused or error
        self.paused = True

    def activate(self) -> None:
        """Watch from now on."""
        _ACTIVE.append(self)
        self.__enter__()  # type: ignore[no-untyped-call]

    def deactivate(self) -> None:
        """No longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _ACTIVE.remove(self)


#: What watches captures under way, of all engines.
_ACTIVE: list[Mode] = []
