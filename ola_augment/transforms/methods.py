"""OLAAugment and the methods it is compared with, each a policy behind the same transform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms.v2 import InterpolationMode

from ola_augment.kernels.pixel_format import ValueRange
from ola_augment.policy import OLAPolicy, RandAugmentPolicy, UniformPolicy
from ola_augment.space import SearchSpace
from ola_augment.transforms.base import PolicyTransform
from ola_augment.transforms.inputs import Fills


class OLAAugment(PolicyTransform):
    """Learned augmentation: the policy of Algorithm 2, uniform at the start.

    Args:
        space: ``"wide_long"``, ``"rand_augment"`` or a :class:`SearchSpace`.
        max_ops: largest number of operations for one image; None is 4, or all of a smaller space.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.
        interpolation: how rotate, shear and translate resample, NEAREST or BILINEAR: an
            ``InterpolationMode``, its name, or Pillow's number for it.
        fill: what these uncover, in the range of the images (0 .. 255 for uint8, 0 .. 1 for
            floats): one number or one per channel, None for black, or a dictionary of these by
            type of input.
        generator: a CPU generator to draw with; None uses torch's global one.
        strength: expected number of applied operations an image, 0 .. ``max_ops``: the policy
            then learns which operations, not how many. None learns both, as the paper does.
        value_range: (low, high), what is black and white, such as (0, 4095) for 12 bits; None is
            0 .. 255 for uint8, 0 .. 65535 for uint16 and 0 .. 1 for floats.
        grey_weights: one weight per channel of the grey image that color and contrast blend with;
            None is Pillow's for 3 channels, otherwise the mean.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown space, a number out of range, or a generator that is not on the CPU.

    Example:
        >>> augment = OLAAugment("wide_long", generator=torch.Generator().manual_seed(0))
        >>> images, actions = augment.augment(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
        >>> images.shape, actions.ops.shape
        (torch.Size([8, 3, 32, 32]), torch.Size([8, 4]))

    References:
        `In-Loop Meta-Learning with Gradient-Alignment Reward <https://arxiv.org/abs/2102.03275>`__
    """

    policy: OLAPolicy
    _policy_kind = OLAPolicy

    def __init__(
        self,
        space: str | SearchSpace = "wide_long",
        max_ops: int | None = None,
        num_magnitude_bins: int = 31,
        interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
        fill: Fills = None,
        generator: torch.Generator | None = None,
        *,
        strength: float | None = None,
        value_range: ValueRange | None = None,
        grey_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            OLAPolicy(space, max_ops, num_magnitude_bins, strength),
            interpolation=interpolation,
            fill=fill,
            generator=generator,
            value_range=value_range,
            grey_weights=grey_weights,
        )


class UniformAugment(PolicyTransform):
    """UniformAugment (Algorithm 3): two operations, each kept with probability 1/2.

    Args:
        space: ``"wide_long"``, ``"rand_augment"`` or a :class:`SearchSpace`.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.
        interpolation: how rotate, shear and translate resample, NEAREST or BILINEAR: an
            ``InterpolationMode``, its name, or Pillow's number for it.
        fill: what these uncover, in the range of the images (0 .. 255 for uint8, 0 .. 1 for
            floats): one number or one per channel, None for black, or a dictionary of these by
            type of input.
        generator: a CPU generator to draw with; None uses torch's global one.
        value_range: (low, high), what is black and white, such as (0, 4095) for 12 bits; None is
            0 .. 255 for uint8, 0 .. 65535 for uint16 and 0 .. 1 for floats.
        grey_weights: one weight per channel of the grey image that color and contrast blend with;
            None is Pillow's for 3 channels, otherwise the mean.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown space, a number out of range, or a generator that is not on the CPU.

    Example:
        >>> UniformAugment()(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])

    References:
        `UniformAugment: A Search-free Probabilistic Data Augmentation Approach
        <https://arxiv.org/abs/2003.14348>`__
    """

    _policy_kind = UniformPolicy

    def __init__(
        self,
        space: str | SearchSpace = "wide_long",
        num_magnitude_bins: int = 31,
        interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
        fill: Fills = None,
        generator: torch.Generator | None = None,
        *,
        value_range: ValueRange | None = None,
        grey_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            UniformPolicy(space, num_magnitude_bins=num_magnitude_bins),
            interpolation=interpolation,
            fill=fill,
            generator=generator,
            value_range=value_range,
            grey_weights=grey_weights,
        )


class RandAugment(PolicyTransform):
    """RandAugment (Cubuk et al., 2020) with the argument names of torchvision's.

    Args:
        num_ops: operations applied to every image, 0 or more, with replacement.
        magnitude: the bin of all of them, 0 .. num_magnitude_bins - 1.
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.
        interpolation: how rotate, shear and translate resample, NEAREST or BILINEAR: an
            ``InterpolationMode``, its name, or Pillow's number for it.
        fill: what these uncover, in the range of the images (0 .. 255 for uint8, 0 .. 1 for
            floats): one number or one per channel, None for black, or a dictionary of these by
            type of input.
        space: ``"wide_long"``, ``"rand_augment"`` or a :class:`SearchSpace`.
        generator: a CPU generator to draw with; None uses torch's global one.
        value_range: (low, high), what is black and white, such as (0, 4095) for 12 bits; None is
            0 .. 255 for uint8, 0 .. 65535 for uint16 and 0 .. 1 for floats.
        grey_weights: one weight per channel of the grey image that color and contrast blend with;
            None is Pillow's for 3 channels, otherwise the mean.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown space, a number out of range, or a generator that is not on the CPU.

    Example:
        >>> RandAugment(num_ops=2, magnitude=9)(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])

    References:
        `RandAugment: Practical automated data augmentation with a reduced search space
        <https://arxiv.org/abs/1909.13719>`__
    """

    _policy_kind = RandAugmentPolicy

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
        fill: Fills = None,
        *,
        space: str | SearchSpace = "rand_augment",
        generator: torch.Generator | None = None,
        value_range: ValueRange | None = None,
        grey_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            RandAugmentPolicy(space, num_ops, magnitude, num_magnitude_bins),
            interpolation=interpolation,
            fill=fill,
            generator=generator,
            value_range=value_range,
            grey_weights=grey_weights,
        )


class TrivialAugment(PolicyTransform):
    """TrivialAugment (Müller and Hutter, 2021): one uniform operation at a uniform magnitude.

    Draws as torchvision's ``v2.TrivialAugmentWide`` does: the same operations and ranges at every
    size of images, translations by at most 32 pixels among them.

    Args:
        num_magnitude_bins: K, of a space given by name, 2 .. 10,000.
        interpolation: how rotate, shear and translate resample, NEAREST or BILINEAR: an
            ``InterpolationMode``, its name, or Pillow's number for it.
        fill: what these uncover, in the range of the images (0 .. 255 for uint8, 0 .. 1 for
            floats): one number or one per channel, None for black, or a dictionary of these by
            type of input.
        space: ``"trivial_augment"``, ``"wide_long"``, ``"rand_augment"`` or a
            :class:`SearchSpace`.
        generator: a CPU generator to draw with; None uses torch's global one.
        value_range: (low, high), what is black and white, such as (0, 4095) for 12 bits; None is
            0 .. 255 for uint8, 0 .. 65535 for uint16 and 0 .. 1 for floats.
        grey_weights: one weight per channel of the grey image that color and contrast blend with;
            None is Pillow's for 3 channels, otherwise the mean.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown space, a number out of range, or a generator that is not on the CPU.

    Example:
        >>> TrivialAugment()(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])

    References:
        `TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation
        <https://arxiv.org/abs/2103.10158>`__
    """

    _policy_kind = UniformPolicy

    def __init__(
        self,
        num_magnitude_bins: int = 31,
        interpolation: InterpolationMode | str | int = InterpolationMode.NEAREST,
        fill: Fills = None,
        *,
        space: str | SearchSpace = "trivial_augment",
        generator: torch.Generator | None = None,
        value_range: ValueRange | None = None,
        grey_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            UniformPolicy(space, 1, 1.0, num_magnitude_bins),
            interpolation=interpolation,
            fill=fill,
            generator=generator,
            value_range=value_range,
            grey_weights=grey_weights,
        )
