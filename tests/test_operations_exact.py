"""The uint8 kernels equal Pillow bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import assorted, crops, patterns
from pillow_reference import draw, one_operation, pillow_apply
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment.actions import Actions
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions
from ola_augment.space import Operation, SearchSpace

SPACES = [SearchSpace.rand_augment(), SearchSpace.wide_long()]
MODES = [InterpolationMode.NEAREST, InterpolationMode.BILINEAR]
GEOMETRIC = {row.name for row in TABLE.values() if row.geometric}


def every_draw(space: SearchSpace, op: int) -> list[tuple[int, int]]:
    """All (bin, sign) of an operation that differ in meaning."""
    operation = space.operations[op]
    bins = 1 if operation.low is None else space.num_magnitude_bins
    return [(k, sign) for k in range(bins) for sign in ((1, -1) if operation.signed else (1,))]


def single(*operations: Operation) -> tuple[SearchSpace, Actions]:
    """A space and the actions that apply bin 0 of its operations one after the other."""
    slots = len(operations)
    return SearchSpace(operations), Actions(
        num_ops=torch.tensor([slots]),
        ops=torch.arange(slots)[None],
        keep=torch.ones(1, slots, dtype=torch.bool),
        magnitude_bins=torch.zeros(1, slots, dtype=torch.int64),
        signs=torch.ones(1, slots, dtype=torch.int8),
        centers=torch.full((1, slots, 2), 0.5),
        log_prob=torch.zeros(1),
    )


def alone_and_in_a_batch(images: Tensor, space: SearchSpace, actions: Actions, **how) -> Tensor:
    """One image by Pillow's own functions, and twice by the compiled kernels: the same."""
    alone = apply_actions(images, space, actions, **how)
    pair = Actions(*(torch.cat([field, field]) for field in actions))
    together = apply_actions(torch.cat([images, images]), space, pair, **how)
    assert torch.equal(together, torch.cat([alone, alone]))
    return alone


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(
    ("space", "op"),
    [
        pytest.param(space, op, id=f"{space.name}-{operation.name}")
        for space in SPACES
        for op, operation in enumerate(space.operations)
    ],
)
def test_every_bin_and_sign_equals_pillow(space: SearchSpace, op: int, channels: int) -> None:
    batches = assorted(channels)
    assert sum(map(len, batches)) >= 200
    modes = MODES if space.operations[op].name in GEOMETRIC else MODES[:1]
    # One channel runs through the same code: every third draw of it.
    for magnitude_bin, sign in every_draw(space, op)[:: 1 if channels == 3 else 3]:
        for images in batches:
            actions = one_operation(len(images), op, magnitude_bin, sign, seed=magnitude_bin)
            for mode in modes:
                result = apply_actions(images, space, actions, interpolation=mode)
                expected = pillow_apply(images, space, actions, mode is MODES[1])
                assert torch.equal(result, expected), (magnitude_bin, sign, images.shape, mode)
                i = [magnitude_bin % len(images)]
                alone = apply_actions(images[i], space, actions.select(i), interpolation=mode)
                assert torch.equal(alone, expected[i]), (magnitude_bin, sign, images.shape, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_chains_of_four_equal_pillow(space: SearchSpace, mode: InterpolationMode) -> None:
    for seed, images in enumerate(
        [crops(200, 32, 32), crops(8, 100, 75), *assorted(), *assorted(1)]
    ):
        actions = draw(space, len(images), 4, seed, keep_prob=0.8)
        before = images.clone()
        fill = [255, 7, 100][: images.shape[1]]
        result = apply_actions(images, space, actions, interpolation=mode, fill=fill)
        assert torch.equal(result, pillow_apply(images, space, actions, mode is MODES[1], fill))
        assert torch.equal(images, before)
        assert result.is_contiguous()


contents = st.sampled_from(["noise", "flat", "two values", "ramp"])


def make_image(kind: str, channels: int, height: int, width: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    shape = (1, channels, height, width)
    low, high = sorted(generator.integers(0, 256, 2))
    array = {
        "noise": generator.integers(0, 256, shape),
        "flat": np.full(shape, low),
        "two values": np.where(generator.random(shape) < 0.1, low, high),
        "ramp": np.arange(np.prod(shape)).reshape(shape) * int(generator.integers(1, 9)),
    }[kind]
    return torch.from_numpy(array.astype(np.uint8))


#: How far the magnitudes of each unit are tried, where a domain reaches further.
REACH = {"degrees": 400, "px": 60, "": 4, "bits": 8}


def any_magnitude(row):
    """Any magnitude that an operation accepts, not only those of the two spaces."""
    if row.domain is None:
        return st.just(Operation(row.name))
    reach = REACH[row.unit] if row.domain[1] > 256 else row.domain[1]
    magnitudes = st.floats(max(row.domain[0], -reach), reach)
    if row.unit == "degrees":
        magnitudes |= st.sampled_from([-90, 0, 90, 180, 270, 450])
    return st.builds(lambda m: Operation(row.name, m, m), magnitudes)


custom_operations = st.one_of(*map(any_magnitude, TABLE.values()))


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    operations=st.lists(custom_operations, min_size=1, max_size=4, unique_by=lambda o: o.name),
    kind=contents,
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    fill=st.lists(st.integers(0, 255), min_size=3, max_size=3),
    mode=st.sampled_from(MODES),
)
def test_any_chain_on_any_image_equals_pillow(
    operations, kind, channels, height, width, seed, fill, mode
) -> None:
    space, actions = single(*operations)
    images = make_image(kind, channels, height, width, seed)
    fill = fill[:channels]
    result = alone_and_in_a_batch(images, space, actions, interpolation=mode, fill=fill)
    assert torch.equal(result, pillow_apply(images, space, actions, mode is MODES[1], fill))


@pytest.mark.parametrize(("height", "width"), [(1, 33000), (33000, 1), (300, 33000)])
@pytest.mark.parametrize(
    ("name", "magnitude"),
    # Shears by a third meet pixel borders, where it shows that Pillow adds coordinates up.
    [("rotate", 1.01), ("shear_x", 1 / 3), ("shear_y", 1 / 3)],
)
def test_sides_beyond_fixed_point_equal_pillow(name, magnitude, height: int, width: int) -> None:
    space, actions = single(Operation(name, magnitude, magnitude))
    images = make_image("noise", 1, height, width, seed=0)
    result = alone_and_in_a_batch(images, space, actions)
    assert torch.equal(result, pillow_apply(images, space, actions))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(3, 3)[..., ::3],
        lambda x: torch.nn.functional.pad(x, (2, 3, 1, 0))[..., 1:, 2:-3],
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["channels_last", "transposed", "every other", "every third", "window", "expanded"],
)
def test_strides_do_not_matter(strided) -> None:
    images = strided(torch.cat([crops(30, 20, 24), patterns(20, 24)]))
    assert not images.is_contiguous()
    space = SPACES[1]
    actions = draw(space, len(images), 3, seed=1)
    result = apply_actions(images, space, actions)
    assert torch.equal(result, apply_actions(images.contiguous(), space, actions))
    assert torch.equal(result, pillow_apply(images, space, actions))


