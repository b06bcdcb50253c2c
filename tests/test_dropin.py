"""What torchvision's users pass: fills, interpolations, dtypes, layouts, lists, arrays, threads."""

import copy
import math
import pickle
import re
import sys
from collections import OrderedDict, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from images import crops
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from ola_augment import (
    Actions,
    OLAAugment,
    Operation,
    PolicyTransform,
    RandAugment,
    SearchSpace,
    TrivialAugment,
    UniformAugment,
    UniformPolicy,
)
from ola_augment.operations import apply_actions, apply_geometry_to_masks

RGB = crops(4, 16, 20)
RIGHT = Operation("translate_x", 5, 5, integer=True)  # uncovers five columns at one side


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def always(*operations, **options):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0), **options)


def augment(seed=0, **options):
    return OLAAugment(generator=generator(seed), **options)


# ------------------------------------------------------------------------------------------ fill


def uncovered(images):
    """The value of the columns that RIGHT uncovers, per channel."""
    columns = torch.cat([images[..., :5], images[..., -5:]], -1)
    return [set(channel.flatten().tolist()) for channel in columns.movedim(-3, 0)]


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (None, 0),
        (0, 0),
        (7, 7),
        (7.9, 7),
        ([7], 7),
        ((7.0,), 7),
        (np.float32(7), 7),
        (np.int64(7), 7),
        ({"others": 7}, 7),
        ({tv_tensors.Image: 3, "others": 7}, 7),
        ({torch.Tensor: 7, "others": 3}, 7),
        ({torch.Tensor: None, "others": 3}, 0),
        ({tv_tensors.Image: 3}, 0),
    ],
)
def test_fill_in_every_form(fill, expected):
    image = torch.full((3, 8, 20), 200, dtype=torch.uint8)
    move = always(RIGHT, fill=fill)
    assert uncovered(move(image)) == [{expected, 200}] * 3
    shown = move.fill.values() if isinstance(fill, dict) else [move.fill]
    assert {type(value) for value in shown} <= {type(None), int, float, tuple}


def test_fill_by_channel_and_by_type():
    fill = {
        PIL_IMAGE: (1, 2, 3),
        tv_tensors.Image: [4, 5, 6],
        tv_tensors.Video: 7,
        np.ndarray: 8,
        tv_tensors.Mask: np.int64(255),
        "others": 9,
    }
    given = torch.full((3, 8, 20), 200, dtype=torch.uint8)
    move = always(RIGHT, fill=fill)
    picture = tvf.to_pil_image(given)
    assert uncovered(tvf.pil_to_tensor(move(picture))) == [{c, 200} for c in (1, 2, 3)]
    assert uncovered(move(tv_tensors.Image(given))) == [{c, 200} for c in (4, 5, 6)]
    assert uncovered(move(tv_tensors.Video(given[None]))) == [{7, 200}] * 3
    array = move(given.permute(1, 2, 0).numpy())
    assert uncovered(torch.from_numpy(array).movedim(-1, -3)) == [{8, 200}] * 3
    assert uncovered(move(given)) == [{9, 200}] * 3
    image, mask = move(tv_tensors.Image(given), tv_tensors.Mask(torch.ones(8, 20, dtype=int)))
    assert torch.equal(mask == 255, image[0] == 4)
    for twin in (copy.deepcopy(move), pickle.loads(pickle.dumps(move))):
        assert uncovered(twin(tv_tensors.Image(given)))[1] == {5, 200}
    # A picture that was opened from a file is of a subclass of PIL.Image.Image.
    opened = type("Opened", (PIL_IMAGE,), {})()
    opened.__setstate__(picture.__getstate__())
    assert uncovered(tvf.pil_to_tensor(move(opened)))[2] == {3, 200}


PIL_IMAGE = Image.Image


