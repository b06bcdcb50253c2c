"""Boxes and key points: untouched where nothing moves, rounded once where something does."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from ola_augment import OLAAugment, Operation, PolicyTransform, SearchSpace, UniformPolicy

DTYPES = [torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float16, torch.float32]
FORMATS = ["XYXY", "XYWH", "CXCYWH"]
FLIPS = {
    "flip_lr": tvf.horizontal_flip,
    "flip_ud": tvf.vertical_flip,
}
AFFINE = {
    "rotate": (Operation("rotate", 30, 30), lambda x: tvf.rotate(x, 30)),
    "translate_x": (Operation("translate_x", 9, 9), lambda x: affine(x, translate=[-9, 0])),
    "translate_y": (Operation("translate_y", -7, -7), lambda x: affine(x, translate=[0, 7])),
}


def affine(x, translate):
    return tvf.affine(x, 0.0, translate, 1.0, [0.0, 0.0])


def always(*operations):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0))


def image(height=32, width=32):
    return tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))


def boxes(values, dtype=torch.float32, size=(32, 32), kind="XYXY", **options):
    values = torch.tensor(values).to(dtype)
    return tv_tensors.BoundingBoxes(values, format=kind, canvas_size=size, **options)


def points(values, dtype=torch.float32, size=(32, 32)):
    return tv_tensors.KeyPoints(torch.tensor(values).to(dtype), canvas_size=size)


@pytest.mark.parametrize("mode", ["soft", "hard", None])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_an_image_that_does_not_move_nothing_changes(dtype, kind, mode):
    size = (20, 300)
    partly_outside = [[7, 8, 5, 5], [250, 3, 90, 31], [201, 0, 203, 40], [0, 0, 0, 0]]
    given = boxes(partly_outside, dtype, size, kind, clamping_mode=mode)
    shown = points([[3, 5], [0, 10], [255, 19]], dtype, size)
    if dtype.is_floating_point:
        shown = tv_tensors.wrap(shown + 0.3, like=shown)
        given = tv_tensors.wrap(given + 0.3, like=given)
    still = (Operation("invert"), Operation("rotate", 0, 0), Operation("translate_x", 0, 0))
    for operation in still:
        same = always(operation)
        _, out, moved = same(image(*size), given, shown)
        for _ in range(3):
            _, out, moved = same(image(*size), out, moved)
        assert torch.equal(out, given)
        assert torch.equal(moved, shown)
        assert (out.format, out.canvas_size, out.clamping_mode) == (given.format, size, mode)
        assert (out.dtype, moved.dtype) == (given.dtype, shown.dtype)
    back = always(Operation("flip_lr"))
    wide = boxes([[7, 8, 11, 9]], torch.int64, size, kind)
    assert torch.equal(back(image(*size), back(image(*size), wide)[1])[1], wide)


@pytest.mark.parametrize("name", FLIPS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_flipped_boxes_are_torchvisions(dtype, kind, name):
    values = torch.tensor([[7, 8, 15, 17], [-3, 20, 5, 40], [30, -2, 36, 1]])
    upright = boxes(values.tolist(), dtype, (32, 41), "XYXY", clamping_mode="hard")
    given = tvf.convert_bounding_box_format(upright, new_format=kind)
    _, out = always(Operation(name))(image(32, 41), given)
    assert torch.equal(out, FLIPS[name](given))


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("mode", ["soft", "hard", None])
@pytest.mark.parametrize("kind", FORMATS)
def test_moved_boxes_are_torchvisions_in_every_clamping_mode(kind, mode, name):
    operation, theirs = AFFINE[name]
    values = [[7.5, 8.25, 15, 17], [-3, 20, 5, 40], [24, 1, 33, 9]]
    upright = boxes(values, torch.float64, (32, 41))
    given = tvf.convert_bounding_box_format(upright, new_format=kind)
    given = v2.SetClampingMode(mode)(given)
    _, out = always(operation)(image(32, 41), given)
    assert out.clamping_mode == mode
    torch.testing.assert_close(out, theirs(given), atol=1e-4, rtol=0)
    inside = tvf.convert_bounding_box_format(out, new_format="XYXY")
    assert (mode is None) == bool((inside < 0).any() or (inside > 41).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_coordinates_are_rounded_once(dtype):
    values = [[100.0, 301.0, 201.0, 403.0], [7, 8, 5, 5]]
    for name in ("rotate", "translate_x"):
        operation = Operation(name, 13, 13)
        exact = boxes(values, torch.float64, (500, 500), "CXCYWH")
        expected = always(operation)(image(500, 500), exact)[1].as_subclass(torch.Tensor)
        given = boxes(values, dtype, (500, 500), "CXCYWH")
        _, out = always(operation)(image(500, 500), given)
        once = expected.to(dtype) if dtype.is_floating_point else expected.round().to(dtype)
        if dtype == torch.bfloat16:  # 301 itself is not exact there
            rounded = given.double().as_subclass(torch.Tensor).tolist()
            exact = boxes(rounded, torch.float64, (500, 500), "CXCYWH")
            once = always(operation)(image(500, 500), exact)[1].to(dtype)
        assert torch.equal(out.as_subclass(torch.Tensor), once.as_subclass(torch.Tensor))


@pytest.mark.parametrize("annotation", [boxes, points])
def test_what_a_dtype_does_not_hold_is_refused_and_the_advice_works(annotation):
    given = annotation(
        [[0, 0, 10, 10]] if annotation is boxes else [[0, 10]], torch.uint8, (20, 300)
    )
    flip = always(Operation("flip_lr"))
    with pytest.raises(ValueError, match=r"reach .* 299|reach .* 300") as caught:
        flip(image(20, 300), given)
    assert "torch.uint8 does not hold; pass them as torch.int64" in str(caught.value)
    _, out = flip(image(20, 300), tv_tensors.wrap(given.to(torch.int64), like=given))
    assert out.dtype == torch.int64
    assert out.tolist() == ([[290, 0, 300, 10]] if annotation is boxes else [[299, 10]])


@pytest.mark.parametrize("name", ["flip_lr", "flip_ud", "rotate", "translate_x"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_whole_numbered_key_points_are_pixels(dtype, name):
    magnitudes = {"rotate": (90, 90), "translate_x": (4, 4)}.get(name, ())
    size = (32, 32) if name == "rotate" else (20, 32)
    pixels = torch.tensor([[3, 5], [10, 0], [31, 19], [14, 7]])
    for pixel in pixels.tolist():
        lit = image(*size)
        lit[:, pixel[1], pixel[0]] = 255
        out, moved = always(Operation(name, *magnitudes))(lit, points([pixel], dtype, size))
        assert moved.dtype == dtype
        x, y = moved[0].tolist()
        assert (out[0, y, x] == 255) == bool(out.any())
    edge = points([[0, 10], [31, 10]], dtype, (20, 32))
    sample = always(Operation("flip_lr"))({"image": image(20, 32), "points": edge})
    assert sample["points"].tolist() == [[31, 10], [0, 10]]
    assert len(v2.SanitizeKeyPoints(labels_getter=None)(sample)["points"]) == 2


def test_fractional_key_points_are_coordinates():
    given = points([[3.5, 5.5], [0.0, 10.0]])
    _, out = always(Operation("flip_lr"))(image(), given)
    assert out.tolist() == [[28.5, 5.5], [32.0, 10.0]]


def test_an_annotation_that_moves_is_not_written_to():
    given = boxes([[1, 2, 3, 4]])
    for operation in (Operation("flip_lr"), Operation("invert")):
        _, out = always(operation)(image(), given)
        out.zero_()
        assert given.tolist() == [[1, 2, 3, 4]]
    assert OLAAugment()(image(), given)[1].shape == (1, 4)
