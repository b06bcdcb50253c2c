"""Rotated boxes follow flips, translations and rotations exactly, and shears as torchvision's."""

import math

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf
from torchvision.tv_tensors import BoundingBoxFormat

from ola_augment import Operation, PolicyTransform, SearchSpace, UniformPolicy

FORMATS = [BoundingBoxFormat.XYWHR, BoundingBoxFormat.CXCYWHR, BoundingBoxFormat.XYXYXYXY]
SIZE = (60, 80)
IMAGE = torch.zeros(3, *SIZE, dtype=torch.uint8)
CXCYWHR = torch.tensor(
    [[40.0, 30, 20, 10, 0], [35, 25, 12, 16, 30], [50, 28, 10, 18, -75], [33, 33, 9, 9, 140]],
    dtype=torch.float64,
)


def boxes_of(box_format, dtype=torch.float64, clamping_mode=None):
    values = tvf.convert_bounding_box_format(CXCYWHR.clone(), BoundingBoxFormat.CXCYWHR, box_format)
    return tv_tensors.BoundingBoxes(
        values.to(dtype), format=box_format, canvas_size=SIZE, clamping_mode=clamping_mode
    )


def augmented(boxes, *operations):
    space = SearchSpace(operations)
    _, moved = PolicyTransform(UniformPolicy(space, len(operations), 1.0))(IMAGE, boxes)
    assert (type(moved), moved.format, moved.dtype) == (type(boxes), boxes.format, boxes.dtype)
    assert moved.clamping_mode == boxes.clamping_mode
    return moved


def same(moved, expected, box_format, atol=1e-9):
    difference = (moved - expected).as_subclass(torch.Tensor)
    if box_format != BoundingBoxFormat.XYXYXYXY:
        difference[:, 4] = (difference[:, 4] + 180) % 360 - 180
    assert difference.abs().max() <= atol


@pytest.mark.parametrize("box_format", FORMATS)
@pytest.mark.parametrize("flip", ["flip_lr", "flip_ud"])
def test_flips_are_torchvisions(box_format, flip):
    boxes = boxes_of(box_format)
    theirs = tvf.horizontal_flip if flip == "flip_lr" else tvf.vertical_flip
    same(augmented(boxes, Operation(flip)), theirs(boxes), box_format)


@pytest.mark.parametrize("box_format", FORMATS)
@pytest.mark.parametrize("degrees", [30.0, 90.0, -135.0, 180.0])
def test_rotations_are_torchvisions(box_format, degrees):
    boxes = boxes_of(box_format)
    expected = tvf.rotate(boxes, degrees)
    same(augmented(boxes, Operation("rotate", degrees, degrees)), expected, box_format)


@pytest.mark.parametrize("box_format", FORMATS)
def test_translations_keep_all_but_the_place(box_format):
    boxes = boxes_of(box_format)
    moved = augmented(boxes, Operation("translate_x", 7, 7), Operation("translate_y", -4, -4))
    shift = torch.tensor([-7.0, 4.0])
    if box_format == BoundingBoxFormat.XYXYXYXY:
        torch.testing.assert_close(moved.as_subclass(torch.Tensor), boxes + shift.repeat(4))
    else:
        torch.testing.assert_close(
            (moved - boxes)[:, :2].as_subclass(torch.Tensor), shift.expand(4, 2).double()
        )
        assert torch.equal(moved[:, 2:], boxes[:, 2:])


@pytest.mark.parametrize("box_format", FORMATS)
@pytest.mark.parametrize("m", [0.3, -0.7])
def test_shears_are_torchvisions(box_format, m):
    boxes = boxes_of(box_format)
    # Ours leads from the result to the image, and keeps the first row in its place.
    expected = tvf.affine_bounding_boxes(
        boxes.as_subclass(torch.Tensor).clone(), box_format, SIZE,
        *(0, [0, 0], 1.0, [math.degrees(math.atan(m)), 0.0], [0.0, 0.0]), clamping_mode=None,
    )  # fmt: skip
    same(augmented(boxes, Operation("shear_x", m, m)), expected, box_format, 1e-4)


@pytest.mark.parametrize("box_format", FORMATS)
@pytest.mark.parametrize("name", ["invert", "blur", "cutout", "identity"])
def test_colours_leave_them(box_format, name):
    magnitudes = (5, 5) if name == "cutout" else ()
    for dtype in (torch.float32, torch.float16):
        boxes = boxes_of(box_format, dtype, "soft")
        assert torch.equal(augmented(boxes, Operation(name, *magnitudes)), boxes)


def test_four_quarter_turns_lead_back():
    boxes = boxes_of(BoundingBoxFormat.CXCYWHR, torch.float32)
    square = tv_tensors.BoundingBoxes(boxes, format="CXCYWHR", canvas_size=(60, 60))
    turn = PolicyTransform(UniformPolicy(SearchSpace((Operation("rotate", 90, 90),)), 1, 1.0))
    moved = square
    for _ in range(4):
        _, moved = turn(IMAGE[..., :60], tv_tensors.wrap(moved, like=square))
    same(moved, square, BoundingBoxFormat.CXCYWHR, 1e-4)


@pytest.mark.parametrize("mode", ["soft", "hard", None])
def test_the_clamping_mode_is_honoured(mode):
    boxes = boxes_of(BoundingBoxFormat.XYXYXYXY, clamping_mode=mode)
    moved = augmented(boxes, Operation("translate_x", 45, 45))
    expected = tvf.clamp_bounding_boxes(
        boxes.as_subclass(torch.Tensor) - torch.tensor([45.0, 0]).repeat(4),
        boxes.format, SIZE, mode,
    )  # fmt: skip
    torch.testing.assert_close(moved.as_subclass(torch.Tensor), expected)
    free = boxes.as_subclass(torch.Tensor) - torch.tensor([45.0, 0]).repeat(4)
    assert (mode is None) == torch.equal(moved.as_subclass(torch.Tensor), free)
