"""Each refusal's advice is followed, and gives the image that was meant."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from images import crops
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment import OLAAugment, Operation, PolicyTransform, SearchSpace, UniformPolicy
from ola_augment.transforms.advice import channels_first

RGB = crops(2, 16, 20)
ARRAY = RGB[0].permute(1, 2, 0).numpy().copy()
NAMES = {"torch": torch, "np": np, "tv_tensors": tv_tensors}

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


def test_masked_arrays_are_refused_with_both_parts():
    hidden = np.zeros(ARRAY.shape, bool)
    hidden[3:5, 2:9] = True
    masked = np.ma.MaskedArray(ARRAY, hidden)
    for sample in (masked, masked / 255, (masked, 3), {"image": masked}, [masked, masked]):
        message = refusal(sample, TypeError)
        image, mask = (
            advice(message, pattern, image=masked)
            for pattern in (
                r"tv_tensors\.Image\(torch\S+\(0\)\)\.movedim\(-1, 0\)\)",
                r"tv_tensors\.Mask\(\S+\.any\(-1\)\)",
            )
        )
        image, mask = INVERT(image, mask)
        assert torch.equal(mask.as_subclass(torch.Tensor), torch.from_numpy(hidden[..., 0]))
        assert (image[:, hidden[..., 0]] == 255).all()
        assert torch.equal(image[:, ~hidden[..., 0]], 255 - RGB[0][:, ~hidden[..., 0]])


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


def test_grey_and_colour_files_of_a_batch_are_made_alike():
    colour, grey = tvf.to_pil_image(RGB[0]), tvf.to_pil_image(RGB[1, :1])
    with pytest.raises(ValueError, match=r"make grey and colour files alike") as caught:
        INVERT.collate([(colour, 1), (grey, 2)])
    assert "resize" not in str(caught.value)
    alike = advice(str(caught.value), r"image\.convert\('RGB'\)", image=grey)
    images, _, _ = INVERT.collate([(colour, 1), (alike, 2)])
    assert torch.equal(images[1], 255 - RGB[1, :1].expand(3, -1, -1))
    with pytest.raises(ValueError, match="resize or crop") as caught:
        INVERT.collate([colour, colour.resize((9, 9))])
    assert "convert" not in str(caught.value)
