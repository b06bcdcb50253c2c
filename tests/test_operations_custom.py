"""A user's own kernels among the built-in operations."""

import math

import pytest
import torch
from batched_kernels import apply_batched
from images import crops
from pillow_reference import PILLOW, affine, draw, one_operation, pillow_apply, slot_of
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode

from ola_augment import PolicyTransform, UniformPolicy
from ola_augment.operations import apply_actions, apply_geometry_to_masks, transform_points
from ola_augment.operations.program import program
from ola_augment.space import Operation, SearchSpace


def shift_levels(images: Tensor, magnitudes: Tensor) -> Tensor:
    return images + magnitudes.view(-1, 1, 1, 1)


SPACE = SearchSpace(
    (
        Operation("shift_levels", 0, 0.4, signed=True, kernel=shift_levels),
        Operation("invert", kernel=lambda images, _: images / 2),
        *(o for o in SearchSpace.wide_long().operations if o.name != "invert"),
    )
)


def reference(images: Tensor, actions) -> Tensor:
    """Slot by slot, example by example, with one call of a kernel for each."""
    built_in = SearchSpace(SPACE.operations[2:])
    results = []
    for i in range(len(images)):
        image = images[i : i + 1]
        for s in range(actions.ops.shape[1]):
            one = slot_of(actions.select([i]), s)
            op, k = int(one.ops), int(one.magnitude_bins)
            if not one.keep:
                continue
            if op >= 2:
                image = apply_actions(image, built_in, one._replace(ops=one.ops - 2))
                continue
            magnitude = SPACE.operations[op].magnitude(k, 31, 16, 16) * int(one.signs)
            value = shift_levels(image / 255, torch.tensor([magnitude], dtype=torch.float32))
            value = value if op == 0 else image / 255 / 2
            image = (value.clamp(0, 1) * 255).round().to(torch.uint8)
        results.append(image)
    return torch.cat(results)


def test_uint8_goes_through_floats_and_is_rounded() -> None:
    images = crops(120, 16, 16)
    actions = draw(SPACE, 120, 5, keep_prob=0.8)
    assert ((actions.ops < 2) & actions.keep).sum() > 30
    expected = reference(images, actions)
    assert torch.equal(apply_actions(images, SPACE, actions), expected)
    assert torch.equal(
        apply_batched(images, program(SPACE, 16, 16), actions, (0,) * 3, False), expected
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_the_kernel_gets_float32_and_signed_magnitudes(dtype: torch.dtype) -> None:
    seen = []

    def spy(images: Tensor, magnitudes: Tensor) -> Tensor:
        seen.append((images.dtype, images.shape, magnitudes.dtype, magnitudes.tolist()))
        assert images.min() >= 0
        assert images.max() <= 1
        return images + 5

    space = SearchSpace((Operation("spy", 1, 4, signed=True, kernel=spy),), num_magnitude_bins=4)
    images = crops(4, 8, 8)
    images = images if dtype == torch.uint8 else (images / 255).to(dtype)
    actions = draw(space, 4, 1)._replace(
        magnitude_bins=torch.tensor([[3], [0], [1], [2]]),
        signs=torch.tensor([[-1], [1], [-1], [1]], dtype=torch.int8),
    )
    result = apply_actions(images, space, actions)
    assert seen == [(torch.float32, (4, 3, 8, 8), torch.float32, [-4.0, 1.0, -2.0, 3.0])]
    assert result.dtype == dtype
    assert (result == (255 if dtype == torch.uint8 else 1)).all()


@pytest.mark.parametrize("floating", [False, True])
def test_a_kernel_that_returns_something_else_is_named(floating: bool) -> None:
    images = crops(3, 8, 8)
    images = images / 255 if floating else images
    for kernel, error, message in (
        (
            lambda x, m: x[..., 1:],
            ValueError,
            r"'cropped' must return the shape it was given, \(3, 3",
        ),
        (lambda x, m: None, TypeError, "'cropped' must return a tensor, got NoneType"),
        (lambda x, m: x.to("meta"), ValueError, "must return a dense tensor on cpu.*on meta"),
        (lambda x, m: x.to_sparse(), ValueError, "must return a dense tensor on cpu.*sparse_coo"),
    ):
        space = SearchSpace((Operation("cropped", kernel=kernel),))
        with pytest.raises(error, match=message):
            apply_actions(images, space, draw(space, 3, 1))


LEVELS = {  # invert, in the ways of functions for images of bytes
    "bytes": lambda x, _: 255 - (x * 255).round().to(torch.uint8),
    "int64": lambda x, _: 255 - (x * 255).round().long(),
    "bool": lambda x, _: x < 0.5,
    "floats": lambda x, _: 255 - x * 255,
    "NaN": lambda x, _: (x - x.mean()) / (x - x).sum() * 0,
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 6])
def test_kernels_for_bytes_are_taken_as_such_and_other_scales_refused(dtype, count) -> None:
    images = crops(count, 16, 16)
    tops = {torch.uint8: 255, torch.uint16: 65535}
    top = tops.get(dtype, 1)
    given = (images.double() * top / 255).to(dtype)
    for name, kernel in LEVELS.items():
        space = SearchSpace((Operation("own", kernel=kernel),))
        drawn = draw(space, count, 1)
        if name == "bytes":
            result = apply_actions(given, space, drawn)
            expected = (255 - images).double() * top / 255
            assert result.dtype == dtype
            assert (result.double() - expected).abs().max() <= 1e-6
            continue
        refusal = ValueError if name in ("floats", "NaN") else TypeError
        got = r"\.\. 2\d\d" if name == "floats" else name
        message = rf"kernel of operation 'own' must return floats in \[0, 1\].* got .*{got}"
        with pytest.raises(refusal, match=message):
            apply_actions(given, space, drawn)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.float64])
