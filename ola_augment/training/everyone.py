"""The augmented examples of all ranks, in one message: each learns from all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.training.ranks import gather_over_ranks

_FINE, _BAD, _ODD = 0.0, 1.0, 2.0


class Everyone:
    """Gathers the draws and signals of all ranks.

    Messages have room for the most numbers that a rank has sent so far; a rank that has more is
    asked again, so that there is one message a batch but for the first.

    Attributes:
        bad: whether a rank of the latest batch had nothing to tell.
        odd: whether, on a rank, draws and signals were not of the same examples.
        examples: of all ranks.
    """

    def __init__(self) -> None:
        self._room = 0
        self.bad = self.odd = False
        self.examples = 0

    def gather(
        self, parts: list[Actions], signal: tuple[Tensor, ...] | None, device: torch.device
    ) -> tuple[Actions, tuple[Tensor, ...]] | None:
        """Draws and signals of all ranks' examples, in the order of the ranks, on the CPU.

        Args:
            parts: draws of this rank.
            signal: what its updater rewards, (B,) each; None where something was not finite.
            device: of the model.

        Returns:
            The same on all ranks to the last bit; None where a rank is ``bad`` or ``odd``.
        """
        actions = Actions.cat(parts) if parts else None
        count = 0 if actions is None else len(actions.log_prob)
        state, fields = _BAD, list[Tensor]()
        if actions is not None and signal is not None:
            fits = all(part.shape == (count,) for part in signal)
            state, fields = (_FINE, [*actions, *signal]) if fits else (_ODD, [])
        columns = [
            field.detach().to("cpu", torch.float64).reshape(count, field.shape[1:].numel())
            for field in fields
        ]
        numbers = torch.cat(columns, dim=1).reshape(-1) if columns else torch.empty(0, device="cpu")
        found = self._exchange([state, float(count)], numbers, device)
        self.bad = any(float(row[0]) == _BAD for row in found)
        self.odd = any(float(row[0]) == _ODD for row in found)
        self.examples = int(sum(float(row[1]) for row in found))
        if self.bad or self.odd or not self.examples:
            return None
        rows = [row[3 : 3 + int(row[2])].reshape(int(row[1]), -1) for row in found if row[1]]
        shapes = [field.shape[1:] for field in fields]
        whole = torch.split(torch.cat(rows), [shape.numel() for shape in shapes], dim=1)
        found = [
            part.reshape(-1, *shape).to(field.dtype)
            for part, shape, field in zip(whole, shapes, fields, strict=True)
        ]
        size = len(Actions._fields)
        return Actions(*found[:size]), tuple(found[size:])

    def _exchange(self, told: list[float], numbers: Tensor, device: torch.device) -> list[Tensor]:
        head = torch.tensor([*told, len(numbers)], dtype=torch.float64, device="cpu")
        while True:
            message = torch.zeros(len(head) + self._room, dtype=torch.float64, device="cpu")
            sent = numbers[: self._room]
            message[: len(head) + len(sent)] = torch.cat((head, sent))
            found = gather_over_ranks(message, device)
            most = int(max(float(row[2]) for row in found))
            if most <= self._room:
                return found
            self._room = most
