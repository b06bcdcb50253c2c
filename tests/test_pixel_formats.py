"""Any number of channels, any depth, any range: by oracles of Pillow's, band by band."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from images import crops, patterns, photographs
from PIL import Image, ImageFilter
from pillow_reference import PILLOW, draw, one_operation, pillow_apply
from test_operations_exact import GEOMETRIC, MODES, every_draw, single
from torch import Tensor

from ola_augment import Operation, SearchSpace
from ola_augment.kernels.pixel_format import pixel_format
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions, compile_kernels
from ola_augment.operations.executors import batched, compiled
from ola_augment.operations.program import program
from ola_augment.operations.steps import Rendering

SPACE = SearchSpace.wide_long()
NAMES = [operation.name for operation in SPACE.operations]
COUNT = 10
#: What Pillow does to a colour depends on the other colours.
JOINT = ("color", "contrast")


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    compile_kernels()


def bands(channels: int, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """(COUNT, channels, height, width) uint8 of photographs and patterns, all bands different."""
    pile = torch.cat([crops(20, height, width, seed), patterns(height, width, seed)])
    flat = pile.flatten(0, 1)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    repeated = flat[order].repeat(-(-COUNT * channels // len(flat)), 1, 1)
    return repeated[: COUNT * channels].view(COUNT, channels, height, width)


def three_ways(images: Tensor, space, actions, bilinear=False, fill=0, **range_and_grey) -> Tensor:
    """Through the compiled loop, the batched kernels, and one image at a time: the same."""
    mode = MODES[1] if bilinear else MODES[0]
    pixels = pixel_format(images.dtype, images.shape[1], **range_and_grey)
    rendering = Rendering((fill,) * images.shape[1], bilinear, pixels)
    steps = program(space, *images.shape[2:]).steps(actions)
    looped = compiled.run(images, steps, rendering)
    alike = batched.run(images, steps, rendering)
    given = {"interpolation": mode, "fill": fill, **range_and_grey}
    alone = [
        apply_actions(images[i : i + 1], space, actions.select([i]), **given)
        for i in range(0, len(images), 9)
    ]
    together = apply_actions(images, space, actions, **given)
    for other in (alike, together):
        if pixels.whole:
            assert torch.equal(looped.int(), other.int())
        else:
            # A value on a border, of two levels or of two pixels, may fall to its other side.
            off = (looped - other).abs() > 2e-6 * (pixels.high - pixels.low)
            assert off.double().mean() < 2e-3
    for i, image in enumerate(alone):
        assert torch.equal(image[0].double(), together[9 * i].double())
    return together


# ------------------------------------------------------------------------------ bytes, any channels


@pytest.mark.parametrize("channels", [2, 4, 13])
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(JOINT)))
def test_bytes_are_pillows_band_by_band(name, channels):
    op = NAMES.index(name)
    draws = every_draw(SPACE, op)
    sizes = ((16, 16), (5, 9), (1, 2))
    for i, (magnitude_bin, sign) in enumerate(draws[:: max(1, len(draws) // 3)]):
        for height, width in (sizes[i % 3],) if len(draws) > 1 else sizes:
            images = bands(channels, height, width, seed=magnitude_bin)
            actions = one_operation(len(images), op, magnitude_bin, sign)
            for mode in MODES if NAMES[op] in GEOMETRIC else MODES[:1]:
                result = three_ways(images, SPACE, actions, mode is MODES[1], fill=7)
                for c in range(channels):
                    expected = pillow_apply(
                        images[:, c : c + 1], SPACE, actions, mode is MODES[1], [7]
                    )
                    assert torch.equal(result[:, c : c + 1], expected)


def test_chains_on_many_bands_agree_and_leave_their_input_alone():
    for seed, channels in enumerate((1, 2, 3, 4, 5, 13)):
        images = bands(channels, 12, 17, seed)
        before = images.clone()
        three_ways(images, SPACE, draw(SPACE, len(images), 4, seed), bool(seed % 2), fill=9)
        assert torch.equal(images, before)


@pytest.mark.parametrize("channels", [2, 4, 13])
@pytest.mark.parametrize("weights", [None, "own"])
def test_grey_of_other_bands_is_their_mean_or_weighted(channels, weights):
    given = None
    share = np.full(channels, 1 / channels)
    if weights:
        share = np.arange(1.0, channels + 1)
        given = tuple(share / share.sum())
        share = np.array(given)
    images = bands(channels)
    values = images.numpy().astype(np.float64)
    grey = np.floor(np.einsum("c,nchw->nhw", share, values) + 0.5)[:, None]
    mean = np.floor(np.einsum("c,nchw->n", share, values) / values[0, 0].size + 0.5)
    for factor in (0.0, 0.3, 1.7):
        for name, degenerate in (("color", grey), ("contrast", mean.reshape(-1, 1, 1, 1))):
            space, actions = single(Operation(name, factor, factor))
            actions = actions.select([0] * len(images))
            result = three_ways(images, space, actions, grey_weights=given)
            expected = (degenerate + factor * (values - degenerate)).clip(0, 255)
            # Rounding of a half, and single precision of the blend, as in Pillow.
            assert np.abs(result.numpy() - np.floor(expected)).max() <= 1
            assert (result.numpy() != np.floor(expected)).mean() < 0.02


def test_contrast_keeps_the_ratios_of_bands_and_color_brings_them_together():
    images = bands(5).double() / 255
    space, actions = single(Operation("contrast", 0.5, 0.5))
    halved = apply_actions(images, space, actions.select([0] * COUNT))
    mean = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(halved - mean, (images - mean) / 2)
    space, actions = single(Operation("color", 0, 0))
    grey = apply_actions(images, space, actions.select([0] * COUNT))
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images))


# ------------------------------------------------------------------------------------ 16 bits


def deep(images: Tensor, low: int, high: int, dtype, seed: int = 0) -> Tensor:
    """Images of bytes with their range, and noise below a byte's step, in another dtype."""
    generator = np.random.default_rng(seed)
    noise = generator.random(images.shape)
    values = np.floor((images.numpy() + noise) / 256 * (high - low + 1)) + low
    return torch.from_numpy(values.astype({torch.uint16: np.uint16, torch.int16: np.int16}[dtype]))


