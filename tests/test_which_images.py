"""Pictures of several channels and depths through the transforms: PIL's modes, arrays, batches."""

import runpy
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings
from images import crops
from PIL import Image, ImageEnhance
from pillow_reference import one_operation, pillow_apply
from test_defaults import default_dtype
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment import (
    OLAAugment,
    Operation,
    PolicyTransform,
    RandAugment,
    SearchSpace,
    TrivialAugment,
    UniformAugment,
    UniformPolicy,
    load_policy,
    testing,
)
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions
from ola_augment.plots import augmented_samples, sample_strip
from ola_augment.training.metrics import scale_to_float

SPACE = SearchSpace.wide_long()
KINDS = [OLAAugment, UniformAugment, RandAugment, TrivialAugment]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def always(*operations, **options):
    space = SearchSpace(operations)
    return PolicyTransform(UniformPolicy(space, len(operations), 1.0), **options)


def bands(channels, height=12, width=15):
    return crops(channels, height, width)[:, 0].contiguous()


def picture(mode, height=12, width=15):
    """A PIL image of a mode, and its bands (C, H, W)."""
    if mode == "I;16":
        values = bands(1, height, width).numpy().astype(np.uint16) * 257 + 3
        return Image.fromarray(values[0]), values
    values = bands(len(mode), height, width).numpy()
    merged = values[0] if mode == "L" else values.transpose(1, 2, 0).copy()
    made = Image.fromarray(merged)
    assert made.mode == mode
    return made, values


def as_bands(image):
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------ PIL modes


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("name", TABLE)
def test_alpha_moves_and_is_cut_out_and_colours_leave_it(mode, name):
    operation = next(o for o in SPACE.operations if o.name == name)
    op = SPACE.operations.index(operation)
    image, values = picture(mode)
    augment = PolicyTransform(UniformPolicy(SPACE, 1, 1.0), fill=9)
    actions = one_operation(1, op, 21)
    result = augment.transform(image, {"actions": actions, "batch": ()})
    assert (result.mode, result.size) == (mode, image.size)
    colours = torch.from_numpy(values[None, :-1].copy())
    fill = [9] * (len(values) - 1)
    expected = pillow_apply(colours, SPACE, actions, fill=fill)
    assert np.array_equal(as_bands(result)[:-1], expected[0].numpy())
    alpha = torch.from_numpy(values[None, -1:].copy())
    if TABLE[name].geometric or name == "cutout":
        alpha = pillow_apply(alpha, SPACE, actions, fill=[9])
    assert np.array_equal(as_bands(result)[-1:], alpha[0].numpy())


def test_colours_of_rgba_are_what_pillow_makes_of_them():
    image, _ = picture("RGBA")
    for name, enhance in (("color", ImageEnhance.Color), ("contrast", ImageEnhance.Contrast)):
        result = always(Operation(name, 1.6, 1.6))(image)
        assert result.tobytes() == enhance(image).enhance(1.6).tobytes()


def test_sixteen_bits_stay_sixteen_bits():
    image, values = picture("I;16")
    inverted = always(Operation("invert"))(image)
    assert inverted.mode == "I;16"
    assert np.array_equal(np.asarray(inverted), 65535 - values[0])
    image.info["dpi"] = (300, 300)
    turned = always(Operation("flip_lr"), value_range=(0, 4095))(image)
    assert np.array_equal(np.asarray(turned), values[0][:, ::-1])
    assert turned.info == image.info


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_tensors_arrays_and_batches_are_one(kind, mode):
    image, values = picture(mode)
    before = image.tobytes()
    augment = kind(generator=generator(3), fill=11)
    results = [augment(image) for _ in range(6)]
    actions = kind(generator=generator(3), fill=11)
    for result in results:
        assert (type(result), result.mode, result.size) == (Image.Image, mode, image.size)
        # The same draw on the bands as a tensor, wherever colours do not end before the last band.
        again = actions(image)
        assert again.tobytes() == result.tobytes()
    assert image.tobytes() == before
    batch, drawn = kind(generator=generator(5), fill=11).collate([image] * 5)
    assert type(batch) is torch.Tensor
    assert batch.shape == (5, *values.shape)
    replayed = kind(fill=11)
    for i in range(5):
        params = {"actions": drawn.select([i]), "batch": ()}
        assert np.array_equal(as_bands(replayed.transform(image, params)), batch[i].numpy())


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_other_modes_stay_refused(mode):
    with pytest.raises(ValueError, match=rf"L, RGB, LA, RGBA, I;16, got {mode};"):
        RandAugment()(Image.new(mode, (8, 8)))


