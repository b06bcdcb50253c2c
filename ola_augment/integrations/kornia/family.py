"""An augmentation of kornia for each magnitude, as one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import kornia.augmentation as K
import torch
from torch import Tensor

from ola_augment.integrations.kornia.kernels import AugmentationKernel, Size, change_nothing


class KernelFamily:
    """One kornia augmentation for each magnitude: for arguments that are no random parameters.

    Args:
        make: magnitude -> augmentation.
        trials: magnitudes to try.
        channels: of the images that they are tried on.
        size: their height and width.

    Raises:
        TypeError: something else than a usable augmentation for one of them.
        ValueError: the same for all of them.
    """

    def __init__(
        self,
        make: Callable[[float], K.AugmentationBase2D],
        trials: tuple[float, ...],
        channels: int = 3,
        size: Size | None = None,
    ) -> None:
        self.make, self.channels, self.size = make, channels, size
        self._kernels: dict[float, AugmentationKernel] = {}
        self.random: bool | None = None
        self._tried = [self._kernel(magnitude) for magnitude in trials]
        self.augmentation = self._tried[0].augmentation
        self.random = any(kernel.random for kernel in self._tried)
        for kernel in self._tried:
            kernel.random = self.random
        with torch.no_grad():
            results = [kernel.on_noise(channels, 0.0) for kernel in self._tried]
        if change_nothing(trials, results):
            raise ValueError(
                f"the magnitude changes nothing in {type(self.augmentation).__name__} from "
                f"{min(trials):g} to {max(trials):g}: the function must use it, for something else "
                "than p, which does not count, as the policy decides what is applied"
            )

    def __call__(
        self, images: Tensor, magnitudes: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """Run each on its images."""
        result = torch.empty_like(images)
        for magnitude in sorted(set(magnitudes.tolist())):
            chosen = torch.nonzero(magnitudes == magnitude)[:, 0]
            drawn = None if uniforms is None else uniforms[chosen]
            part = self._kernel(magnitude)(images[chosen], magnitudes[chosen], drawn)
            result = result.index_copy(0, chosen, part)
        return result

    def matrix(self, magnitudes: Tensor, height: int, width: int) -> Tensor:
        """As :meth:`AugmentationKernel.matrix`."""
        rows = [
            self._kernel(m).matrix(torch.zeros(1, device="cpu"), height, width)
            for m in magnitudes.tolist()
        ]
        return torch.cat(rows)

    @property
    def erases(self) -> bool:
        """As :attr:`AugmentationKernel.erases`."""
        return self._tried[0].erases

    def erased(self, magnitudes: Tensor, uniforms: Tensor, height: int, width: int) -> Tensor:
        """As :meth:`AugmentationKernel.erased`."""
        parts = [
            self._kernel(m).erased(magnitudes[i : i + 1], uniforms[i : i + 1], height, width)
            for i, m in enumerate(magnitudes.float().tolist())
        ]
        return torch.cat(parts)

    def check_channels(self, channels: int) -> None:
        """As :meth:`AugmentationKernel.check_channels`."""
        for kernel in self._tried:
            kernel.check_channels(channels)

    def moves_affinely(self, trials: tuple[float, ...]) -> bool:
        """As :meth:`AugmentationKernel.moves_affinely`."""
        return all(kernel.moves_affinely((0.0,)) for kernel in self._tried)

    def _kernel(self, magnitude: float) -> AugmentationKernel:
        if magnitude not in self._kernels:
            made = self.make(magnitude)
            if not is_usable(made):
                raise TypeError(f"augmentation({magnitude:g}) must be {USABLE}, got {made!r}")
            self._kernels[magnitude] = AugmentationKernel(
                made, None, (0.0,), self.channels, self.size, self.random
            )
        return self._kernels[magnitude]


#: What is accepted, for messages.
USABLE = "a kornia augmentation of single images (K.AugmentationBase2D)"


def is_usable(augmentation: object) -> TypeGuard[K.AugmentationBase2D]:
    """Whether kornia runs it on one image at a time."""
    return isinstance(augmentation, K.AugmentationBase2D) and not isinstance(
        augmentation, K.MixAugmentationBaseV2
    )
