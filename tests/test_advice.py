"""Each refusal's advice is followed, and gives the image that was meant."""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from images import crops
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from ola_augment import (
    OLAAugment,
    OLALearner,
    Operation,
    PolicyTransform,
    SearchSpace,
    UniformPolicy,
)
from ola_augment.transforms.advice import channels_first

RGB = crops(2, 16, 20)
ARRAY = RGB[0].permute(1, 2, 0).numpy().copy()
NAMES = {"torch": torch, "np": np, "tv_tensors": tv_tensors, "v2": v2}

IDENTITY, INVERT = (
    PolicyTransform(UniformPolicy(SearchSpace((Operation(name),)), 1, 1.0))
    for name in ("identity", "invert")
)


def refusal(sample, error=(TypeError, ValueError)):
    """What a transform and collate say, before they draw."""
    augment = OLAAugment(generator=torch.Generator().manual_seed(0))
    state = augment.generator.get_state()
    with pytest.raises(error) as caught:
        augment(sample)
    assert torch.equal(augment.generator.get_state(), state)
    return str(caught.value)


def advice(message, pattern, **names):
    """Run the code that a message holds."""
    found = re.search(pattern, message)
    assert found, message
    return eval(found[0], {**NAMES, **names})


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("array", [False, True])
def test_integers_of_0_to_255_keep_their_levels(array, dtype):
    levels = RGB.clamp(max=127) if dtype == torch.int8 else RGB
    given = levels.to(dtype)
    name, pattern = "images", r"images\.to\(torch\.uint8\)"
    if array:
        given, name = given.movedim(1, -1).numpy(), "image"
        pattern = r"image\.astype\(np\.uint8\)"
    message = refusal(given)
    assert str(dtype).removeprefix("torch.") in message
    assert "value_range=(low, high)" in message
    assert "ToDtype" not in message
    out = IDENTITY(advice(message, pattern, **{name: given}))
    out = torch.from_numpy(out).movedim(-1, 1) if array else out
    assert torch.equal(out, levels)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("array", [False, True])