def stretched(band, white):
    low, high = band.min(), band.max()
    if low == high:
        return band
    scale = white / (high - low)
    return np.floor((band * scale - low * scale).clip(0, white))


def equalized(band, white):
    levels = band.astype(np.int64).ravel()
    histogram = np.bincount(levels, minlength=int(white) + 1)
    step = (levels.size - histogram[levels.max()]) // int(white)
    if not step:
        return band
    below = step // 2 + histogram.cumsum() - histogram
    return np.minimum(below // step, white)[levels].reshape(band.shape)


def filtered(kernel, band, white):
    image = Image.fromarray(band.astype(np.int32), "I").filter(kernel)
    return np.asarray(image).astype(np.float64)


def blended(degenerate, band, factor, white):
    return np.floor((degenerate + factor * (band - degenerate)).clip(0, white))


#: name -> function(band counted from black, magnitude, white), in double precision.
TONES = {
    "auto_contrast": lambda x, m, white: stretched(x, white),
    "equalize": lambda x, m, white: equalized(x, white),
    "solarize": lambda x, m, white: np.where(x < m / 256 * (white + 1), x, white - x),
    "posterize": lambda x, m, white: (
        np.floor(np.floor(x / ((white + 1) / 2 ** int(m))) * ((white + 1) / 2 ** int(m)))
        if m < 8
        else x
    ),
    "brightness": lambda x, m, white: blended(0, x, m, white),
    "invert": lambda x, m, white: white - x,
    "blur": lambda x, m, white: filtered(ImageFilter.BLUR, x, white),
    "sharpness": lambda x, m, white: np.where(
        border(x), x, blended(filtered(ImageFilter.SMOOTH, x, white), x, m, white)
    ),
}


def border(band):
    inside = np.zeros(band.shape, bool)
    inside[1:-1, 1:-1] = True
    return ~inside


RANGES = {
    "16 bits": (torch.uint16, 0, 65535, None),
    "12 bits": (torch.uint16, 0, 4095, (0, 4095)),
    "10 bits above black": (torch.uint16, 64, 940, (64, 940)),
    "CT": (torch.int16, -1000, 2000, (-1000, 2000)),
    "video levels": (torch.uint8, 16, 235, (16, 235)),
}


def in_range(images: Tensor, name: str) -> Tensor:
    dtype, low, high, _ = RANGES[name]
    if dtype == torch.uint8:
        return (low + images.double() / 255 * (high - low)).to(dtype)
    return deep(images, low, high, dtype)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", RANGES)
def test_tones_of_whole_levels_are_pillows_formulas_over_the_range(name, channels):
    dtype, low, high, given = RANGES[name]
    white = high - low
    for height, width in ((16, 16), (3, 7), (1, 1)):
        images = in_range(bands(channels, height, width), name)
        for op, operation in enumerate(SPACE.operations):
            if operation.name not in TONES:
                continue
            for k in (0, 14, 30) if height > 7 else (7,):
                m = operation.magnitude(k, 31, height, width)
                if operation.low is not None and m == TABLE[operation.name].neutral:
                    expected = images.numpy()
                else:
                    tone = TONES[operation.name]
                    counted = images.numpy().astype(np.float64) - low
                    each = [[tone(band, m, white) for band in image] for image in counted]
                    expected = np.array(each) + low
                actions = one_operation(len(images), op, k)
                result = three_ways(images, SPACE, actions, fill=low, value_range=given)
                assert result.dtype == dtype
                assert np.array_equal(result.numpy(), expected), (operation.name, k, height)
                if operation.low is None:
                    break


def test_equalize_of_many_pixels_has_as_many_levels_as_the_range():
    images = deep(photographs()[..., :260, 99:359], 0, 65535, torch.uint16)
    op = NAMES.index("equalize")
    for given, white in ((None, 65535), ((0, 4095), 4095)):
        shown = (
            images
            if given is None
            else deep(photographs()[..., :260, 99:359], 0, 4095, torch.uint16)
        )
        result = three_ways(shown, SPACE, one_operation(2, op, 0), value_range=given)
        each = [[equalized(band, white) for band in image] for image in shown.numpy()]
        assert np.array_equal(result.numpy(), np.array(each))
        assert len(np.unique(result.numpy())) > 256
        assert not torch.equal(result.int(), shown.int())


@pytest.mark.parametrize("name", ["16 bits", "CT"])
@pytest.mark.parametrize("mode", MODES)
def test_geometry_of_sixteen_bits_is_pillows_on_mode_i(name, mode):
    dtype, low, _, given = RANGES[name]
    bilinear = mode is MODES[1]
    for height, width in ((16, 16), (9, 14), (1, 1)):
        images = in_range(bands(2, height, width), name)
        for op, operation in enumerate(SPACE.operations):
            if operation.name not in GEOMETRIC:
                continue
            for k, sign in every_draw(SPACE, op)[::13]:
                fill = low + 77
                actions = one_operation(len(images), op, k, sign)
                result = three_ways(images, SPACE, actions, bilinear, fill, value_range=given)
                assert result.dtype == dtype
                for c in range(2):
                    m = operation.magnitude(k, 31, height, width) * (
                        sign if operation.signed else 1
                    )
                    for i in (0, 7):
                        picture = Image.fromarray(images[i, c].numpy().astype(np.int32), "I")
                        moved = geometry(operation.name, picture, m, mode, fill)
                        assert np.array_equal(result[i, c].numpy(), np.asarray(moved)), (k, sign)


def geometry(name, picture, magnitude, mode, fill):
    resample = Image.Resampling.BILINEAR if mode is MODES[1] else Image.Resampling.NEAREST
    return PILLOW[name](picture, magnitude, (0.5, 0.5), resample, fill)


@pytest.mark.parametrize("name", RANGES)
def test_cutout_is_black_and_contrast_blends_with_the_mean(name):
    _, low, high, given = RANGES[name]
    images = in_range(bands(4), name)
    space, actions = single(Operation("cutout", 6, 6))
    result = three_ways(images, space, actions.select([0] * COUNT), fill=low, value_range=given)
    assert (result.int()[:, :, 5:11, 5:11] == low).all()
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[5:11, 5:11] = False
    assert torch.equal(result.int()[..., outside], images.int()[..., outside])
    values = images.numpy().astype(np.float64) - low
    mean = np.floor(values.mean((1, 2, 3), keepdims=True) + 0.5)
    space, actions = single(Operation("contrast", 1.6, 1.6))
    result = three_ways(images, space, actions.select([0] * COUNT), fill=low, value_range=given)
    assert np.array_equal(result.numpy() - float(low), blended(mean, values, 1.6, high - low))
    grey = np.floor(values.mean(1, keepdims=True) + 0.5)
    space, actions = single(Operation("color", 1.6, 1.6))
    result = three_ways(images, space, actions.select([0] * COUNT), fill=low, value_range=given)
    assert np.array_equal(result.numpy() - float(low), blended(grey, values, 1.6, high - low))


def test_a_byte_in_sixteen_bits_is_the_byte():
    # Levels 0 .. 255 in another dtype, with that range: the formulas are the same.
    images = bands(3, 24, 20)
    actions = draw(SPACE, COUNT, 3)
    for dtype in (torch.uint16, torch.int16):
        result = three_ways(images.to(dtype), SPACE, actions, value_range=(0, 255))
        difference = (result.int() - apply_actions(images, SPACE, actions).int()).abs()
        # Pillow blends bytes in single precision.
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 1e-3


# ------------------------------------------------------------------------------------ floats

FLOATS = {"unit": (0.0, 1.0), "reflectance": (0.0, 1.6), "CT": (-1000.0, 2000.0), "NDVI": (-1, 1)}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_of_any_range_are_those_of_the_unit_range(name):
    low, high = FLOATS[name]
    units = (bands(4, 14, 18) / 255).double()
    for seed, bilinear in enumerate((False, True)):
        actions = draw(SPACE, COUNT, 3, seed)
        expected = three_ways(units.float(), SPACE, actions, bilinear, fill=0.5)
        images = (units * (high - low) + low).float()
        middle = low + (high - low) / 2
        result = three_ways(images, SPACE, actions, bilinear, middle, value_range=(low, high))
        back = (result.double() - low) / (high - low)
        difference = (back - expected).abs()
        # A value that lies on a border may fall to its other side.
        assert (difference > 1e-4).double().mean() < 0.01
    exact = images.double()
    in_double = apply_actions(exact, SPACE, actions, value_range=(low, high))
    assert in_double.dtype == torch.float64


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_compiled_floats_are_the_batched_ones(channels):
    for op in range(len(SPACE)):
        images = bands(channels, 15, 11) / 255
        draws = every_draw(SPACE, op)
        for k, sign in draws[len(draws) // 3 :: max(1, len(draws) // 2)]:
            actions = one_operation(len(images), op, k, sign)
            for bilinear in (False, True) if NAMES[op] in GEOMETRIC else (False,):
                three_ways(images, SPACE, actions, bilinear, fill=0.25)


@pytest.mark.parametrize("side", [32, 63, 64, 65, 96, 130])
def test_floats_of_any_number_of_pixels_are_equalized_as_bytes(side):
    """To within a level; from 64 x 64 pixels on they have more bins, but the step of 256."""
    generator = torch.Generator().manual_seed(side)
    noise = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    dark = (noise * torch.tensor([0.3, 1, 0.05])[:, None, None]).byte()
    for images in (noise, dark):
        actions = one_operation(2, NAMES.index("equalize"), 0)
        floats = three_ways(images / 255, SPACE, actions)
        bytes_ = apply_actions(images, SPACE, actions)
        assert (floats * 255 - bytes_).abs().max() <= (0.01 if side < 64 else 0.51)


def test_floats_of_many_pixels_are_equalized_in_more_than_256_levels():
    noise = torch.rand(2, 3, 80, 90, generator=torch.Generator().manual_seed(0))
    images = (crops(2, 80, 90) + noise) / 256
    result = three_ways(images, SPACE, one_operation(2, NAMES.index("equalize"), 0))
    assert len(result[0, 0].unique()) > 300
    ranks = images[0, 0].flatten().argsort()
    assert (result[0, 0].flatten()[ranks].diff() >= 0).all()
    assert result.min() == 0
    assert result.max() == 1
    # Each band by itself: one that was darkened is equalized to the same.
    darker = three_ways(images * 0.5, SPACE, one_operation(2, NAMES.index("equalize"), 0))
    assert (darker - result).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float32])
