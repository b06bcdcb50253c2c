"""The mean of a model's weights over some steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ola_augment.alignment._fsdp import to_shard, to_whole
from ola_augment.alignment.proof import all_parameters
from ola_augment.training.given import are_counts, check_named


class MeanWeights:
    """A running mean, by the names of the parameters.

    Attributes:
        values: so far; none before the first :meth:`take`.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._count = 0

    def clear(self) -> None:
        """Begin anew."""
        self.values, self._count = {}, 0

    def take(self, model: nn.Module) -> None:
        """Let today's weights in; with a layer that was replaced the mean begins anew."""
        shapes = {name: value.shape for name, value in self.values.items()}
        parameters = all_parameters(model)
        if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
            self.clear()
        self._count += 1
        for name, parameter in parameters.items():
            value = parameter.detach()
            if name in self.values:
                self.values[name].lerp_(value, 1 / self._count)
            else:
                self.values[name] = value.clone()

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, and of how many steps they are the mean."""
        values = {name: to_whole(value) for name, value in self.values.items()}
        return {"mean": values, "count": self._count}

    def checked(self, mean: Any, count: Any, model: nn.Module) -> Callable[[], None]:
        """A function that restores :meth:`state_dict`; until it is called nothing changes.

        Raises:
            ValueError: the state is damaged, or of another model.
        """
        if not are_counts(count):
            raise ValueError("the state of the mean of weights is damaged")
        check_named("mean weight", mean, known := all_parameters(model))

        def restore() -> None:
            self.values = {name: to_shard(value, known[name]) for name, value in mean.items()}
            self._count = int(count)

        return restore
