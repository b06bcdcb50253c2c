"""timm: its RandAugment strings as a search space and a policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ola_augment.draw import LogProbs, log_one_hot
from ola_augment.operation import Operation
from ola_augment.policy import Policy
from ola_augment.space import SearchSpace

__all__ = ["TimmRandAugmentPolicy"]

_TOP = 10  # timm's largest level
_STEPS = 20  # bins a level
_BINS = _TOP * _STEPS + 1
_KEYS = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int}


class TimmRandAugmentPolicy(Policy):
    """What a string such as ``"rand-m9-mstd0.5-inc1"`` means to timm.

    A :class:`PolicyTransform` of it, with ``interpolation="bilinear", fill=(124, 116, 104)``,
    augments as timm's ``create_transform`` does, batch by batch; ``OLAAugment(policy.space)``
    learns over the same operations and magnitudes. timm need not be installed.

    Args:
        config: sections apart by ``-``, the first ``rand``: m (level; 10; what is above mmax is
            that), n (operations an image; 2), p (probability of applying each; 0.5), mstd (standard
            deviation of the level; above 100: uniform in 0 .. m; ``mstdinf`` is passed over, as
            timm does, whose sections need a digit), mmax (largest level, at most 10), inc (1: the
            operations that grow with the level).

    Attributes:
        approximations: what of it is not timm's to the letter.

    Raises:
        TypeError: no str.
        ValueError: a section that is unknown, has no number or one out of range, or cannot be
            expressed: ``t`` (sets with weights, drawn without replacement, or with Gaussian blur)
            and ``mmax`` above 10.

    Example:
        >>> from ola_augment import PolicyTransform
        >>> policy = TimmRandAugmentPolicy("rand-m9-mstd0.5-inc1")
        >>> fill = (124, 116, 104)  # timm's: round(255 * mean) of its normalisation
        >>> augment = PolicyTransform(policy, interpolation="bilinear", fill=fill)
        >>> augment(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([8, 3, 32, 32])

    References:
        `RandAugment: Practical automated data augmentation with a reduced search space
        <https://arxiv.org/abs/1909.13719>`__
    """

    def __init__(self, config: str) -> None:
        values = _parse(config)
        increasing = bool(values["inc"])
        space = SearchSpace(_operations(increasing), _BINS, f"timm {'inc' * increasing}".strip())
        super().__init__(space, values["n"], replacement=True)
        self.config = config
        level, deviation = float(values["m"]), float(values["mstd"])
        top = float(values["mmax"])
        approximations = [
            "each rotate, shear and translate: timm's create_transform resamples bilinearly, its "
            "training script and rand_augment_transform bilinearly or bicubically by chance; a "
            "PolicyTransform nearest or bilinear",
            "outside of the image create_transform fills round(255 * mean), rand_augment_transform "
            "alone 128: pass fill=(124, 116, 104), or fill=128",
        ]
        if deviation:
            approximations.append(f"mstd: levels are rounded to the next {1 / _STEPS:g}")
        self.approximations = tuple(approximations)
        below = _distribution(level, deviation, top)
        one_sided = _masses(below, _STEPS)
        half = _masses(below, _STEPS // 2) / 2
        two_sided = torch.cat((half.flip(0), half[1:]))
        two_sided[_BINS // 2] *= 2
        both = ("color", "contrast", "brightness", "sharpness") if increasing else ()
        masses = [two_sided if o.name in both else one_sided for o in space.operations]
        self._log_magnitude = torch.stack(masses).log().float()
        self._keep = float(values["p"])

    def arguments(self) -> dict[str, Any]:
        """Arguments that make such a policy again, for files and ``repr``.

        Returns:
            Argument name -> JSON value.
        """
        return {"config": self.config}

    def log_probs(self) -> LogProbs:
        """All mass on n operations, each kept with p, its magnitude as m, mstd and mmax say.

        Returns:
            The tables, constant.
        """
        keep = torch.tensor(self._keep, dtype=torch.float32, device="cpu")
        size = len(self.space)
        return LogProbs(
            num_ops=log_one_hot(self.max_ops - 1, self.max_ops),
            keep=keep.log().expand(size),
            drop=(1 - keep).log().expand(size),
            magnitude=self._log_magnitude,
        )


def _parse(config: str) -> dict[str, Any]:
    if not isinstance(config, str):
        raise TypeError(f"config must be a str, as 'rand-m9-mstd0.5-inc1', got {config!r}")
    name, *sections = config.split("-")
    if name != "rand":
        raise ValueError(
            f"config must begin with 'rand-', as 'rand-m9-mstd0.5-inc1'; got {config!r}"
        )
    values: dict[str, Any] = {"m": 10, "n": 2, "p": 0.5, "mstd": 0, "mmax": 10, "inc": 0}
    for section in sections:
        if section.startswith("t"):
            raise ValueError(
                f"section {section!r} of {config!r} cannot be expressed: a policy draws its "
                "operations uniformly, timm's named sets have weights or Gaussian blur"
            )
        if section == "mstdinf":  # without a digit: timm does not see it
            continue
        match = re.fullmatch(r"([a-z]+)(|\d.*)", section)
        if match is None or match[1] not in _KEYS:
            raise ValueError(
                f"section {section!r} of {config!r} is unknown; known are {', '.join(_KEYS)}"
            )
        try:
            values[match[1]] = _KEYS[match[1]](match[2])
        except ValueError:
            raise ValueError(f"section {section!r} of {config!r} holds no number") from None
    for key, low, high in (("m", 0, 1000), ("n", 1, 1000), ("p", 0, 1), ("mmax", 1, 10)):
        if not low <= values[key] <= high:
            raise ValueError(f"{key} of {config!r} must lie in {low} .. {high}, got {values[key]}")
    return values


def _distribution(level: float, deviation: float, top: float) -> Callable[[Tensor], Tensor]:
    """P(level <= x), before it is clipped to 0 .. top."""

    def below(x: Tensor) -> Tensor:
        if deviation > 100 and level:
            found = (x / level).clamp(0, 1)
        elif 0 < deviation <= 100:
            found = torch.special.ndtr((x - level) / deviation)
        else:
            found = (x >= level).double()
        return torch.where(x >= top, torch.ones_like(x), found)

    return below


def _masses(below: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """(10 steps + 1,) probabilities of the levels 0, 1 / steps, .., 10, each with those around."""
    edges = (torch.arange(_TOP * steps, dtype=torch.float64, device="cpu") + 0.5) / steps
    sums = torch.cat((edges.new_zeros(1), below(edges), edges.new_ones(1)))
    return sums.diff()


def _operations(increasing: bool) -> tuple[Operation, ...]:
    """timm's, in its order; enhancing ones reach from 0.1 to 1.9 either way."""
    enhance = (Operation(n, 0.1, 1.9) for n in ("color", "contrast", "brightness", "sharpness"))
    return (
        Operation("auto_contrast"),
        Operation("equalize"),
        Operation("invert"),
        Operation("rotate", 0, 30, signed=True),
        Operation("posterize", *((4, 0) if increasing else (0, 4)), integer=True),
        Operation("solarize", *((256, 0) if increasing else (0, 256)), integer=True),
        Operation("solarize_add", 0, 110, integer=True, kernel=solarize_add),
        *enhance,
        Operation("shear_x", 0, 0.3, signed=True),
        Operation("shear_y", 0, 0.3, signed=True),
        Operation("translate_x", 0, 0.45, signed=True, side="width", per=1),
        Operation("translate_y", 0, 0.45, signed=True, side="height", per=1),
    )


def solarize_add(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Add to the levels below 128, up to 255.

    Args:
        images: (n, C, H, W) floating in [0, 1].
        magnitudes: (n,) in grey levels of 255.

    Returns:
        (n, C, H, W) in [0, 1].
    """
    levels = (images * 255).round()
    added = (levels + magnitudes.reshape(-1, 1, 1, 1)).clamp(max=255)
    return torch.where(levels < 128, added, levels) / 255