def test_values_outside_the_range_are_kept_where_nothing_changes_them(dtype):
    images = torch.full((2, 2, 8, 8), 300.0)
    images[:, :, 2:5] = 1200  # beyond white
    images[:, :, 6] = 50  # below black
    images = images.to(dtype)
    given = {"value_range": (100, 1000)}
    for name, magnitudes in (
        ("identity", ()),
        ("flip_lr", ()),
        ("translate_x", (2, 2)),
        ("solarize", (256, 256)),
        ("posterize", (8, 8)),
        ("brightness", (1, 1)),
        ("contrast", (1, 1)),
        ("color", (1, 1)),
        ("sharpness", (1, 1)),
        ("cutout", (0, 0)),
    ):
        space, actions = single(Operation(name, *magnitudes))
        actions = actions.select([0, 0])
        shown = images if dtype != torch.float32 else images.clamp(90, 1010)
        result = three_ways(shown, space, actions, fill=100, **given).double()
        kept = result == shown.double()
        moved = name == "translate_x"
        assert bool(kept[..., :6].all() if moved else kept.all()), name
    space, actions = single(Operation("invert"))
    result = three_ways(shown, space, actions.select([0, 0]), **{**given, "fill": 100})
    expected = 1100 - shown.double()
    if dtype == torch.uint16:
        expected = expected.clamp(min=0)
    torch.testing.assert_close(result.double(), expected, atol=1e-3, rtol=0)


