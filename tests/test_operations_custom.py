"""A user's own kernels among the built-in operations."""

import pytest
import torch
from images import crops
from pillow_reference import draw
from torch import Tensor

from ola_augment.operations import apply_actions, apply_geometry_to_masks, transform_points
from ola_augment.operations.batched import apply_batched
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
            one = type(actions)(
                *(f[i : i + 1, s : s + 1] if f.ndim > 1 else f[i : i + 1] for f in actions)
            )
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
    ):
        space = SearchSpace((Operation("cropped", kernel=kernel),))
        with pytest.raises(error, match=message):
            apply_actions(images, space, draw(space, 3, 1))


def test_masks_and_points_refuse_an_unknown_geometry() -> None:
    actions = draw(SPACE, 2, 1)._replace(ops=torch.tensor([[0], [5]]))
    with pytest.raises(ValueError, match="whose geometry is unknown: shift_levels"):
        apply_geometry_to_masks(torch.zeros(2, 8, 8), SPACE, actions)
    with pytest.raises(ValueError, match="whose geometry is unknown: shift_levels"):
        transform_points(torch.zeros(2, 1, 2), SPACE, actions, 8, 8)
    dropped = actions._replace(keep=torch.tensor([[False], [True]]))
    assert apply_geometry_to_masks(torch.zeros(2, 8, 8), SPACE, dropped).shape == (2, 8, 8)
