"""What can look into :func:`~ola_augment.training.fit` while it runs: callbacks and loggers."""

from __future__ import annotations

import csv
import functools
import io
from pathlib import Path
from typing import Any

from ola_augment.files import write_atomically
from ola_augment.training.metrics import flatten


class Callback:
    """Called by :func:`~ola_augment.training.fit`; override what you need.

    What a callback raises ends the run; the latest checkpoint stays.

    Example:
        >>> class Stop(Callback):
        ...     def on_epoch(self, record):
        ...         if record["plain_accuracy"] > 0.99:
        ...             raise KeyboardInterrupt
    """

    def on_step(self, step: int, loss: float | None) -> None:
        """After each batch.

        Args:
            step: batches so far.
            loss: of the batch; None where it was skipped.
        """

    def on_epoch(self, record: dict[str, Any]) -> None:
        """After each epoch.

        Args:
            record: its metrics, as :func:`~ola_augment.training.fit` returns them; what is added
                to it is kept with them.
        """


class CSVLogger(Callback):
    """Writes the metrics of every epoch as a row of a CSV file, nested ones as ``name/part``.

    After each epoch the file is whole. A run that goes on (``resume``) keeps the rows of the
    epochs before, a new run replaces the file.

    Args:
        path: of the file.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> CSVLogger(path).on_epoch({"epoch": 1, "keep_probs": {"rotate": 0.9}})
        >>> path.read_text().split()
        ['epoch,keep_probs/rotate', '1,0.9']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Add a row.

        Args:
            record: with ``epoch``, a number.

        Raises:
            ValueError: the file is there and is no CSV file of epochs.
        """
        rows: list[dict[str, Any]] = []
        if record["epoch"] > 1 and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        try:
            rows = [row for row in rows if int(row["epoch"]) < record["epoch"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is no CSV file of epochs: {error!r}") from error
        rows.append(flatten(record))
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())


class TensorBoardLogger(Callback):
    """Writes the metrics of every epoch for TensorBoard, nested ones as ``name/part``.

    Needs the package ``tensorboard``. Scalars stand over the number of steps; the loss of every
    step is ``loss``.

    Args:
        log_dir: a directory for this run; ``tensorboard --logdir`` takes it or one above.

    Raises:
        ImportError: ``tensorboard`` is not installed.

    Example:
        >>> TensorBoardLogger("runs/first")  # doctest: +SKIP
    """

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoardLogger needs tensorboard: pip install tensorboard ({error})"
            ) from error
        self._open = functools.partial(SummaryWriter, str(log_dir))
        self.writer: Any = None  # until there is something to write

    def _writer_from(self, step: int) -> Any:
        """What an earlier run wrote from this step on, before it was resumed, is hidden."""
        if self.writer is None:
            self.writer = self._open(purge_step=step)
        return self.writer

    def on_step(self, step: int, loss: float | None) -> None:
        """Add the loss of a batch.

        Args:
            step: batches so far.
            loss: None adds nothing.
        """
        if loss is not None:
            self._writer_from(step).add_scalar("loss", loss, step)

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Add every number of an epoch.

        Args:
            record: with ``steps``.
        """
        writer = self._writer_from(record["steps"])
        for name, value in flatten(record).items():
            if isinstance(value, int | float) and name not in ("epoch", "steps"):
                writer.add_scalar(name, value, record["steps"])
        writer.flush()