# ------------------------------------------------------------------------------ arrays and tensors


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_arrays_of_any_channels_are_their_tensors(channels, dtype):
    given = {"value_range": (0, 255)} if dtype == np.int16 else {}
    values = bands(channels, 16, 17).numpy()
    values = values / np.float32(255) if dtype == np.float32 else values.astype(dtype)
    array = np.ascontiguousarray(values.transpose(1, 2, 0))
    for seed in range(4):
        by_array = OLAAugment(generator=generator(seed), **given)
        by_tensor = OLAAugment(generator=generator(seed), **given)
        result = by_array(array)
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        expected = by_tensor(torch.from_numpy(values))
        if dtype == np.uint8 and channels in (1, 3):
            expected = by_tensor.replay(torch.from_numpy(values), by_array.last_actions)
        assert np.array_equal(result.transpose(2, 0, 1), expected.numpy())
    batch, actions = by_array.collate([array, array[:, ::-1]])
    assert batch.shape == (2, channels, 16, 17)
    assert actions.batch_size == 2


def test_masks_follow_images_of_many_bands():
    image = bands(13, 20, 22)
    mask = (image[0] > 100).long()
    turned, followed = always(Operation("rotate", 90, 90), fill=0)(
        tv_tensors.Image(image[:, :20, :20]), tv_tensors.Mask(mask[:20, :20])
    )
    assert torch.equal((turned[0] > 100).long(), followed.long())
    array, label = always(Operation("flip_lr"))(image.movedim(0, -1).numpy(), 3)
    assert label == 3
    assert np.array_equal(array, image.movedim(0, -1).numpy()[:, ::-1])


def test_single_images_of_many_sizes_make_no_tables():
    from ola_augment.operations.program import program

    augment, made = TrivialAugment(), program.cache_info().misses
    for side in range(20, 40):
        for channels in (2, 13):
            assert augment(bands(channels, side, side + 1)).shape == (channels, side, side + 1)
        assert augment(bands(3, side, side).float() / 255).dtype == torch.float32
    assert program.cache_info().misses == made


@pytest.mark.parametrize(
    ("dtype", "given"), [(torch.uint16, None), (torch.int16, (0, 32767)), (torch.float32, None)]
)
def test_the_test_kit_draws_such_images_and_finds_nothing(dtype, given):
    drawn = testing.images(dtypes=[dtype], channels=[1, 2, 5])
    seen = set()

    @settings(max_examples=40, derandomize=True, deadline=None, database=None)
    @hypothesis.given(drawn)
    def look(images):
        assert images.dtype == dtype
        seen.add(images.shape[-3])

    look()
    assert seen == {1, 2, 5}
    augment = PolicyTransform(UniformPolicy(SPACE, 2, 1.0), value_range=given)
    tolerance = 0.2 if dtype.is_floating_point else 0  # values on the border of two levels
    checks = [name for name in testing.CHECKS if name not in ("range", "reference")]
    testing.check_transform(
        augment, images=drawn, max_examples=8, tolerance=tolerance, checks=checks
    )


# --------------------------------------------------------------------------- beside the transforms


@pytest.mark.parametrize(
    ("dtype", "given", "channels"),
    [
        (torch.uint8, None, 1),
        (torch.uint16, None, 3),
        (torch.uint16, (0, 4095), 2),
        (torch.int16, (-1000, 2000), 3),
        (torch.float32, (0.0, 1.6), 13),
    ],
)
def test_figures_show_what_is_black_and_white(dtype, given, channels):
    low, high = given or (0, 255 if dtype == torch.uint8 else 65535)
    unit = torch.linspace(0, 1, 8).expand(1, channels, 8, 8)
    images = (unit * (high - low) + low).to(dtype)
    augment = UniformAugment(value_range=given)
    for figure in (augmented_samples(augment, images, 1), sample_strip({"a": augment}, images)):
        shown = np.asarray(figure.axes[0].images[0].get_array())
        assert shown.shape == ((8, 8, 3) if channels == 3 else (8, 8))
        assert np.abs(shown.reshape(8, 8, -1).mean((0, 2)) - unit[0, 0, 0].numpy()).max() < 0.01


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_integers_become_what_torch_makes_floats_of(default):
    bytes_, shorts = torch.arange(256, dtype=torch.uint8), torch.tensor([0, 1, 40000, 65535])
    with default_dtype(default):
        found, wide = scale_to_float(bytes_), scale_to_float(shorts.to(torch.uint16))
        assert found.dtype == wide.dtype == default
    assert torch.equal(found, (torch.arange(256, dtype=torch.float64) / 255).to(default))
    assert torch.equal(wide, (shorts.double() / 65535).to(default))


def test_integers_are_scaled_by_all_of_their_levels_for_the_model():
    for dtype, top in ((torch.uint8, 255), (torch.int64, 255), (torch.uint16, 65535)):
        assert scale_to_float(torch.tensor([0, top]).to(dtype)).tolist() == [0, 1]
    halves = torch.tensor([0.5, 2], dtype=torch.float16)
    assert scale_to_float(halves) is halves
    with pytest.raises(TypeError, match="int16 images have no black and white") as caught:
        scale_to_float(torch.tensor([-1000, 500, 2000]).short())
    for low, high in ((-1000, 2000), (-30000, 30000)):
        way = eval(str(caught.value).split("loss=), ")[1], {"low": low, "high": high})
        middle = (low + high) // 2
        assert way(torch.tensor([low, middle, high]).short()).tolist() == [0, 0.5, 1]