def test_other_levels_keep_what_they_mean(array, dtype):
    ct = torch.tensor([-1000, -500, 500, 2000], dtype=dtype).view(1, 2, 2)
    given = ct.movedim(0, -1).numpy() if array else ct
    message = refusal(given)
    if dtype == torch.int16:  # what it says is done to the transform
        found = advice(message, r"\(-1000, 2000\)")
        same = PolicyTransform(IDENTITY.policy, value_range=found)(given)
        assert torch.equal(torch.as_tensor(same).flatten(), ct.flatten())
        return
    names = {"image" if array else "images": given, "low": -1000, "high": 2000}
    out = IDENTITY(advice(message, r"\(image\S* - low\) / \(high - low\)", **names))
    expected = torch.tensor([0.0, 1 / 6, 0.5, 1.0])
    torch.testing.assert_close(torch.as_tensor(out).flatten(), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("array", [False, True])
def test_other_levels_of_16_bits_keep_their_range(array, dtype):
    given = torch.tensor([-100, -50, 50, 120], dtype=dtype).view(1, 2, 2)
    name, pattern = "images", r"images\.to\(torch\.int16\)"
    if array:
        given, name = given.movedim(0, -1).numpy(), "image"
        pattern = r"image\.astype\(np\.int16\)"
    for transform in (IDENTITY, PolicyTransform(INVERT.policy, value_range=(-100, 120))):
        with pytest.raises(TypeError, match="or uint16 with value_range") as caught:
            transform(given)
    out = transform(advice(str(caught.value), pattern, **{name: given}))
    assert torch.as_tensor(out).flatten().tolist() == [120, 70, -30, -100]


def test_label_maps_of_the_other_byte_order_become_masks():
    labels = np.array([[1, 2, 700], [0, 5, 40000]], ">u2")
    image = Image.fromarray(labels)
    assert image.mode == "I;16B"
    picture = Image.new("RGB", image.size)
    with pytest.raises(ValueError, match="got I;16B") as alone:
        IDENTITY(image)
    for message in (str(alone.value), refusal((picture, image)), refusal((image, picture))):
        mask = advice(message, r"tv_tensors\.Mask\((?:image|np.*?\))\)", image=image)
        assert np.array_equal(IDENTITY(picture, mask)[1], labels)


@pytest.mark.parametrize("array", [False, True])
def test_black_and_white_becomes_black_and_white(array):
    given = RGB[:, :1] > 100
    expected = torch.where(given, 0, 255).to(torch.uint8)
    if array:
        given = given.movedim(1, -1).numpy()
    pattern = r"images?\.(to|astype)\(\S+ \* 255"
    message = refusal(given)
    out = INVERT(advice(message, pattern, **{"image" if array else "images": given}))
    out = torch.from_numpy(out).movedim(-1, 1) if array else out
    assert torch.equal(out, expected)
    assert "tv_tensors.Mask" in message


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_other_numbers_too(dtype):
    white = (RGB[:, :1] > 100).float()
    message = refusal(white.to(dtype))
    pattern = r"abs\(images\)" if dtype.is_complex else r"images\.float\(\)"
    assert torch.equal(IDENTITY(advice(message, pattern, images=white.to(dtype))), white)


# ------------------------------------------------------------------------------------------ arrays


def test_a_grey_array_gets_a_channel():
    grey = ARRAY[..., 0]
    made = advice(refusal(grey), r"image\[\.\.\., None\]", image=grey)
    assert np.array_equal(IDENTITY(made)[..., 0], grey)


@pytest.mark.parametrize(
    "shape", [(3, 16, 20), (1, 20, 16), (2, 3, 16, 20), (4, 32, 32), (13, 64, 48)]
)
def test_channels_first_arrays_are_turned(shape):
    stack = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    message = refusal(stack)
    assert "None]" not in message
    turned = advice(message, r"np\.moveaxis\(image, -3, -1\)", image=stack)
    assert np.array_equal(turned[..., 0], stack[..., 0, :, :])
    tensor = advice(message, r"torch\.from_numpy\(image\)", image=stack)
    assert tensor.shape == shape
    if shape[-3] in (1, 3):
        assert np.array_equal(IDENTITY(turned), turned)
        assert torch.equal(IDENTITY(tensor), tensor)


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((32, 32, 3), False),
        ((1, 1, 3), False),
        ((3, 3, 3), False),
        ((9, 9, 200), False),
        ((9, 11, 200), False),
        ((11, 9, 200), False),
        ((64, 64, 13), False),
        ((480, 640, 4), False),
        ((3, 32, 32), True),
        ((4, 480, 640), True),
        ((13, 120, 120), True),
        ((200, 512, 512), True),
        ((12, 20, 20), True),
    ],
)
def test_which_arrays_have_their_channels_first(shape, first):
    assert channels_first(shape) == first


@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_big_endian_arrays_are_converted(dtype):
    given = (ARRAY / 255).astype(dtype)
    for sample in (given, {"image": given, "label": 3}, (given, torch.tensor(3))):
        message = refusal(sample)
        if sample is given:
            assert f"byte order, got {dtype}" in message
        made = advice(message, r"image\.astype\(image\.dtype\.newbyteorder\('='\)\)", image=given)
        assert np.array_equal(IDENTITY(made), given)


@pytest.mark.parametrize("layout", ["channels last", "channels first", "one band"])
def test_masked_arrays_are_refused_with_both_parts(layout):
    hidden = np.zeros(ARRAY.shape, bool)
    hidden[3:5, 2:9] = True
    masked = np.ma.MaskedArray(ARRAY, hidden)
    if layout == "channels first":  # as rasterio's
        masked = masked.transpose(2, 0, 1)
    elif layout == "one band":
        masked = masked[..., 0]
    for sample in (masked, masked / 255, (masked, 3), {"image": masked}, [masked, masked]):
        message = refusal(sample, TypeError)
        image, mask = (
            advice(message, pattern, image=masked)
            for pattern in (
                r"tv_tensors\.Image\(torch.*\)(?= and )",
                r"tv_tensors\.Mask\(.*\)$",
            )
        )
        image, mask = INVERT(image, mask)
        assert torch.equal(mask.as_subclass(torch.Tensor), torch.from_numpy(hidden[..., 0]))
        assert (image[:, hidden[..., 0]] == 255).all()
        seen = RGB[0][: len(image), ~hidden[..., 0]]
        assert torch.equal(image[:, ~hidden[..., 0]].as_subclass(torch.Tensor), 255 - seen)