def test_masks_are_filled_with_zero_by_default():
    mask = tv_tensors.Mask(torch.ones(16, 20, dtype=torch.int64))
    for fill in (None, 9, {"others": 9}, {tv_tensors.Mask: None}):
        assert set(always(RIGHT, fill=fill)(RGB[0], mask)[1].unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("fill", "error", "message"),
    [
        ({"others": 70000}, ValueError, r"0 \.\. 65535"),
        ({"other": 3}, ValueError, "keyed by types or 'others', got the key 'other'"),
        (defaultdict(lambda: 3), ValueError, "plain dictionary, got a defaultdict"),
        ({3: 3}, ValueError, "the key 3"),
        ({tv_tensors.Image: "red"}, TypeError, "fill must be a number"),
        ({tv_tensors.Image: ()}, ValueError, "one per channel"),
        ({tv_tensors.Mask: (1, 2)}, TypeError, "fill of a Mask must be one number"),
        ({tv_tensors.Mask: "void"}, TypeError, "fill of a Mask must be one number"),
        ({tv_tensors.Mask: 10**400}, ValueError, "fill of a Mask must fit into 64 bits"),
        (torch.tensor(3), TypeError, "fill must be a number"),
        (True, TypeError, "fill"),
        ([], ValueError, "fill must hold one value"),
        (math.nan, ValueError, "fill"),
    ],
)
def test_fills_of_another_kind_are_refused(fill, error, message):
    with pytest.raises(error, match=message):
        RandAugment(fill=fill)


def test_a_mask_that_cannot_hold_its_fill_is_refused():
    for dtype, fill in ((torch.uint8, -1), (torch.bool, 255), (torch.int64, 0.5)):
        move = always(RIGHT, fill={tv_tensors.Mask: fill})
        with pytest.raises(ValueError, match=f"fill of a {dtype} mask"):
            move(tv_tensors.Image(RGB[0]), tv_tensors.Mask(torch.ones(16, 20, dtype=dtype)))
    _, actions = always(RIGHT).augment(RGB)
    space = SearchSpace((RIGHT,))
    with pytest.raises(ValueError, match=r"fill of a torch\.uint8 mask"):
        apply_geometry_to_masks(RGB, space, actions, fill=256)
    with pytest.raises(TypeError, match="fill of a mask"):
        apply_geometry_to_masks(RGB, space, actions, fill=None)
    moved = apply_geometry_to_masks(RGB.double() * 0 + 1, space, actions, fill=-0.5)
    assert set(moved.unique().tolist()) == {-0.5, 1.0}


def test_an_unchangeable_fill_is_checked_against_each_kind_of_image():
    grey = always(RIGHT, fill={torch.Tensor: 0.5, "others": 128})
    assert uncovered(grey(torch.ones(1, 8, 20))) == [{0.5, 1.0}]
    assert uncovered(grey(tv_tensors.Image(torch.ones(1, 8, 20).byte()))) == [{1, 128}]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"0 or lie in 1 \.\. 255 for uint8"):
        grey(RGB)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------- interpolation


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ((0, "nearest", "nearest-exact", InterpolationMode.NEAREST_EXACT), "NEAREST"),
        ((2, "bilinear", Image.Resampling.BILINEAR, InterpolationMode.BILINEAR), "BILINEAR"),
    ],
)
def test_interpolation_in_every_form(forms, expected):
    turn = Operation("rotate", 10, 30)
    wanted = always(turn, interpolation=InterpolationMode[expected], generator=generator())(RGB)
    for form in forms:
        out = always(turn, interpolation=form, generator=generator())
        assert torch.equal(out(RGB), wanted)
        space, actions = out.space, out.last_actions
        assert torch.equal(apply_actions(RGB, space, actions, interpolation=form), wanted)


@pytest.mark.parametrize(
    "interpolation",
    [InterpolationMode.BICUBIC, 3, 1, -1, "bicubic", "BILINEAR", True, None, 2.0],
)
def test_other_interpolations_are_refused_in_one_sentence(interpolation):
    with pytest.raises(ValueError, match=r"^interpolation must be NEAREST or BILINEAR .*, got "):
        TrivialAugment(interpolation=interpolation)


# ------------------------------------------------------------------------------ dtypes and values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_width(dtype):
    images = (RGB / 255).to(dtype)
    out = augment()(images)
    assert (out.shape, out.dtype) == (images.shape, dtype)
    assert out.double().isfinite().all()


# ------------------------------------------------------------------------------ shapes and layouts


