"""Masks and points move as their images do."""

import pytest
import torch
from batched_kernels import apply_batched
from pillow_reference import draw, one_operation, pillow_apply, slot_of

from ola_augment import Operation
from ola_augment.kernels.affine import affine_nearest, fixed_point
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions, apply_geometry_to_masks, transform_points
from ola_augment.operations.program import program
from ola_augment.space import SearchSpace

SPACE = SearchSpace.wide_long()
GEOMETRIC = [i for i, o in enumerate(SPACE.operations) if TABLE[o.name].geometric]


def only_geometry(actions):
    kept = torch.isin(actions.ops, torch.tensor(GEOMETRIC))
    return actions._replace(keep=actions.keep & kept)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 40), (1, 9), (5, 1)])
def test_masks_move_exactly_as_images_do(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(1, 256, (300, 1, height, width), generator=generator, dtype=torch.uint8)
    actions = draw(SPACE, 300, 4, keep_prob=0.9)
    before = masks.clone()
    result = apply_geometry_to_masks(masks, SPACE, actions)
    assert torch.equal(result, apply_actions(masks, SPACE, only_geometry(actions)))
    assert torch.equal(masks, before)
    assert (result == 0).any()


@pytest.mark.parametrize(("height", "width"), [(12, 33000), (40000, 9), (1, 35001)])
@pytest.mark.parametrize(
    ("name", "magnitude"),
    [
        ("rotate", 0.01),
        ("rotate", -1.01),
        ("rotate", 180),
        ("shear_x", 1 / 3),
        ("shear_y", 1 / 3),
        ("translate_x", 7.7),
        ("flip_lr", None),
    ],
)
def test_masks_of_long_images_are_where_the_image_is(name, magnitude, height, width) -> None:
    ends = () if magnitude is None else (magnitude, magnitude)
    space = SearchSpace((Operation(name, *ends),))
    actions = one_operation(2, 0, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (2, 1, height, width), generator=generator, dtype=torch.uint8)
    expected = pillow_apply(images, space, actions)
    masks = apply_geometry_to_masks(images, space, actions)
    assert torch.equal(masks, expected)
    for kind in (lambda x: x, lambda x: x / 255):
        moved = apply_actions(kind(images), space, actions)
        assert torch.equal(
            (moved * (255 if moved.dtype.is_floating_point else 1)).round().byte(), expected
        )
    table = program(space, height, width)
    assert torch.equal(apply_batched(images, table, actions, (0,), False), expected)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.int32, torch.int64, torch.float16, torch.float64]
)
@pytest.mark.parametrize("middle", [(), (1,), (4,), (2, 3), (0,)])
def test_masks_of_any_dtype_and_rank(dtype: torch.dtype, middle: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(0, 100, (20, *middle, 12, 10), generator=generator).to(dtype)
    actions = draw(SPACE, 20, 3)
    result = apply_geometry_to_masks(masks, SPACE, actions)
    assert result.shape == masks.shape
    assert result.dtype == dtype
    planes = masks.reshape(20, -1, 12, 10).to(torch.uint8)
    for plane in range(planes.shape[1]):
        alone = apply_actions(planes[:, plane, None].contiguous(), SPACE, only_geometry(actions))
        assert torch.equal(result.reshape(20, -1, 12, 10)[:, plane], alone[:, 0].to(dtype))


def test_other_operations_leave_masks_and_points() -> None:
    masks, points = torch.rand(3, 8, 8), torch.rand(3, 2, 2) * 8
    for op in set(range(len(SPACE))) - set(GEOMETRIC):
        actions = one_operation(3, op, 20)
        assert torch.equal(apply_geometry_to_masks(masks, SPACE, actions), masks)
        assert torch.equal(transform_points(points, SPACE, actions, 8, 8), points)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", GEOMETRIC, ids=[SPACE.operations[op].name for op in GEOMETRIC])
def test_points_land_where_their_pixels_do(op: int, sign: int) -> None:
    height, width = 24, 33
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    pixels = torch.stack([columns, rows], -1).reshape(1, -1, 2)
    for magnitude_bin in (0, 7, 20, 29):
        actions = one_operation(1, op, magnitude_bin, sign)
        moved = transform_points(pixels.double() + 0.5, SPACE, actions, height, width)
        # Which pixel each pixel of the result was, counted from 1; 0 outside.
        number = torch.arange(1, height * width + 1).view(1, height, width)
        source = apply_geometry_to_masks(number, SPACE, actions).flatten()
        came = source > 0
        landed = moved[0, source[came] - 1]
        # A pixel lands within half a pixel of its place, sheared by at most 0.99.
        assert (landed - (pixels[0, came] + 0.5)).abs().max() <= 1.0


def test_points_of_a_chain_follow_one_operation_after_the_other() -> None:
    points = torch.rand(50, 7, 2, dtype=torch.float64) * 20
    actions = draw(SPACE, 50, 4, keep_prob=0.8)
    expected = points
    for s in range(4):
        expected = transform_points(expected, SPACE, slot_of(actions, s), 20, 30)
    result = transform_points(points, SPACE, actions, 20, 30)
    torch.testing.assert_close(result, expected)
    assert transform_points(points.float(), SPACE, actions, 20, 30).dtype == torch.float32
    assert transform_points(points[:, :0], SPACE, actions, 20, 30).shape == (50, 0, 2)


def test_no_negative_integer_is_shifted(monkeypatch) -> None:
    """As on XLA, where that rounds toward zero."""

    def toward_zero(values, bits):
        assert not isinstance(values, torch.Tensor) or bool((values >= 0).all())
        return shift(values, bits)

    shift = torch.Tensor.__rshift__
    monkeypatch.setattr(torch.Tensor, "__rshift__", toward_zero)
    matrices = ((0.7, 0.7, -20.0, -0.7, 0.7, -3.0), (-1.0, 0.0, 8.0, 0.0, 1.0, -2.0))
    images = torch.arange(1, 129).view(2, 1, 8, 8)
    fixed = torch.tensor([fixed_point(matrix) for matrix in matrices])
    moved = affine_nearest(images, fixed, torch.zeros(1, 1, 1, dtype=torch.int64))
    assert torch.equal(moved[1, :, 2:], images[1, :, :6].flip(-1))
    assert (moved[0] == 0).any()