@pytest.mark.parametrize("above", [False, True])
def test_a_kernel_may_write_into_what_it_is_given(dtype: torch.dtype, above: bool) -> None:
    images = crops(3, 8, 8)
    top = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    given = (images.double() * top / 255).to(dtype)
    if above and dtype.is_floating_point:
        given[0, 0, 0, 0] = 1.02
    before = given.clone()
    space = SearchSpace((Operation("halve", kernel=lambda x, _: x.mul_(0.5)), *SPACE.operations))
    drawn = draw(space, 3, 2)
    drawn.ops[:] = torch.tensor([[0, 2], [0, 0], [2, 0]])  # with x / 2, which writes nowhere
    result = apply_actions(given, space, drawn)
    assert torch.equal(given, before)
    expected = given.double().clamp(0, top) / 4
    assert (result.double() - expected).abs().max() <= (1 if top > 1 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_random_kernel_gets_what_was_drawn_for_each_image(dtype: torch.dtype) -> None:
    def lift(images: Tensor, magnitudes: Tensor, uniforms: Tensor) -> Tensor:
        assert (uniforms.shape, uniforms.dtype) == ((len(images), 2), torch.float32)
        return images + (magnitudes * (uniforms[:, 0] - 0.5 * uniforms[:, 1])).view(-1, 1, 1, 1)

    own = Operation("lift", 0, 0.5, kernel=lift, random=True, matrix=zoom)
    space = SearchSpace((own, *SPACE.operations))
    images = crops(60, 16, 16) if dtype == torch.uint8 else crops(60, 16, 16) / 255
    actions = draw(space, 60, 4, keep_prob=0.9)
    moving = (actions.ops == 0).logical_and(actions.keep)
    assert moving.sum() > 5
    result = apply_actions(images, space, actions)
    for i in range(60):
        one = apply_actions(images[i : i + 1], space, actions.select([i]))
        torch.testing.assert_close(result[i : i + 1], one)
    again = actions._replace(centers=torch.rand(60, 4, 2))
    assert not torch.equal(apply_actions(images, space, again), result)
    alone = one_operation(60, 0, 15)
    lifted = apply_actions(torch.zeros(60, 1, 2, 2), space, alone)[:, 0, 0, 0]
    u, v = alone.centers[:, 0].unbind(1)
    torch.testing.assert_close(lifted, (0.25 * (u - 0.5 * v)).clamp(min=0))
    apply_geometry_to_masks(torch.zeros(60, 2, 2), space, alone)
    with pytest.raises(ValueError, match="random is for a kernel of your own"):
        Operation("rotate", 0, 30, random=True)
    with pytest.raises(TypeError, match="random must be a bool"):
        Operation("lift", 0, 1, kernel=lift, random=1)


def test_masks_and_points_refuse_an_unknown_geometry() -> None:
    actions = draw(SPACE, 2, 1)._replace(ops=torch.tensor([[0], [5]]))
    with pytest.raises(ValueError, match="whose geometry is unknown: shift_levels"):
        apply_geometry_to_masks(torch.zeros(2, 8, 8), SPACE, actions)
    with pytest.raises(ValueError, match="whose geometry is unknown: shift_levels"):
        transform_points(torch.zeros(2, 1, 2), SPACE, actions, 8, 8)
    dropped = actions._replace(keep=torch.tensor([[False], [True]]))
    assert apply_geometry_to_masks(torch.zeros(2, 8, 8), SPACE, dropped).shape == (2, 8, 8)


def zoom(magnitudes: Tensor, height: int, width: int) -> Tensor:
    """About the centre, with a shear that needs both rows of the matrix."""
    zero, x, y = torch.zeros_like(magnitudes), width / 2, height / 2
    rows = [
        [magnitudes, zero + 0.1, x - magnitudes * x - 0.1 * y],
        [zero - 0.2, magnitudes, y - magnitudes * y + 0.2 * x],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def pillow_zoom(image, magnitude, center, resample, fill):
    matrix = zoom(torch.tensor([magnitude], dtype=torch.float64), image.height, image.width)
    return affine(image, tuple(matrix.flatten().tolist()), resample, fill)


@pytest.mark.parametrize("mode", [InterpolationMode.NEAREST, InterpolationMode.BILINEAR])
def test_images_follow_a_matrix_as_in_pillow(mode, monkeypatch) -> None:
    monkeypatch.setitem(PILLOW, "zoom", pillow_zoom)
    own = Operation("zoom", 0.6, 1.6, signed=True, matrix=zoom)
    space = SearchSpace((own, *SearchSpace.wide_long().operations))
    for seed, images in enumerate([crops(40, 16, 16), crops(20, 24, 17)]):
        actions = draw(space, len(images), 3, seed)
        actions = actions._replace(ops=actions.ops.where(actions.ops > 3, 0))
        bilinear = mode is InterpolationMode.BILINEAR
        fill = (9, 200, 30)
        expected = pillow_apply(images, space, actions, bilinear, fill)
        result = apply_actions(images, space, actions, interpolation=mode, fill=fill)
        assert torch.equal(result, expected)
        table = program(space, *images.shape[2:])
        assert torch.equal(apply_batched(images, table, actions, fill, bilinear), expected)
        alone = actions._replace(keep=actions.ops == 0)
        exact = apply_actions(images, space, alone, interpolation=mode)
        floats = apply_actions(images / 255, space, alone, interpolation=mode)
        assert (floats * 255 - exact).abs().max() <= 3 * bilinear + 1e-3


def test_masks_boxes_and_points_follow_a_matrix() -> None:
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, 20:30, 24:44] = 255

    def moved_by_kernel(images: Tensor, magnitudes: Tensor) -> Tensor:
        table = SearchSpace((Operation("zoom", 0.6, 1.6, signed=True, matrix=zoom),))
        bins = ((magnitudes.abs() - 0.6) * 30).round().long()
        actions = draw(table, len(images), 1)
        signs = magnitudes.sign().to(torch.int8)
        return apply_actions(
            images, table, actions._replace(magnitude_bins=bins[:, None], signs=signs[:, None])
        )

    for kernel in (None, moved_by_kernel):
        operation = Operation("zoom", 0.6, 1.6, signed=True, matrix=zoom, kernel=kernel)
        augment = PolicyTransform(UniformPolicy(SearchSpace((operation,)), 1, 1.0))
        for _ in range(10):
            out, mask, boxes, points = augment(
                tv_tensors.Image(image),
                tv_tensors.Mask(image[0] > 0),
                tv_tensors.BoundingBoxes(
                    torch.tensor([[24.0, 20.0, 44.0, 30.0]]), format="XYXY", canvas_size=(64, 64)
                ),
                tv_tensors.KeyPoints(torch.tensor([[34.0, 25.0]]), canvas_size=(64, 64)),
            )
            assert torch.equal(mask, out[0] > 0)
            rows, columns = torch.nonzero(mask, as_tuple=True)
            left, top, right, bottom = boxes[0].tolist()
            assert left - 0.51 <= columns.min()
            assert columns.max() + 1 <= right + 0.51
            assert top - 0.51 <= rows.min()
            assert rows.max() + 1 <= bottom + 0.51
            x, y = points[0].tolist()
            assert abs(x - (columns.double().mean() + 0.5)) < 1
            assert abs(y - (rows.double().mean() + 0.5)) < 1


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (lambda m, h, w: None, TypeError, "must return a tensor, got NoneType"),
        (lambda m, h, w: torch.eye(2, 3), ValueError, r"shape \(62, 2, 3\), got \(2, 3\)"),
        (lambda m, h, w: torch.zeros(len(m), 2, 3), ValueError, "invertible"),
        (lambda m, h, w: torch.full((len(m), 2, 3), math.nan), ValueError, "finite"),
        (lambda m, h, w: torch.eye(2, 3).expand(len(m), 2, 3) * 1e30, ValueError, "below"),
    ],
)
def test_bad_matrices_are_refused(matrix, error, message) -> None:
    space = SearchSpace((Operation("mine", 1, 2, matrix=matrix),))
    for images in (crops(2, 8, 8), crops(2, 8, 8) / 255):
        with pytest.raises(error, match=f"matrix of operation 'mine'.*{message}"):
            apply_actions(images, space, draw(space, 2, 1))