def test_threads_do_not_matter() -> None:
    images, space = crops(301, 32, 32), SPACES[1]
    actions = draw(space, len(images), 4, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = apply_actions(images, space, actions)
        torch.set_num_threads(4)
        together = apply_actions(images, space, actions)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_nothing_drawn_is_a_copy() -> None:
    images, space = crops(3, 8, 8), SPACES[0]
    actions = draw(space, 3, 2, keep_prob=0)
    unused = actions._replace(
        num_ops=torch.ones(3, dtype=torch.int64), ops=torch.tensor([[2, -1]] * 3)
    )
    result = apply_actions(images, space, unused)
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


def test_empty_batch() -> None:
    result = apply_actions(
        torch.empty(0, 3, 8, 8, dtype=torch.uint8), SPACES[0], draw(SPACES[0], 0, 2)
    )
    assert result.shape == (0, 3, 8, 8)
    assert result.dtype == torch.uint8


def test_signs_of_unsigned_operations_are_ignored() -> None:
    images, space = crops(4, 16, 16), SPACES[1]
    for op, operation in enumerate(space.operations):
        positive, negative = (
            apply_actions(images, space, one_operation(4, op, 20, sign)) for sign in (1, -1)
        )
        assert torch.equal(positive, negative) != operation.signed, operation.name


def test_fill_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="fill must hold one value or one per channel"):
        apply_actions(crops(1, 8, 8), SPACES[0], draw(SPACES[0], 1, 1), fill=[1, 2])