@pytest.mark.parametrize(
    "batch", [(), (0,), (1,), (3,), (2, 3), (2, 0), (0, 2), (2, 1, 3), (0, 0, 2)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("kind", [torch.Tensor, tv_tensors.Image, tv_tensors.Video])
def test_any_number_of_batch_dimensions(batch, dtype, kind):
    pixels = torch.randint(0, 256, (*batch, 2, 3, 9, 7), generator=generator())
    pixels = pixels.byte() if dtype == torch.uint8 else pixels / 255
    images = pixels if kind is torch.Tensor else kind(pixels)
    transform = augment()
    out = transform(images)
    assert (type(out), out.shape, out.dtype) == (kind, images.shape, dtype)
    actions = transform.last_actions
    draws = batch if kind is tv_tensors.Video else (*batch, 2)
    assert actions.num_ops.shape == ((math.prod(draws),) if draws else ())
    if kind is torch.Tensor:
        assert torch.equal(transform.replay(images, actions), out)
        flat = pixels.reshape(-1, 3, 9, 7)
        assert torch.equal(transform.replay(flat, actions), out.reshape(flat.shape))
    elif draws:
        mask = tv_tensors.Mask(torch.ones(*draws, 9, 7))
        moved = transform(images, mask)[1]
        assert moved.shape == mask.shape


def test_masks_of_several_batch_dimensions_follow():
    images = torch.zeros(2, 3, 1, 24, 24, dtype=torch.uint8)
    images[..., 4:12, 6:20] = 255
    move = always(Operation("rotate", 0, 90, signed=True), Operation("flip_lr"))
    for mask in (images[:, :, 0] > 0, (images > 0).expand(2, 3, 5, 24, 24)):
        out, moved = move(tv_tensors.Image(images), tv_tensors.Mask(mask))
        expected = out > 0 if mask.ndim == 5 else (out > 0)[:, :, 0]
        assert torch.equal(moved.as_subclass(torch.Tensor), expected.expand(mask.shape))
    with pytest.raises(ValueError, match=r"Mask for images \(2, 3, C, H, W\) must have shape"):
        move(tv_tensors.Image(images), tv_tensors.Mask(images[0, :, 0]))


def test_empty_annotations_stay_empty():
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(16, 20))
    points = tv_tensors.KeyPoints(torch.zeros(0, 2), canvas_size=(16, 20))
    masks = tv_tensors.Mask(torch.zeros(0, 16, 20, dtype=torch.bool))
    _, *rest = augment()(tv_tensors.Image(RGB[0]), boxes, points, masks)
    assert [type(x) for x in rest] == [type(x) for x in (boxes, points, masks)]
    assert [x.shape for x in rest] == [(0, 4), (0, 2), (0, 16, 20)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("n", [1, 4])
def test_channels_last_is_kept(dtype, n):
    images = RGB[:n] if dtype == torch.uint8 else RGB[:n] / 255
    last = images.to(memory_format=torch.channels_last)
    for space in (SearchSpace.wide_long(), SearchSpace((Operation("own", kernel=double),))):
        first, second = (OLAAugment(space, 1, generator=generator(2)) for _ in range(2))
        expected, out = first(images), second(last)
        assert torch.equal(out, expected)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert expected.is_contiguous()
        actions = first.last_actions
        assert apply_actions(last, space, actions).stride() == last.stride()
        single = second(last[0])
        assert single.stride() == last[0].stride()
    assert second(images.transpose(2, 3)).is_contiguous()


def double(images, _):
    return images * 2


# ------------------------------------------------------------------------------- lists and arrays


def test_a_list_of_images_gets_a_draw_for_each():
    image = RGB[0]
    for images in (
        [image] * 40,
        [tvf.to_pil_image(image)] * 40,
        [tv_tensors.Image(image)] * 40,
        [image.permute(1, 2, 0).numpy()] * 40,
    ):
        transform = augment()
        outs = transform(images)
        assert isinstance(outs, list)
        assert [type(out) for out in outs] == [type(image) for image in images]
        actions = transform.last_actions
        assert actions.batch_size == 40
        assert len({tuple(row) for row in actions.ops.tolist()}) > 30
        for i, out in enumerate(outs):
            expected = transform.replay(image, actions.select(i))
            if isinstance(out, np.ndarray):
                out = torch.from_numpy(out).permute(2, 0, 1)
            out = tvf.pil_to_tensor(out) if isinstance(out, Image.Image) else out
            assert torch.equal(out.as_subclass(torch.Tensor), expected)


def test_a_list_may_hold_images_of_any_size():
    pictures = [
        tvf.to_pil_image(RGB[0]),
        tvf.to_pil_image(RGB[1, :1, :5]),
        tv_tensors.Image(RGB[:2]),
        tv_tensors.Video(RGB[:3, :, 4:]),
    ]
    transform = augment()
    outs = transform(pictures)
    assert [out.size for out in outs[:2]] == [(20, 16), (20, 5)]
    assert [(type(o), o.shape) for o in outs[2:]] == [(type(p), p.shape) for p in pictures[2:]]
    assert transform.last_actions.batch_size == 1 + 1 + 2 + 1


def test_lists_that_are_samples_stay_samples():
    labels = torch.arange(4)
    images, same = augment()([RGB, labels])  # what a loader hands out
    assert same is labels
    assert not torch.equal(images, RGB)
    other = torch.rand(4, 1, 16, 20)
    assert augment()([RGB, other])[1] is other
    target = torch.rand(1, 16, 20)
    assert augment()([RGB[0], target])[1] is target
    assert augment()([RGB[0], RGB[0].numpy()[0]])[0].shape == RGB[0].shape
    # Those of a tuple or a dictionary belong together.
    pair = tuple(tv_tensors.Image(RGB[0]) for _ in range(2))
    assert torch.equal(*augment(4)(pair))
    assert torch.equal(*augment(4)({"left": pair[0], "right": pair[1]}).values())
    with pytest.raises(TypeError, match="no image"):
        augment()([])


@pytest.mark.parametrize("channels", [1, 3])
def test_numpy_in_numpy_out(channels):
    image = np.ascontiguousarray(RGB[0, :channels].permute(1, 2, 0).numpy())
    transform = augment(1)
    read_only = image.copy()
    read_only.flags.writeable = False
    variants = [
        image,
        read_only,
        np.asfortranarray(image),
        image[::-1][::-1],
        image.copy()[:, ::-1],
    ]
    expected = augment(1)(RGB[0, :channels]).permute(1, 2, 0).numpy()
    for given in variants[:4]:
        transform.generator.manual_seed(1)
        out = transform(given)
        assert (type(out), out.dtype) == (np.ndarray, np.uint8)
        assert out.flags.c_contiguous
        assert out.flags.writeable
        np.testing.assert_array_equal(out, expected)
    transform(variants[4])
    np.testing.assert_array_equal(image, RGB[0, :channels].permute(1, 2, 0).numpy())
    floats = transform((image / 255).astype(np.float32))
    assert (floats.dtype, floats.shape) == (np.float32, image.shape)
    batch = transform(np.stack([image, image]))
    assert batch.shape == (2, 16, 20, channels)
    assert transform.last_actions.batch_size == 2


def test_an_array_in_a_sample_is_its_image():
    image = RGB[0].permute(1, 2, 0).numpy()
    sample = {"image": image, "scores": np.zeros((2, 4)), "label": torch.tensor(3), "id": "x"}
    transform = always(Operation("flip_lr"))
    out = transform(sample)
    np.testing.assert_array_equal(out["image"], image[:, ::-1])
    assert all(out[key] is sample[key] for key in ("scores", "label", "id"))
    mask = tv_tensors.Mask(torch.from_numpy(image[..., 0].copy()))
    out = transform({"image": image, "mask": mask})
    assert torch.equal(out["mask"].as_subclass(torch.Tensor), RGB[0, 0].flip(-1))
    # An image of another kind comes first, as it does before tensors.
    picture, array = transform((tvf.to_pil_image(RGB[0]), image))
    assert isinstance(picture, Image.Image)
    assert array is image
    for mask in (image[..., 0], image.copy(), (image[..., 0] > 3)[..., None]):
        with pytest.raises(ValueError, match=r"two arrays of size \(16, 20\).*tv_tensors.Mask"):
            transform({"image": image, "labels": mask})


def test_dictionaries_of_albumentations_move_all_or_are_refused():
    image = RGB[0].permute(1, 2, 0).numpy()
    transform = always(Operation("flip_lr"))
    size = image.shape[:2]
    plain = {
        "bboxes": [(1, 2, 5, 6, "dog")],
        "keypoints": np.array([[1.5, 2.0]]),
        "masks": [image[..., 0]],
        "mask": image[..., 0],
    }
    for key, entry in plain.items():
        for picture in (image, tvf.to_pil_image(RGB[0]), tv_tensors.Image(RGB[0])):
            with pytest.raises((TypeError, ValueError), match=r"tv_tensors\.\w+"):
                transform({"image": picture, key: entry})
    wrapped = {
        "image": image,
        "bboxes": tv_tensors.BoundingBoxes([[1, 2, 5, 6]], format="XYXY", canvas_size=size),
        "keypoints": tv_tensors.KeyPoints([[1.5, 2.0]], canvas_size=size),
        "masks": [tv_tensors.Mask(torch.from_numpy(image[..., 0].copy()))],
        "labels": ["dog"],
    }
    out = transform(wrapped)
    np.testing.assert_array_equal(out["image"], image[:, ::-1])
    assert out["bboxes"].tolist() == [[15, 2, 19, 6]]
    assert out["keypoints"].tolist() == [[18.5, 2.0]]
    assert torch.equal(out["masks"][0].as_subclass(torch.Tensor), RGB[0, 0].flip(-1))
    assert out["labels"] == ["dog"]
    transform({"image": image, "bboxes": [], "keypoints": None, "masks": np.zeros((0, 16, 20))})


IDS = np.arange(320).reshape(16, 20)


@pytest.mark.parametrize("kind", ["array", "PIL", "tensor", "Image"])
@pytest.mark.parametrize(
    ("key", "mask"),
    [
        ("mask", IDS),
        ("mask", IDS[None]),
        ("mask", IDS[..., None]),
        ("mask", IDS.tolist()),
        ("mask", IDS[::2, ::2]),
        ("masks", np.stack([IDS, IDS])),
        ("masks", [torch.from_numpy(IDS)]),
        ("masks", (IDS, IDS)),
    ],
)
def test_masks_that_are_not_wrapped_are_refused_and_the_advice_works(key, mask, kind):
    image = PICTURES[kind](RGB[0])
    transform = augment()
    state = transform.generator.get_state()
    sample = {"image": image, key: mask}
    calls = {
        "alone": lambda: transform(sample),
        "in a tuple": lambda: transform((sample, 3)),
        "as an argument": lambda: transform(sample, 3),
        "nested": lambda: transform({"sample": [sample]}),
        "apart": lambda: transform(image, {"target": {key: mask}}),
        "collated": lambda: transform.collate([sample, sample]),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match=f"'{key}' of the dictionary would stay") as caught:
            call()
    assert torch.equal(transform.generator.get_state(), state)
    (code,) = re.findall(r"pass (.*), or rename", str(caught.value))
    names = {"tv_tensors": tv_tensors, "mask": mask, "masks": mask}
    if np.shape(mask)[-2:] == (16, 20):
        sample[key] = eval(code, names)
        moved = always(Operation("flip_lr"))(sample)[key]
        for part, before in zip(moved, mask, strict=True):
            assert np.array_equal(part, np.asarray(before)[..., ::-1])


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((8, 8), np.uint8), ValueError, r"\(H, W, C\).*\(8, 8\); image\[\.\.\., None\]"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"\(H, W, C\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "height 0"),
        (np.zeros((8, 8, 3), np.int64), TypeError, r"torch.int64; .*image\.astype\(np\.uint8\)"),
        (np.full((8, 8, 3), 200.0), ValueError, "divided by 255"),
        (np.zeros((8, 8, 3), object), TypeError, "object"),
        (np.zeros((8, 8, 3), ">f4"), ValueError, "byte order"),
    ],
)
def test_other_arrays_are_refused(array, error, message):
    with pytest.raises(error, match=message):
        augment()(array)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_pil_images_of_other_modes_are_refused_with_what_to_do(mode):
    picture = Image.new(mode, (4, 4))
    with pytest.raises(ValueError, match=rf"RGBA, I;16, got {mode}; image\.convert\('RGB'\)"):
        augment()(picture)
    augment()(picture.convert("RGB"))