@pytest.mark.parametrize("dtype", [np.longdouble, object, "U3", "M8[s]"])
def test_arrays_of_no_numbers_that_torch_has_are_refused(dtype):
    given = ARRAY.astype(dtype) if dtype != "M8[s]" else ARRAY.astype(np.int64).view(dtype)
    for sample in (given, (given, 3)):
        message = refusal(sample, TypeError)
        assert f"numbers that torch has, got {given.dtype}" in message
        if dtype in (np.longdouble, object):
            floats = advice(message, r"image\.astype\(np\.float32\)", image=given)
            assert np.array_equal(floats, ARRAY)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_dense_values_are_refused():
    nested = torch.nested.nested_tensor([RGB[0] / 255, RGB[1, :, :9] / 255])
    made = advice(refusal(nested, TypeError), r"list\(images\.unbind\(\)\)", images=nested)
    assert [image.shape for image in IDENTITY(made)] == [(3, 16, 20), (3, 9, 20)]
    sparse = RGB.to_sparse()
    assert torch.equal(
        IDENTITY(advice(refusal(sparse, TypeError), r"images\.to_dense\(\)", images=sparse)), RGB
    )
    assert "meta have none" in refusal(RGB.to("meta"), TypeError)


@pytest.mark.parametrize(
    "array",
    [
        (ARRAY / 255).astype(np.float32),
        np.moveaxis((ARRAY / 255).astype(np.float32), -1, 0),
        (ARRAY[..., 0] / 255).astype(np.float64),
        (ARRAY / 255).astype(">f4"),
        np.stack([(ARRAY / 255).astype(np.float32)] * 2),
        ARRAY[..., 0],
    ],
)
def test_other_arrays_of_a_sample_are_wrapped(array):
    labels = {"label": torch.tensor(3), "name": "x"}
    for sample in ({"image": array, **labels}, (array, 3), (array, torch.tensor(3)), [array, "x"]):
        message = refusal(sample, TypeError)
        image = advice(message, r"tv_tensors\.Image\(torch.*\)", image=array)
        out = INVERT({"image": image, **labels})
        inverted = out["image"]
        top = 255 if array.dtype == np.uint8 else 1
        expected = top - torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        if array.ndim == 2:
            expected = expected[None]
        elif array.shape[-1] == 3:
            expected = expected.movedim(-1, -3)
        torch.testing.assert_close(inverted.as_subclass(torch.Tensor), expected)
        assert out["label"] is labels["label"]


# ------------------------------------------------------------------------------------------ others


@dataclass
class Frame:
    """As torchcodec's: iterable, no tensor."""

    data: torch.Tensor
    pts_seconds: float = 0.0

    def __iter__(self):
        yield from (self.data, self.pts_seconds)


class FrameBatch(Frame):
    pass


@pytest.mark.parametrize("kind", [Frame, FrameBatch])
def test_frames_of_a_decoder_name_their_data(kind):
    frame = kind(RGB[0] if kind is Frame else RGB)
    name = kind.__name__.lower()
    for sample in (frame, (frame, torch.tensor(3)), {"clip": frame, "label": 3}):
        message = refusal(sample, TypeError)
        made = advice(message, rf"tv_tensors\.(Image|Video)\({name}\.data\)", **{name: frame})
        assert type(made) is (tv_tensors.Image if kind is Frame else tv_tensors.Video)
        assert torch.equal(INVERT(made), 255 - frame.data)
    with pytest.raises(TypeError, match=rf"{name}\.data"):
        OLAAugment().collate([(frame, 1), (frame, 2)])


