"""Kernels that run kornia's augmentations, magnitude and randomness given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from typing import TypeGuard, cast

import kornia.augmentation as K
import torch
from torch import Tensor

Params = dict[str, Tensor]

_IMAGES = 8  # of a trial run
_SEEDS = 32


class Way(Enum):
    """How a batch is run, found out by trial; from the fastest to the slowest."""

    FIXED = "nothing is drawn but the magnitude: one call for all images"
    TOGETHER = "drawn image by image, then one call for all"
    ALONE = "image by image: what kornia draws for several images is not what it draws for each"


class AugmentationKernel:
    """A kornia augmentation as the kernel of an operation.

    Every image draws as if it were alone, seeded with what its actions recorded: the result does
    not depend on the rest of the batch, and the same actions give the same image. kornia draws from
    torch's global generators, which are seeded meanwhile and set back afterwards.

    Args:
        augmentation: is copied; its ``p`` becomes 1, whether to apply it is the policy's business.
        parameter: which of its random parameters is the magnitude, or None.
        trials: magnitudes to try.
        way: how to run it, if that is known.
        channels: of the images that it is tried on.

    Raises:
        ValueError: no such parameter, one that changes nothing in the image, or an augmentation
            that takes no images of so many channels.
    """

    def __init__(
        self,
        augmentation: K.AugmentationBase2D,
        parameter: str | None,
        trials: tuple[float, ...],
        way: Way | None = None,
        channels: int = 3,
    ) -> None:
        self.augmentation = copy.deepcopy(augmentation)
        self.augmentation.p = self.augmentation.p_batch = 1.0
        self.augmentation.same_on_batch = self.augmentation.keepdim = False
        self.parameter = parameter
        size = self.augmentation.flags.get("size")
        height, width = size if isinstance(size, tuple) else (32, 32)
        generator = torch.Generator().manual_seed(0)
        shape = (_IMAGES, channels, height, width)
        images = torch.rand(shape, generator=generator, device="cpu")
        self._trial, self._refused = images, dict[int, str | None]()
        with torch.no_grad(), _generators(images.device):
            magnitudes = torch.tensor(trials, device="cpu").repeat(_IMAGES)[:_IMAGES]
            self._magnitude = magnitudes[:1]
            self._check_name(images)
            self.check_channels(channels)
            self._check_effect(images, trials)
            self.way = way or self._find_way(images, magnitudes)

    def __call__(
        self, images: Tensor, magnitudes: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """Run it: images (n, C, H, W), magnitudes (n,), uniforms (n, 2) in [0, 1) if it draws."""
        if not len(images):
            return images
        seeds = [0] * len(images)
        if uniforms is not None:
            seeds = [int(y * 2**24) << 24 | int(x * 2**24) for y, x in uniforms.tolist()]
        with _generators(images.device):
            return self._run(images, magnitudes, seeds, self.way)

    def check_channels(self, channels: int) -> None:
        """Refuse a number of channels that the augmentation cannot take, as a trial shows.

        Raises:
            ValueError: with what kornia said.
        """
        if channels not in self._refused:
            self._refused[channels] = self._said_of(channels)
        if (said := self._refused[channels]) is not None:
            raise ValueError(
                f"kornia's {type(self.augmentation).__name__} takes no images of {channels} "
                f"channels ({said}); leave it out of the space, as "
                f"ola_augment.kornia.search_space(channels={channels}) does"
            )

    def _said_of(self, channels: int) -> str | None:
        image = self._trial[:1, :1].repeat(1, channels, 1, 1)
        with torch.no_grad(), _generators(image.device):
            try:
                self._run(image, self._magnitude, [0], Way.ALONE)
            except Exception as error:
                return str(error).strip().split("\n")[0] or type(error).__name__
        return None

    def matrix(self, magnitudes: Tensor, height: int, width: int) -> Tensor:
        """Matrices (n, 2, 3) from the result to the image, pixel centres at + 0.5.

        Those of kornia lead from the image to the result, with pixel centres at whole numbers.
        """
        half = torch.eye(3, dtype=torch.float64, device="cpu")
        half[:2, 2] = 0.5
        forward = self._forward_matrices(magnitudes, height, width)
        matrices: Tensor = half @ torch.linalg.inv(forward) @ torch.linalg.inv(half)
        return matrices[:, :2]

    def moves_affinely(self, trials: tuple[float, ...]) -> bool:
        """Whether :meth:`matrix` says all about where pixels go."""
        rigid = isinstance(self.augmentation, K.RigidAffineAugmentationBase2D)
        if not rigid or self.way is not Way.FIXED:
            return False
        bottom = self._forward_matrices(torch.tensor(trials, device="cpu"), 32, 32)[:, 2]
        return bool((bottom == torch.tensor([0.0, 0.0, 1.0], device="cpu")).all())

    def _forward_matrices(self, magnitudes: Tensor, height: int, width: int) -> Tensor:
        shape = (len(magnitudes), 3, height, width)
        rigid = cast(K.RigidAffineAugmentationBase2D, self.augmentation)
        with _generators(magnitudes.device):
            params = self._draw(shape, magnitudes, 0)
        empty = torch.empty((), dtype=torch.float64, device="cpu").expand(shape)
        return rigid.generate_transformation_matrix(empty, params, rigid.flags).double()

    def _draw(self, shape: tuple[int, ...], magnitudes: Tensor, seed: int) -> Params:
        torch.default_generator.manual_seed(seed)
        params: Params = self.augmentation.forward_parameters(torch.Size(shape))
        if self.parameter is not None:
            drawn = params[self.parameter]
            column = magnitudes.to(drawn.dtype).to(drawn.device)
            params[self.parameter] = column.view(-1, *[1] * (drawn.ndim - 1)).expand_as(drawn)
        return params

    def _run(self, images: Tensor, magnitudes: Tensor, seeds: list[int], way: Way) -> Tensor:
        magnitudes = magnitudes.cpu()
        if way is Way.FIXED:
            params = self._draw(tuple(images.shape), magnitudes, 0)
            return self._apply(images, params)
        if way is Way.TOGETHER:
            return self._apply(images, self._draw_each(images, magnitudes, seeds))
        results = []
        for i, seed in enumerate(seeds):
            image = images[i : i + 1]
            params = self._draw(tuple(image.shape), magnitudes[i : i + 1], seed)
            if images.device.type == "cuda":  # what is drawn while it is applied
                torch.cuda.default_generators[images.device.index or 0].manual_seed(seed)
            results.append(self._apply(image, params))
        return torch.cat(results)

    def _draw_each(self, images: Tensor, magnitudes: Tensor, seeds: list[int]) -> Params:
        shape = (1, *images.shape[1:])
        each = [self._draw(shape, magnitudes[i : i + 1], seed) for i, seed in enumerate(seeds)]
        params = {key: torch.cat([one[key] for one in each]) for key in each[0]}
        params["forward_input_shape"] = torch.tensor(images.shape, device="cpu")
        return params

    def _apply(self, images: Tensor, params: Params) -> Tensor:
        result: Tensor = self.augmentation(images, params=params)
        return result

    def _check_name(self, images: Tensor) -> None:
        if self.parameter is None:
            return
        kind = type(self.augmentation).__name__
        own = {"batch_prob", "forward_input_shape"}
        known = set(self.augmentation.forward_parameters(images.shape)) - own
        if self.parameter not in known:
            raise ValueError(
                f"parameter must be a random parameter of {kind}, {sorted(known)}, got "
                f"{self.parameter!r}; for other arguments pass a function of the magnitude that "
                "returns an augmentation"
            )

    def _check_effect(self, images: Tensor, trials: tuple[float, ...]) -> None:
        if self.parameter is None:
            return
        kind = type(self.augmentation).__name__
        same = torch.ones(_IMAGES, device="cpu")
        results = [self._run(images, m * same, [0] * _IMAGES, Way.FIXED) for m in trials]
        if len(set(trials)) > 1 and all(torch.equal(results[0], result) for result in results):
            raise ValueError(
                f"parameter {self.parameter!r} of {kind} changes nothing from {min(trials):g} to "
                f"{max(trials):g}: it is used while {kind} draws its other parameters; pass a "
                "function of the magnitude that returns an augmentation"
            )

    def _find_way(self, images: Tensor, magnitudes: Tensor) -> Way:
        seeds = list(range(_IMAGES))
        alone = self._run(images, magnitudes, seeds, Way.ALONE)
        for way in (Way.FIXED, Way.TOGETHER):
            try:
                together = self._run(images, magnitudes, seeds, way)
            except (RuntimeError, ValueError, IndexError):  # its parameters are not one an image
                continue
            same = together.shape == alone.shape and torch.allclose(together, alone, atol=1e-5)
            if same and (way is Way.TOGETHER or not self._draws(images[:1], magnitudes[:1])):
                return way
        return Way.ALONE

    def _draws(self, image: Tensor, magnitude: Tensor) -> bool:
        """Whether one image comes out in more than one way."""
        results = [self._run(image, magnitude, [seed], Way.ALONE) for seed in range(_SEEDS)]
        return any(not torch.equal(results[0], result) for result in results)


class KernelFamily:
    """One kornia augmentation for each magnitude: for arguments that are no random parameters.

    Args:
        make: magnitude -> augmentation.
        trials: magnitudes to try.
        channels: of the images that they are tried on.
    """

    def __init__(
        self,
        make: Callable[[float], K.AugmentationBase2D],
        trials: tuple[float, ...],
        channels: int = 3,
    ) -> None:
        self.make, self.channels = make, channels
        self._kernels: dict[float, AugmentationKernel] = {}
        self.way: Way | None = None
        tried = [self._kernel(magnitude) for magnitude in trials]
        self.augmentation, self._tried = tried[0].augmentation, tried
        self.way = max((kernel.way for kernel in tried), key=list(Way).index)

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
                made, None, (0.0,), self.way, self.channels
            )
        return self._kernels[magnitude]


#: What is accepted, for messages.
USABLE = "a kornia augmentation of single images (K.AugmentationBase2D)"


def is_usable(augmentation: object) -> TypeGuard[K.AugmentationBase2D]:
    """Whether kornia runs it on one image at a time."""
    return isinstance(augmentation, K.AugmentationBase2D) and not isinstance(
        augmentation, K.MixAugmentationBaseV2
    )


def _generators(device: torch.device) -> AbstractContextManager[None]:
    """Seeds of torch's global generators, set back afterwards."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)
