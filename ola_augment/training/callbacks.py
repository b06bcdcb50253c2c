"""What can look into :func:`~ola_augment.training.fit` while it runs."""

from __future__ import annotations

from typing import Any


class Callback:
    """Called by :func:`~ola_augment.training.fit`; override what you need.

    What a callback raises ends the run; the latest checkpoint stays.
    """

    def on_step(self, step: int, loss: float | None) -> None:
        """After each batch.

        Args:
            step: batches so far.
            loss: of the batch; None where it was skipped.
        """

    def on_epoch(self, record: dict[str, Any]) -> None:
        """After each epoch, with its metrics; what is added to ``record`` is kept with them."""