def file_of(mode, top=65535):
    """A picture of a mode whose levels, in 255ths, are those of a grey ramp; transparent none."""
    ramp = np.linspace(0, 255, 320).reshape(16, 20)
    if mode == "I;16":
        return Image.fromarray(np.round(ramp / 255 * top).astype(np.uint16))
    return Image.fromarray(np.round(ramp).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [
        (("L", "RGB"), "RGB"),
        (("RGB", "LA"), "RGBA"),
        (("L", "LA"), "LA"),
        (("RGBA", "RGB"), "RGBA"),
        (("L", "I;16"), "L"),
        (("I;16", "LA"), "LA"),
        (("I;16", "RGB"), "RGB"),
        (("RGBA", "I;16", "L"), "RGBA"),
    ],
)
@pytest.mark.parametrize("top", [65535, 4095])
def test_files_of_several_modes_of_a_batch_are_made_alike(modes, wanted, top):
    files = [file_of(mode, top) for mode in modes]
    with pytest.raises(ValueError, match="images of a batch must have one") as caught:
        IDENTITY.collate([(file, i) for i, file in enumerate(files)])
    message = str(caught.value)
    assert "resize" not in message
    assert ("65535" in message) == ("I;16" in modes)
    alike = []
    for file in files:
        pattern = rf"image\.convert\('{wanted}'\)"
        if file.mode == "I;16":
            pattern = r"image\.point\(.* 0\.5\)(\.convert\('\w+'\))+"
        alike.append(advice(message, pattern, image=file, top=top))
    assert {file.mode for file in alike} == {wanted}
    images, *_ = IDENTITY.collate([(file, i) for i, file in enumerate(alike)])
    ramp = torch.from_numpy(np.asarray(file_of("L")).copy())
    assert (images[:, 0].int() - ramp.int()).abs().max() <= 1
    if wanted.endswith("A"):
        assert (images[:, -1] == 255).all()


def test_tensors_of_several_kinds_of_a_batch_are_made_alike():
    colour, grey = RGB[0], RGB[1, :1]
    for first, second in ((colour, grey), (colour, colour / 255), (colour, grey.to(torch.uint16))):
        with pytest.raises(ValueError, match="bring them there to one number") as caught:
            IDENTITY.collate([first, second])
        if first.dtype == second.dtype:
            second = advice(str(caught.value), r"image\.expand\(3, -1, -1\)", image=second)
        else:
            code = r"v2\.functional\.to_dtype\(.*?\)"
            both = [advice(str(caught.value), code, image=image) for image in (first, second)]
            torch.testing.assert_close(both[0], first / (255 if first.dtype == torch.uint8 else 1))
            first, second = both[0], both[1].expand(3, -1, -1)
        images, _ = IDENTITY.collate([first, second])
        assert torch.equal(images, torch.stack([first, second]))


def test_files_of_several_sizes_are_told_to_be_cropped():
    colour = tvf.to_pil_image(RGB[0])
    with pytest.raises(ValueError, match="resize or crop") as caught:
        INVERT.collate([colour, colour.resize((9, 9))])
    assert "convert" not in str(caught.value)


# ------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_clips_with_their_channels_first_are_told_to_turn_them(channels, dtype):
    frames = RGB[:, :channels].repeat(3, 1, 1, 1).to(dtype)  # (T, C, H, W)
    clips = torch.stack([frames, frames.flip(0)]) / (255 if dtype.is_floating_point else 1)
    clips = clips.to(dtype)
    given = clips.transpose(1, 2)  # (B, C, T, H, W)
    augment = PolicyTransform(UniformPolicy(SearchSpace.wide_long(), 2, 1.0))
    actions = augment.policy.sample(2)
    learner = OLALearner(torch.nn.Linear(1, 1), OLAAugment())
    for call in (
        augment,
        partial(augment.augment, clips=True),
        partial(augment.replay, actions=actions, clips=True),
        learner.augment,
        lambda clips: augment.collate([(clip, 0) for clip in clips]),
    ):
        with pytest.raises(
            ValueError, match=r"\(\.\.\., T, C, H, W\), got .* looks like"
        ) as caught:
            call(given)
    message = str(caught.value)
    turned = advice(message, r"clips\.transpose\(-4, -3\)", clips=given)
    out = augment.replay(turned, actions, clips=True)
    assert torch.equal(out, augment.replay(clips, actions, clips=True))
    back = advice(message, r"clips\.transpose\(-4, -3\)", clips=out)
    assert back.shape == given.shape
    # One or three frames of many bands are said to be such.
    images, clip = (
        advice(message, rf"tv_tensors\.{kind}\({name}\)", **{name: given})
        for kind, name in (("Image", "images"), ("Video", "clips"))
    )
    assert augment.augment(images)[1].batch_size == 2 * channels
    assert augment.augment(clip)[1].batch_size == 2


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 8, 8), (2, 8, 3, 8, 8), (2, 1, 2, 8, 8), (2, 2, 9, 8, 8)]
)
def test_other_layouts_of_five_dimensions_are_clips(shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    assert OLAAugment().augment(images, clips=True)[0].shape == shape