def test_what_torchvision_does_with_many_bands():
    bands13 = crops(1, 8, 8)[0].repeat(5, 1, 1)[:13]
    for adjust in (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation):
        with pytest.raises(TypeError, match="channel"):
            adjust(bands13, 1.5)
    for adjust in (partial(tvf.adjust_sharpness, sharpness_factor=1.5), tvf.autocontrast):
        with pytest.raises(TypeError, match="channel"):
            adjust(bands13)
    for same in (tvf.equalize, tvf.invert, tvf.horizontal_flip, partial(tvf.posterize, bits=4)):
        assert same(bands13).shape == bands13.shape


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("kind", KINDS)
def test_settings_reach_the_kernels_and_come_back_from_files(kind, tmp_path):
    images = crops(3, 10, 11).int()[:, :2] * 16
    images = images.to(torch.uint16)
    augment = kind(value_range=(0, 4095), grey_weights=[1, 3], generator=generator(1))
    result, actions = augment.augment(images)
    expected = apply_actions(
        images, augment.space, actions, value_range=(0, 4095), grey_weights=(1, 3)
    )
    assert torch.equal(result, expected)
    assert "value_range=(0, 4095), grey_weights=(0.25, 0.75)" in repr(augment)
    augment.save(tmp_path / "policy.json")
    back = kind.load(tmp_path / "policy.json")
    assert (back.value_range, back.grey_weights) == ((0, 4095), (0.25, 0.75))
    assert torch.equal(back.replay(images, actions), result)
    assert load_policy(tmp_path / "policy.json").space == augment.space
    for name in ("value_range", "grey_weights"):
        with pytest.raises(AttributeError, match=name):
            setattr(augment, name, None)
        assert f"{name}=" not in repr(kind())


def test_black_is_the_low_end_unless_a_fill_says_otherwise():
    images = torch.full((2, 2, 6, 6), 500, dtype=torch.int16)
    moved = Operation("translate_x", 2, 2)
    for fill, expected in ((None, -1000), (0, 0), ((-50, 70), (-50, 70))):
        augment = always(moved, value_range=(-1000, 2000), fill=fill)
        result = augment(images)
        uncovered = torch.tensor(expected).expand(2)
        assert torch.equal(result[0, :, 0, -1].long(), uncovered)
        assert (result[..., :4] == 500).all()
    with pytest.raises(ValueError, match=r"fill must lie in -1000 \.\. 2000"):
        always(moved, value_range=(-1000, 2000), fill=3000)
    with pytest.raises(ValueError, match=r"fill must lie in 0 \.\. 255 for uint8"):
        always(moved, fill=300)(crops(1, 8, 8))
    assert (always(moved, fill=300)(crops(1, 8, 8).to(torch.uint16))[..., -2:].int() == 300).all()


def test_what_does_not_fit_is_refused_before_anything_is_drawn():
    for augment, images, message in (
        (OLAAugment(value_range=(0, 4095)), crops(1, 8, 8), "uint8 images must be whole"),
        (OLAAugment(grey_weights=(1, 1)), crops(1, 8, 8), r"per channel \(3\), got 2"),
        (OLAAugment(), crops(1, 8, 8).short(), "value_range"),
        (OLAAugment(fill=(1, 2)), crops(1, 8, 8), r"one per channel \(3\)"),
    ):
        state = torch.get_rng_state()
        with pytest.raises((ValueError, TypeError), match=message):
            augment(images)
        assert torch.equal(torch.get_rng_state(), state)
        assert augment.last_actions is None


# ------------------------------------------------------------------------------------ docs

ROOT = Path(__file__).parents[1]


def test_the_documented_tables_are_made_by_the_code():
    generator = runpy.run_path(str(ROOT / "docs" / "images_table.py"))
    assert generator["TARGET"].read_text(encoding="utf-8") == generator["table"]()
    assert "{include} _images_table.md" in (ROOT / "docs" / "which_images.md").read_text()


def test_the_example_trains_on_thirteen_bands_and_on_twelve_bits(capsys):
    example = runpy.run_path(str(ROOT / "examples" / "many_bands.py"))
    train, bands, levels = (example[n] for n in ("train", "thirteen_bands", "twelve_bits"))
    images, targets = bands(192, 1)
    assert images.shape == (192, 13, 24, 24)
    assert train(images, targets, (0.0, 1.6), 3) > 0.5
    images, targets = levels(64, 1)
    assert (images.dtype, images.shape[1]) == (torch.uint16, 1)
    assert 0 <= train(images, targets, (0, 4095), 1) <= 1
    assert "OLAPolicy" in capsys.readouterr().out
