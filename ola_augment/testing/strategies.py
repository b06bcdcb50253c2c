"""What to try: images, search spaces, actions and policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ola_augment.actions import Actions
from ola_augment.kernels.table import TABLE, Row
from ola_augment.operation import Operation
from ola_augment.policy import OLAPolicy, Policy, RandAugmentPolicy, UniformPolicy
from ola_augment.space import SearchSpace

#: Ways for the same values to lie in memory, by name: functions from a tensor to its equal.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "window": lambda x: _framed(x)[..., 1:, 2:-3],
    "a view on zeros": lambda x: torch.stack((x, torch.zeros_like(x)))[0],
}


def _framed(x: Tensor) -> Tensor:
    frame = torch.zeros(*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 5, dtype=x.dtype)
    frame[..., 1:, 2:-3] = x
    return frame


#: How far magnitudes are tried, by their unit, where a domain reaches further.
_REACH = {"degrees": 400.0, "px": 60.0, "": 4.0, "bits": 8.0}
#: Levels of integers reach from 0 to these, those of floats to 1.
TOPS = {torch.uint8: 255, torch.uint16: 65535, torch.int16: 32767}
_SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def images(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.uint8, torch.float32, torch.float64),
    channels: Sequence[int] = (1, 3),
    batch: bool | None = None,
    max_batch: int = 4,
    sides: tuple[int, int] = (1, 40),
    layouts: Sequence[str] = (*LAYOUTS, "expanded"),
) -> Tensor:
    """Images: noise, flat ones, few levels and ramps, from a pixel on, in any memory layout.

    Args:
        draw: given by hypothesis.
        dtypes: uint8, uint16 and floating ones, whose levels have the range of their dtype; int16,
            whose levels are 0 .. 32767.
        channels: how many there may be, any of 1 and more.
        batch: True for (B, C, H, W) with B from 0 on, False for (C, H, W), None for both.
        max_batch: largest B.
        sides: smallest and largest height and width, in pixels.
        layouts: keys of :data:`LAYOUTS`, or "expanded": channels that share their memory.

    Returns:
        A strategy of tensors (C, H, W) or (B, C, H, W).

    Example:
        >>> strategy = images(dtypes=[torch.uint8], channels=[3], batch=True)
    """
    low, high = sides
    side = st.sampled_from(range(low, min(low + 3, high + 1))) | st.integers(low, high)
    shape: tuple[int, ...] = (draw(st.sampled_from(channels)), draw(side), draw(side))
    if batch or (batch is None and draw(st.booleans())):
        shape = (draw(st.integers(0, max_batch)), *shape)
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts))
    kind, seed = draw(st.sampled_from(tuple(_CONTENTS))), draw(_SEEDS)
    levels = _CONTENTS[kind](shape, np.random.default_rng(seed)).clip(0, 255)
    scaled = levels * (TOPS[dtype] / 255) if dtype in TOPS else levels / 255
    values = torch.from_numpy(scaled).to(dtype)
    if layout == "expanded":
        return values[..., :1, :, :].expand(shape)
    return LAYOUTS[layout](values)


def _noise(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    return generator.random(shape) * 255


def _whole_noise(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    return generator.integers(0, 256, shape).astype(np.float64)


def _flat(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    return np.full(shape, generator.choice([0.0, 1.0, 127.0, 255.0]))


def _two_levels(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    low, high = generator.integers(0, 256, 2)
    return np.where(generator.random(shape) < 0.1, float(low), float(high))


def _ramp(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    step = int(generator.integers(1, 9))
    return (np.arange(np.prod(shape)) * step % 256).reshape(shape).astype(np.float64)


_CONTENTS = {
    "flat": _flat,
    "ramp": _ramp,
    "two levels": _two_levels,
    "whole levels": _whole_noise,
    "any levels": _noise,
}


@st.composite
def spaces(draw: st.DrawFn, *, names: Sequence[str] = tuple(TABLE)) -> SearchSpace:
    """Search spaces of built-in operations with any magnitudes that they accept.

    Args:
        draw: given by hypothesis.
        names: of the operations to choose from.

    Returns:
        A strategy of :class:`SearchSpace`.

    Example:
        >>> strategy = spaces(names=["rotate", "invert"])
    """
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    operations = tuple(draw(_operations(TABLE[name])) for name in chosen)
    return SearchSpace(operations, draw(st.sampled_from([2, 3, 31])))


@st.composite
def _operations(draw: st.DrawFn, row: Row) -> Operation:
    if row.domain is None:
        return Operation(row.name)
    reach = _REACH[row.unit] if row.domain[1] > 256 else row.domain[1]
    ends = st.floats(max(row.domain[0], -reach), reach)
    if row.unit == "degrees":
        ends |= st.sampled_from([-90.0, 0.0, 90.0, 180.0, 270.0, 450.0])
    low, high = draw(ends), draw(ends)
    signed = row.domain[0] < 0 and draw(st.booleans())
    side: Literal["width", "height"] | None = None
    if row.unit == "px":
        side = draw(st.sampled_from([None, "width", "height"]))
    if side is not None:  # scaled with the image, a range downwards may leave the domain
        low, high = sorted((low, high))
    return Operation(row.name, low, high, draw(st.booleans()), signed, side)


@st.composite
def actions(
    draw: st.DrawFn,
    space: SearchSpace,
    *,
    batch_size: int | None = None,
    max_ops: int | None = None,
) -> Actions:
    """Actions of a policy over a space: any draw that is possible.

    Args:
        draw: given by hypothesis.
        space: that they index.
        batch_size: how many examples; None for 0 .. 4.
        max_ops: how many slots; None for 1 .. 4, at most as many as there are operations.

    Returns:
        A strategy of :class:`Actions`.

    Example:
        >>> strategy = actions(SearchSpace.rand_augment(), batch_size=8)
    """
    batch = draw(st.integers(0, 4)) if batch_size is None else batch_size
    slots = draw(st.integers(1, min(4, len(space)))) if max_ops is None else max_ops
    generator = np.random.default_rng(draw(_SEEDS))
    num_ops = generator.integers(1, slots + 1, batch)
    used = np.arange(slots) < num_ops[:, None]
    order = generator.random((batch, len(space))).argsort(1)[:, :slots]
    keep = used & (generator.random((batch, slots)) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    last = space.num_magnitude_bins - 1
    bins = generator.integers(0, last + 1, (batch, slots))
    ends = draw(st.sampled_from([None, 0, last]))
    bins = np.where(keep, bins if ends is None else ends, 0)
    signs = np.where(keep, generator.choice([-1, 1], (batch, slots)), 1)
    corners = np.array([0.0, 0.5, 1 - 2**-24])
    anywhere = generator.random((batch, slots, 2)) * (1 - 2**-24)
    centers = anywhere if draw(st.booleans()) else generator.choice(corners, (batch, slots, 2))
    return Actions(
        num_ops=torch.from_numpy(num_ops),
        ops=torch.from_numpy(np.where(used, order, -1)),
        keep=torch.from_numpy(keep),
        magnitude_bins=torch.from_numpy(bins),
        signs=torch.from_numpy(signs).to(torch.int8),
        centers=torch.from_numpy(centers).float(),
        log_prob=torch.from_numpy(-20 * generator.random(batch)).float(),
    )


@st.composite
def policies(draw: st.DrawFn, space: SearchSpace | None = None) -> Policy:
    """Policies of every kind; those that learn have learned something, much, or nothing.

    Args:
        draw: given by hypothesis.
        space: of the policy; None for any of :func:`spaces`.

    Returns:
        A strategy of :class:`Policy`.

    Example:
        >>> strategy = policies(SearchSpace.rand_augment())
    """
    space = draw(spaces()) if space is None else space
    kind = draw(st.sampled_from([OLAPolicy, UniformPolicy, RandAugmentPolicy]))
    if kind is RandAugmentPolicy:
        last = space.num_magnitude_bins - 1
        return RandAugmentPolicy(space, draw(st.integers(0, 3)), draw(st.integers(0, last)))
    slots = draw(st.integers(1, min(4, len(space))))
    if kind is UniformPolicy:
        return UniformPolicy(space, slots, draw(st.floats(0, 1)))
    policy = OLAPolicy(space, slots)
    scale, generator = draw(st.sampled_from([0.0, 1.0, 30.0])), torch.Generator()
    generator.manual_seed(draw(_SEEDS))
    with torch.no_grad():
        for logits in policy.named_logits().values():
            logits.copy_(scale * torch.randn(logits.shape, generator=generator, device="cpu"))
    return policy
