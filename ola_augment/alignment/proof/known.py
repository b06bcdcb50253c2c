"""What was verified of a model, and when to look again."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ola_augment.alignment.calls.watch import Step
from ola_augment.alignment.proof.decisions import Decision
from ola_augment.alignment.proof.ranks import Ranks

#: Shapes whose layouts are remembered; the one used longest ago is forgotten first.
_SIGNATURES = 64


@dataclass
class Verified:
    """What is known of the forward passes of one signature.

    Attributes:
        decisions: where the examples lie in each use, wherever a path led to it.
        paths: numbers of whole passes, and of the rows looked up, that were verified.
        endings: what lies between the last uses of parameters and losses that keep examples apart.
        passes: how many there were.
    """

    decisions: OrderedDict[Step, Decision] = field(default_factory=OrderedDict)
    paths: set[tuple[int, int]] = field(default_factory=set)
    endings: set[tuple[str, ...]] = field(default_factory=set)
    passes: int = 0


class Proof:
    """What was verified of a model's forward passes and losses, by their signature.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.ranks = Ranks(device)
        self._known: OrderedDict[object, Verified] = OrderedDict()
        self._random = random.Random(0)

    def of(self, signature: object) -> Verified:
        """What is known of a signature, nothing at first."""
        known = self._known.pop(signature, None) or Verified()
        self._known[signature] = known
        if len(self._known) > _SIGNATURES:
            self._known.popitem(last=False)
        return known

    def due(self, known: Verified) -> bool:
        """Whether to verify before the pass.

        The first two times, as long as most passes take new paths, and ever more rarely at random.
        """
        known.passes += 1
        restless = 2 * len(known.paths) > known.passes
        return known.passes <= 2 or restless or self._random.random() < 2 / known.passes

    def forget(self, signatures: Iterable[object] | None = None) -> None:
        """They belong to a capture that failed; all by default."""
        for signature in list(self._known) if signatures is None else signatures:
            self._known.pop(signature, None)
