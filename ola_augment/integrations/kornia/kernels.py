"""Kernels that run kornia's augmentations, magnitude and randomness given."""

from __future__ import annotations

import copy
from typing import cast

import kornia.augmentation as K
import numpy as np
import torch
from kornia.constants import Resample
from torch import Tensor

from ola_augment.integrations.kornia.draws import Draws
from ola_augment.integrations.kornia.running import Params, Plan, make_plan, run

_SIDES = (32, 64, 128, 256, 512)
_ONE = np.zeros(1, np.uint64)
Size = tuple[int, int]


class AugmentationKernel:
    """A kornia augmentation as the kernel of an operation.

    Every image draws as if it were alone, from what its actions recorded: the result does not
    depend on the rest of the batch, the same actions give the same image, and torch's global
    generators are not touched.

    Args:
        augmentation: is copied; its ``p`` becomes 1, whether to apply it is the policy's business.
        parameter: which of its random parameters is the magnitude, or None.
        trials: magnitudes to try.
        channels: of the images that it is tried on.
        size: their height and width; None: what it takes, from 32 x 40 on.
        random: whether it draws, if that was found out with another magnitude.

    Raises:
        ValueError: no such parameter, one that changes nothing in the image, or an augmentation
            that takes no such images.
    """

    def __init__(
        self,
        augmentation: K.AugmentationBase2D,
        parameter: str | None,
        trials: tuple[float, ...],
        channels: int = 3,
        size: Size | None = None,
        random: bool | None = None,
    ) -> None:
        self.augmentation = copy.deepcopy(augmentation)
        self.augmentation.p = self.augmentation.p_batch = 1.0
        self.augmentation.same_on_batch = self.augmentation.keepdim = False
        self.parameter, self._magnitude = parameter, trials[0]
        self._plans, self._refused = dict[tuple[int, ...], Plan](), dict[int, str | None]()
        self.size = size or (32, 40)
        if random is None:
            with torch.no_grad():
                self._check_name()
                self.size = self._size_to_try(channels, size)
                self._check_effect(channels, trials)
                random = self._plan((channels, *self.size)).random
        self.random = random

    def __call__(
        self, images: Tensor, magnitudes: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """Run it: images (n, C, H, W), magnitudes (n,), uniforms (n, 2) in [0, 1) if it draws."""
        if not len(images):
            return images
        plan = self._plan(tuple(images.shape[1:]))
        if plan.random and not self.random:
            height, width = images.shape[2:]
            raise ValueError(
                f"kornia's {self._kind} draws parameters for images of {height} x {width}, which "
                f"it does not for {self.size[0]} x {self.size[1]}, where it was tried: pass "
                f"size=({height}, {width}) to ola_augment.kornia.operation"
            )
        return run(self, images, magnitudes.cpu(), seeds_of(uniforms, len(images)), plan)

    def draw(self, shape: tuple[int, ...]) -> Params:
        """Parameters for images of a shape (n, C, H, W)."""
        params: Params = self.augmentation.forward_parameters(torch.Size(shape))
        return params

    def give(self, params: Params, magnitudes: Tensor) -> Params:
        """The same with the magnitudes (n,) among them."""
        if self.parameter is not None:
            drawn = params[self.parameter]
            column = magnitudes.to(drawn.dtype).to(drawn.device)
            params[self.parameter] = column.view(-1, *[1] * (drawn.ndim - 1)).expand_as(drawn)
        return params

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """What parameters make of images (n, C, H, W)."""
        result: Tensor = self.augmentation(images, params=params)
        return result

    def check_channels(self, channels: int) -> None:
        """Refuse a number of channels that the augmentation cannot take, as a trial shows.

        Raises:
            ValueError: with what kornia said.
        """
        if channels not in self._refused:
            self._refused[channels] = self._said_of(channels, self.size)
        if (said := self._refused[channels]) is not None:
            raise ValueError(
                f"kornia's {self._kind} takes no images of {channels} channels and "
                f"{self.size[0]} x {self.size[1]} pixels ({said}); leave it out of the space, as "
                f"ola_augment.kornia.search_space(channels={channels}) does, or pass the size of "
                "your images, size=(height, width), to ola_augment.kornia.operation"
            )

    @property
    def erases(self) -> bool:
        """Whether it takes a part of the image away, masks included, without moving pixels."""
        own, plain = type(self.augmentation), K.IntensityAugmentationBase2D
        return issubclass(own, plain) and own.apply_transform_mask is not plain.apply_transform_mask

    def erased(self, magnitudes: Tensor, uniforms: Tensor, height: int, width: int) -> Tensor:
        """Which pixels are taken away, (n, height, width) bool.

        Raises:
            ValueError: masks are changed in another way.
        """
        parts = []
        for i, seed in enumerate(seeds_of(uniforms, len(magnitudes))):
            with Draws(np.array([seed])):
                drawn = self.draw((1, 1, height, width))
                params = self.give(drawn, magnitudes[i : i + 1].cpu())
                mask = torch.ones(1, 1, height, width, dtype=torch.float32, device="cpu")
                flags = self.augmentation.flags
                parts.append(self.augmentation.apply_transform_mask(mask, params, flags)[:, 0])
        result = torch.cat(parts)
        if not ((result == 0) | (result == 1)).all():
            raise ValueError(f"kornia's {self._kind} changes masks in a way that is not known")
        return result == 0

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
        if not rigid or self.random:
            return False
        height, width = self.size
        magnitudes = torch.tensor(trials, dtype=torch.float64, device="cpu")
        bottom = self._forward_matrices(magnitudes, height, width)[:, 2]
        if not bool((bottom == torch.tensor([0.0, 0.0, 1.0], device="cpu")).all()):
            return False
        return all(self._moves_by_matrix(m) for m in magnitudes)

    def _moves_by_matrix(self, magnitude: Tensor) -> bool:
        """Whether coordinates come from where the matrix says."""
        height, width = self.size
        rows, columns = (torch.arange(side, device="cpu") + 0.5 for side in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points = torch.stack((x, y, torch.ones_like(x))).flatten(1).double()
        expected = self.matrix(magnitude[None], height, width)[0] @ points
        images = torch.stack((x / width, y / height))[:, None]
        bilinear = copy.copy(self)
        bilinear.augmentation = copy.deepcopy(self.augmentation)
        if "resample" in bilinear.augmentation.flags:
            bilinear.augmentation.flags["resample"] = Resample.BILINEAR
        moved = bilinear._run(images, magnitude.expand(2))
        if moved.shape != images.shape:
            return False
        found = moved.flatten(1).double() * torch.tensor([[width], [height]], device="cpu")
        ends = torch.tensor([[width - 1], [height - 1]], device="cpu")
        inside = ((expected > 1) & (expected < ends)).all(0)
        off = (found - expected).abs()[:, inside]
        return not off.numel() or float(off.max()) <= 0.02

    def _forward_matrices(self, magnitudes: Tensor, height: int, width: int) -> Tensor:
        shape = (len(magnitudes), 3, height, width)
        rigid = cast(K.RigidAffineAugmentationBase2D, self.augmentation)
        with Draws(_ONE):
            params = self.give(self.draw(shape), magnitudes)
        empty = torch.empty((), dtype=torch.float64, device="cpu").expand(shape)
        return rigid.generate_transformation_matrix(empty, params, rigid.flags).double()

    @property
    def _kind(self) -> str:
        return type(self.augmentation).__name__

    def _plan(self, shape: tuple[int, ...]) -> Plan:
        if shape not in self._plans:
            self._plans[shape] = make_plan(self, shape, self._magnitude)
        return self._plans[shape]

    def _run(self, images: Tensor, magnitudes: Tensor) -> Tensor:
        seeds, plan = np.arange(len(images), dtype=np.uint64), Plan(True, True, None)
        return run(self, images, magnitudes, seeds, plan)

    def on_noise(self, channels: int, magnitude: float) -> Tensor:
        """What a magnitude makes of four images of noise that draw differently."""
        images = _noise(4, channels, self.size)
        return self._run(images, torch.full((4,), magnitude, dtype=torch.float32, device="cpu"))

    def _said_of(self, channels: int, size: Size) -> str | None:
        """What goes wrong with such images."""
        images = _noise(1, channels, size)
        magnitudes = torch.tensor([self._magnitude], dtype=torch.float32, device="cpu")
        with torch.no_grad():
            try:
                self._run(images, magnitudes)
            except Exception as error:
                return str(error).strip().split("\n")[0] or type(error).__name__
        return None

    def _size_to_try(self, channels: int, size: Size | None) -> Size:
        own = self.augmentation.flags.get("size")
        sizes = [size] if size else [(side, side + side // 4) for side in _SIDES]
        if size is None and isinstance(own, tuple):
            sizes.insert(0, own)
        said = [self._said_of(channels, tried) for tried in sizes]
        return next(
            (tried for tried, bad in zip(sizes, said, strict=True) if bad is None), sizes[0]
        )

    def _check_name(self) -> None:
        if self.parameter is None:
            return
        own = {"batch_prob", "forward_input_shape"}
        with Draws(_ONE):
            drawn = self.augmentation.forward_parameters(torch.Size((1, 3, *self.size)))
        known = set(drawn) - own
        if self.parameter not in known:
            raise ValueError(
                f"parameter must be a random parameter of {self._kind}, {sorted(known)}, got "
                f"{self.parameter!r}; for other arguments pass a function of the magnitude that "
                "returns an augmentation"
            )

    def _check_effect(self, channels: int, trials: tuple[float, ...]) -> None:
        self.check_channels(channels)
        if self.parameter is None:
            return
        results = [self.on_noise(channels, magnitude) for magnitude in trials]
        if change_nothing(trials, results):
            raise ValueError(
                f"parameter {self.parameter!r} of {self._kind} changes nothing from "
                f"{min(trials):g} to {max(trials):g}: it is used while {self._kind} draws its "
                "other parameters; pass a function of the magnitude that returns an augmentation"
            )


def change_nothing(trials: tuple[float, ...], results: list[Tensor]) -> bool:
    """Whether several magnitudes give one result."""
    same = all(torch.equal(results[0], result) for result in results)
    return same and len(set(trials)) > 1


def seeds_of(uniforms: Tensor | None, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A seed for each of n images, of what their actions recorded (n, 2); zeros without it."""
    if uniforms is None:
        return np.zeros(count, np.uint64)
    bits = (uniforms.detach().cpu().double().numpy() * 2**24).astype(np.uint64)
    return bits[:, 0] << np.uint64(24) | bits[:, 1]


def _noise(count: int, channels: int, size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, *size)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
