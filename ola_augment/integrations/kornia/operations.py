"""kornia's augmentations as operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import kornia.augmentation as K
import torch
from torch import Tensor

from ola_augment.integrations.kornia.family import USABLE, KernelFamily, is_usable
from ola_augment.integrations.kornia.kernels import AugmentationKernel
from ola_augment.operation import MatrixFunction, Operation, whole
from ola_augment.space import SearchSpace

_Make = Callable[[float], K.AugmentationBase2D]
_Range = tuple[float, float] | None


def operation(
    augmentation: K.AugmentationBase2D | _Make,
    low: float | None = None,
    high: float | None = None,
    *,
    parameter: str | None = None,
    name: str | None = None,
    integer: bool = False,
    signed: bool = False,
    side: Literal["width", "height"] | None = None,
    per: int = 32,
    channels: int = 3,
    size: tuple[int, int] | None = None,
) -> Operation:
    """Make an operation of a kornia augmentation.

    ``parameter`` names the random parameter that becomes the magnitude, as the dictionary that
    ``augmentation.forward_parameters`` returns does; several numbers an image all get it. For an
    argument that is no random parameter, a kernel size or the deviation of noise, pass a function
    ``magnitude -> augmentation``. Everything else that the augmentation draws is drawn once, from
    what the actions record, and replayed with them. Its own ``p`` does not count: the policy
    decides whether it is applied.

    Masks, boxes and key points follow what moves pixels by a matrix that the magnitude determines;
    they stay where only colours change, and are refused otherwise. What ``RandomErasing`` takes
    away is taken from masks, too, as kornia does.

    Args:
        augmentation: any of kornia's augmentations of single images that keeps their size, or a
            function of the magnitude that returns one. A module is copied.
        low: magnitude of bin 0; None (with ``high``) for an augmentation without a magnitude.
        high: magnitude of the last bin.
        parameter: which random parameter is the magnitude.
        name: of the operation; by default that of the augmentation's class.
        integer: truncate magnitudes toward ``low``, to a whole distance from it.
        signed: negate the magnitude with probability 1/2.
        side: ``"width"`` or ``"height"`` for magnitudes in pixels that scale with the image.
        per: the side in pixels that ``high`` is given for, 1 .. 1,000,000.
        channels: of the images that it is for, and is tried on. Others are tried when they come.
        size: height and width of the images that it is for, and is tried on; None: 32 x 40, or
            more where it needs more. How others are run is found out when they come.

    Returns:
        The operation, for a :class:`ola_augment.SearchSpace`.

    Raises:
        TypeError: no such augmentation: one that mixes images, works on volumes or is a container.
        ValueError: magnitudes without a parameter or a function, or the other way round; a
            parameter that there is not; a parameter or a function that changes nothing; an
            augmentation that takes no images of so many channels; what
            :class:`ola_augment.Operation` refuses.

    Example:
        >>> import kornia.augmentation as K
        >>> operation(K.RandomGaussianBlur((3, 3), (0.1, 2.0)), 0.1, 2.0, parameter="sigma").name
        'RandomGaussianBlur'
    """
    family = not is_usable(augmentation)
    bare = isinstance(augmentation, type) and low is None
    if family and (bare or isinstance(augmentation, torch.nn.Module) or not callable(augmentation)):
        got = f"the class {augmentation.__name__}" if bare else type(augmentation).__name__
        raise TypeError(
            f"augmentation must be {USABLE}, or a function magnitude -> augmentation, got {got}"
        )
    if (low is not None) != (family or parameter is not None) or (family and parameter):
        raise ValueError(
            "pass low and high together with parameter=..., or with a function magnitude -> "
            f"augmentation, or none of them, got low={low!r}, parameter={parameter!r}"
        )
    # Refuses ends that are no numbers before anything is tried with them.
    plain = Operation(name or "kornia", low, high, integer, signed, side, per, kernel=_unchanged)
    trials: tuple[float, ...] = (0.0,)
    if plain.low is not None and plain.high is not None:
        trials = (plain.low, plain.low + (plain.high - plain.low) / 2, plain.high)
    kernel: AugmentationKernel | KernelFamily
    if is_usable(augmentation):
        kernel = AugmentationKernel(augmentation, parameter, trials, channels, size)
    else:
        kernel = KernelFamily(cast(_Make, augmentation), trials, channels, size)
    matrix: MatrixFunction | None = None
    if isinstance(kernel.augmentation, K.IntensityAugmentationBase2D):
        matrix = _stay
    elif kernel.moves_affinely(trials):
        matrix = kernel.matrix
    return replace(
        plain,
        name=name or type(kernel.augmentation).__name__,
        kernel=kernel,
        matrix=matrix,
        random=bool(kernel.random),
    )


def search_space(num_magnitude_bins: int = 31, *, channels: int = 3) -> SearchSpace:
    """The fifteen operations of kornia's RandAugment over their ranges, and identity.

    At bin k of 31 they compute what kornia's own wrappers compute for the magnitude k / 30 of
    their range: its brightness adds, its shear reaches 54 degrees.

    Args:
        num_magnitude_bins: 2 .. 10,000.
        channels: of the images, at least 1; operations that cannot take so many are left out
            (color, unless there are 3).

    Returns:
        The space, named ``"kornia"``.

    Raises:
        ValueError: a number of bins or channels out of range.

    Example:
        >>> len(search_space())
        16
    """
    factors, unit = (0.1, 1.9), (0.0, 1.0)
    warp = {"align_corners": True}
    signed: dict[str, Any] = {"signed": True}
    x, y = ({"signed": True, "side": side, "per": 10} for side in ("width", "height"))
    rows: list[tuple[str, K.AugmentationBase2D, str | None, _Range, dict[str, Any]]] = [
        ("auto_contrast", K.RandomAutoContrast(), None, None, {}),
        ("equalize", K.RandomEqualize(), None, None, {}),
        ("invert", K.RandomInvert(), None, None, {}),
        ("rotate", K.RandomRotation(30.0), "degrees", (0, 30), signed),
        ("posterize", K.RandomPosterize((4.0, 8.0)), "bits_factor", (8, 4), {}),
        ("solarize", K.RandomSolarize(unit, 0.0), "thresholds", unit, {}),
        ("solarize_add", K.RandomSolarize(0.5, (0.0, 0.43)), "additions", (0, 0.43), {}),
        ("color", K.RandomSaturation(factors), "saturation_factor", factors, {}),
        ("contrast", K.RandomContrast(factors), "contrast_factor", factors, {}),
        ("brightness", K.RandomBrightness(factors), "brightness_factor", factors, {}),
        ("sharpness", K.RandomSharpness(factors), "sharpness", factors, {}),
        ("shear_x", K.RandomShear((0.0, 0.0), **warp), "shear_x", (0, 54), signed),
        ("shear_y", K.RandomShear((0.0, 0.0), **warp), "shear_y", (0, 54), signed),
        ("translate_x", K.RandomTranslate((0.0, 0.1), **warp), "translate_x", (0, 1), x),
        ("translate_y", K.RandomTranslate(None, (0.0, 0.1), **warp), "translate_y", (0, 1), y),
    ]
    if whole("channels", channels) < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    operations = []
    for name, augmentation, parameter, ends, options in rows:
        made = operation(augmentation, *(ends or ()), parameter=parameter, name=name, **options)
        if _takes(made, channels):
            operations.append(made)
    return SearchSpace((Operation("identity"), *operations), num_magnitude_bins, "kornia")


def _takes(made: Operation, channels: int) -> bool:
    try:
        cast(AugmentationKernel, made.kernel).check_channels(channels)
    except ValueError:
        return False
    return True


def _unchanged(images: Tensor, magnitudes: Tensor) -> Tensor:
    return images


def _stay(magnitudes: Tensor, height: int, width: int) -> Tensor:
    """No pixel moves."""
    return torch.eye(2, 3, dtype=torch.float64, device="cpu").expand(len(magnitudes), 2, 3)