# ---------------------------------------------------------------------------------------- collate

Sample = namedtuple("Sample", ["picture", "label"])
PICTURES = {
    "PIL": tvf.to_pil_image,
    "tensor": lambda image: image,
    "Image": tv_tensors.Image,
    "array": lambda image: image.permute(1, 2, 0).numpy(),
    "Video": lambda image: tv_tensors.Video(image[None]),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_collate_takes_any_sample(kind):
    pictures = [PICTURES[kind](image) for image in RGB]
    plain = RGB[:, None] if kind == "Video" else RGB
    transform = augment()

    def check(images, actions):
        assert type(images) is torch.Tensor
        assert isinstance(actions, Actions)
        assert torch.equal(images.flatten(0, -4), transform.replay(RGB, actions))
        assert images.shape == plain.shape

    check(*transform.collate(pictures))
    images, labels, actions = transform.collate([(p, i) for i, p in enumerate(pictures)])
    check(images, actions)
    assert labels.tolist() == [0, 1, 2, 3]
    images, labels, actions = transform.collate([Sample(p, i) for i, p in enumerate(pictures)])
    check(images, actions)
    assert labels.tolist() == [0, 1, 2, 3]
    images, labels, actions = transform.collate([[p, str(i)] for i, p in enumerate(pictures)])
    check(images, actions)
    assert labels == ["0", "1", "2", "3"]
    samples = [{"id": i, "inputs": {"pixel_values": p}} for i, p in enumerate(pictures)]
    batch = transform.collate(samples)
    assert set(batch) == {"id", "inputs", "actions"}
    check(batch["inputs"]["pixel_values"], batch["actions"])
    assert batch["id"].tolist() == [0, 1, 2, 3]


def test_masks_of_collated_samples_follow():
    images = torch.zeros(8, 3, 24, 24, dtype=torch.uint8)
    images[:, :, 4:12, 6:20] = 255
    samples = [(tv_tensors.Image(image), tv_tensors.Mask(image[0] > 0)) for image in images]
    move = always(Operation("rotate", 0, 90, signed=True), Operation("flip_ud"))
    out, masks, _ = move.collate(samples)
    assert torch.equal(masks, out[:, 0] > 0)
    assert not torch.equal(out, images)


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda x: defaultdict(int, x)])
def test_keys_of_collated_samples_come_in_any_order(kind):
    orders = (("image", "target", "id"), ("id", "image", "target"), ("target", "id", "image"))
    samples = []
    for i, order in enumerate(orders):
        inner = {"label": i, "more": (Sample(i, {"a": 1, "b": 2}), [3])}
        if i:
            inner = {"more": (Sample(i, {"b": 2, "a": 1}), [3]), "label": i}
        entries = {"image": RGB[i], "target": inner, "id": f"{i}"}
        samples.append(kind({key: entries[key] for key in order}))
    batch = augment().collate(samples)
    assert [*batch] == [*orders[0], "actions"]
    assert batch["target"]["label"].tolist() == [0, 1, 2]
    assert batch["target"]["more"][0].picture.tolist() == [0, 1, 2]
    assert batch["target"]["more"][0].label["b"].tolist() == [2, 2, 2]
    assert batch["id"] == ["0", "1", "2"]
    plain = augment().collate_plain(samples)
    assert type(plain) is type(samples[0])
    assert torch.equal(plain["image"], RGB[:3])
    assert [*samples[1]] == [*orders[1]]


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ({"a": 1}, {"b": 1}, r"sample\[1\] the keys \['a'\] and \['b'\]"),
        ({"a": 1}, {"a": 1, "b": 1}, r"sample\[1\] the keys \['a'\] and \['a', 'b'\]"),
        ({"a": [1]}, {"a": [1, 2]}, r"sample\[1\]\['a'\] 1 and 2 entries"),
        (3, [3], r"sample\[1\] int and list"),
        ((3,), [3], r"sample\[1\] tuple and list"),
    ],
)
def test_samples_of_several_structures_are_told_apart(first, other, message):
    for collate in (augment().collate, augment().collate_plain):
        with pytest.raises(ValueError, match=f"one structure, got for {message}$"):
            collate([(RGB[0], first), (RGB[1], other)])