def test_every_dtype_and_layout_comes_back_as_it_was():
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.float16, torch.bfloat16):
        whole = not dtype.is_floating_point
        images = bands(5, 8, 6).to(dtype) if whole else (bands(5, 8, 6) / 255).to(dtype)
        given = {"value_range": (0, 255)} if whole else {}
        actions = draw(SPACE, COUNT, 2)
        result = apply_actions(images, SPACE, actions, **given)
        assert (result.dtype, result.shape) == (dtype, images.shape)
        last = images.movedim(1, -1).contiguous().movedim(-1, 1)
        again = apply_actions(last, SPACE, actions, **given)
        assert torch.equal(again.double(), result.double())
        assert again.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"value_range": (5, 5)}, ValueError, "low < high"),
        ({"value_range": (9, 5)}, ValueError, "low < high"),
        ({"value_range": (0, math.nan)}, ValueError, "low < high"),
        ({"value_range": (0, math.inf)}, ValueError, "low < high"),
        ({"value_range": 255}, TypeError, "two numbers"),
        ({"value_range": (0, 1, 2)}, TypeError, "two numbers"),
        ({"value_range": "01"}, TypeError, "two numbers"),
        ({"value_range": (False, True)}, TypeError, "two numbers"),
        ({"value_range": (0, 4095)}, ValueError, r"uint8 images must be whole, in 0 \.\. 255"),
        ({"value_range": (0.5, 9)}, ValueError, "whole"),
        ({"grey_weights": (1, 2)}, ValueError, r"one weight per channel \(3\), got 2"),
        ({"grey_weights": (1, -1, 1)}, ValueError, "0 or more"),
        ({"grey_weights": (0, 0, 0)}, ValueError, "not all 0"),
        ({"grey_weights": (1, math.nan, 1)}, ValueError, "0 or more"),
        ({"grey_weights": 3}, TypeError, "sequence of numbers"),
        ({"grey_weights": ()}, TypeError, "sequence of numbers"),
        ({"fill": 300}, ValueError, r"0 \.\. 255 for uint8"),
        ({"fill": 70000}, ValueError, r"0 \.\. 65535"),
        ({"fill": 9, "value_range": (16, 235)}, ValueError, r"16 \.\. 235"),
    ],
)
def test_settings_that_fit_no_image_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        apply_actions(crops(2, 8, 8), SPACE, draw(SPACE, 2, 1), **given)


