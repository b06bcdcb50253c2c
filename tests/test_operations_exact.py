"""The uint8 kernels equal Pillow bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import assorted, crops
from pillow_reference import draw, one_operation, pillow_apply
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ola_augment import testing
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


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    images=testing.images(dtypes=[torch.uint8], batch=True),
    space=testing.spaces(),
    data=st.data(),
    fill=st.lists(st.integers(0, 255), min_size=3, max_size=3),
    mode=st.sampled_from(MODES),
)
def test_any_actions_on_any_images_equal_pillow(images, space, data, fill, mode) -> None:
    drawn = data.draw(testing.actions(space, batch_size=len(images)))
    before = images.clone()
    fill = fill[: images.shape[1]]
    result = apply_actions(images, space, drawn, interpolation=mode, fill=fill)
    assert torch.equal(result, pillow_apply(images, space, drawn, mode is MODES[1], fill))
    assert torch.equal(images, before)
    for i in range(len(images)):
        one = images[i : i + 1], space, drawn.select([i])
        alone = apply_actions(*one, interpolation=mode, fill=fill)
        assert torch.equal(alone, result[i : i + 1])


@pytest.mark.parametrize(("height", "width"), [(1, 33000), (33000, 1), (300, 33000)])
@pytest.mark.parametrize(
    ("name", "magnitude"),
    # Shears by a third meet pixel borders, where it shows that Pillow adds coordinates up.
    [("rotate", 1.01), ("shear_x", 1 / 3), ("shear_y", 1 / 3)],
)
def test_sides_beyond_fixed_point_equal_pillow(name, magnitude, height: int, width: int) -> None:
    space, actions = single(Operation(name, magnitude, magnitude))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1, 1, height, width), generator=generator, dtype=torch.uint8)
    result = alone_and_in_a_batch(images, space, actions)
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