def test_collated_samples_that_make_no_batch_are_refused():
    small, large = tvf.to_pil_image(RGB[0]), tvf.to_pil_image(RGB[0, :, :8])
    boxes = tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(16, 20))
    for samples, error, message in (
        ([], ValueError, "at least one"),
        ([(small, 1), (large, 2)], ValueError, r"one shape, got \(3, 8, 20\) and \(3, 16, 20\)"),
        ([(small, 1), {"image": small}], ValueError, "one structure"),
        ([(small, 1), (small.convert("L"), 2)], ValueError, "one shape"),
        ([(small, 1), (small.convert("CMYK"), 2)], ValueError, "got CMYK"),
        ([(small, 1), (small.convert("RGBA"), 2)], ValueError, "one shape"),
        ([(small, boxes)], ValueError, "BoundingBoxes cannot be augmented as a batch"),
        ([{"image": small, "actions": 3}], ValueError, "no entry 'actions'"),
        ([(1, 2), (3, 4)], TypeError, "no image"),
        ([(RGB[0] * 1.0, 1)], ValueError, "divided by 255"),
    ):
        transform = augment()
        state = transform.generator.get_state()
        with pytest.raises(error, match=message):
            transform.collate(samples)
        assert torch.equal(transform.generator.get_state(), state)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_collate_pictures_and_dictionaries():
    transform = OLAAugment()
    data = [{"image": tvf.to_pil_image(image), "label": i} for i, image in enumerate(RGB)]
    for batch in DataLoader(data, 2, num_workers=1, collate_fn=transform.collate):
        assert torch.equal(batch["image"], transform.replay(RGB[batch["label"]], batch["actions"]))