def test_signed_integers_need_a_range():
    images = crops(2, 8, 8).short()
    with pytest.raises(TypeError, match=r"value_range=\(low, high\)"):
        apply_actions(images, SPACE, draw(SPACE, 2, 1))
    assert (
        apply_actions(images, SPACE, draw(SPACE, 2, 1), value_range=(0, 255)).shape == images.shape
    )


def test_kernels_of_ones_own_see_all_channels_in_the_unit_range():
    seen = []

    def halve(images, _):
        seen.append((images.shape[1], images.dtype, float(images.min()), float(images.max())))
        return images / 2

    space, actions = single(Operation("halve", kernel=halve))
    for dtype, given in ((torch.uint16, (0, 4095)), (torch.int16, (-1000, 2000))):
        low, high = given
        images = deep(bands(7), low, high, dtype)
        result = three_ways(images, space, actions.select([0] * COUNT), fill=low, value_range=given)
        expected = np.round((images.numpy().astype(np.float64) - low) / 2) + low
        assert np.abs(result.numpy() - expected).max() <= 1
    assert {(shown[0], shown[1]) for shown in seen} == {(7, torch.float32)}
    assert min(shown[2] for shown in seen) >= 0
    assert max(shown[3] for shown in seen) <= 1


def test_gradients_of_many_bands():
    images = torch.rand(1, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = (images * 1.2 + 0.2).requires_grad_()
    for name in ("contrast", "color", "brightness", "sharpness", "blur", "auto_contrast"):
        magnitudes = (0.6, 0.6) if TABLE[name].domain else ()
        space, actions = single(Operation(name, *magnitudes))
        apply = partial(apply_actions, space=space, actions=actions, value_range=(0.0, 1.6))
        assert torch.autograd.gradcheck(apply, images, fast_mode=True)
    # In single precision too, where a compiled loop would have no gradient.
    (gradient,) = torch.autograd.grad(apply(images.float()).sum(), images)
    assert gradient.abs().sum() > 0