# ---------------------------------------------------------------------------------------- threads


def test_threads_apply_and_keep_their_own_draws():
    transform = augment()
    assert transform.last_actions is None
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def call(i):
        images = RGB[i % 4 :][:1].expand(1 + i % 3, 3, 16, 20)
        for _ in range(20):
            out = transform(images)
            if not torch.equal(out, transform.replay(images, transform.last_actions)):
                return False
        return True

    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(32)))
    finally:
        sys.setswitchinterval(interval)
    assert transform.last_actions is None  # of this thread
    transform(RGB)
    assert transform.last_actions.batch_size == 4
    assert copy.deepcopy(transform).last_actions is None


def test_num_ops_0_gives_every_kind_of_image_back():
    nothing = RandAugment(num_ops=0)
    assert torch.equal(nothing(RGB), RGB)
    assert nothing(tvf.to_pil_image(RGB[0])).tobytes() == tvf.to_pil_image(RGB[0]).tobytes()
    assert torch.equal(nothing([RGB[0], RGB[1]])[1], RGB[1])
    for num_ops in (-1, 1.1, None, True):
        with pytest.raises((TypeError, ValueError), match="num_ops"):
            RandAugment(num_ops)


def test_torch_compile_leaves_a_call_as_it_is():
    images = RGB / 255
    for sample in (RGB, RGB[0], images, tv_tensors.Image(RGB), [RGB[0], RGB[1]]):
        compiled = torch.compile(augment(), backend="eager")
        out, expected = compiled(sample), augment()(sample)
        for one, other in zip(out, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*trace:FutureWarning")
def test_what_would_fix_a_draw_for_good_is_refused():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="UniformAugment cannot be exported or traced"):
        torch.export.export(torch.nn.Sequential(UniformAugment()), (images,))
    with pytest.raises(RuntimeError, match="UniformAugment cannot be exported or traced"):
        torch.jit.trace(UniformAugment(), images)


def test_the_imaginary_part_of_a_conjugate_is_an_image():
    images = torch.complex(torch.zeros(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)).conj().imag
    assert images.is_neg()
    augment = UniformAugment()
    augmented, actions = augment.augment(images)
    assert torch.equal(augmented, augment.replay(images.resolve_neg(), actions))
