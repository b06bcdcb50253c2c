"""Transforms as torchvision users expect them."""

import copy
import math
import pickle

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from ola_augment import (
    OLAAugment,
    OLAPolicy,
    Operation,
    PolicyTransform,
    RandAugment,
    SearchSpace,
    TrivialAugment,
    UniformAugment,
    UniformPolicy,
    testing,
)

TRANSFORMS = {
    "ola": OLAAugment,
    "uniform": UniformAugment,
    "rand": RandAugment,
    "trivial": TrivialAugment,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def always(*operations):
    """A transform that applies exactly these operations' space, one each image, always kept."""
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_keeps_what_any_must(name):
    augment = TRANSFORMS[name](generator=generator())
    testing.check_transform(augment, images=testing.images(sides=(1, 7)), max_examples=40)


@pytest.mark.parametrize("shape", [(8, 3, 32, 32), (8, 1, 17, 23), (3, 32, 32), (1, 20, 20)])
def test_augment_returns_and_remembers_what_it_drew(shape):
    augment = OLAAugment(generator=generator())
    _, actions = augment.augment(noise(*shape))
    assert actions.num_ops.shape == shape[:-3]
    assert augment.last_actions is actions


def test_examples_of_a_batch_get_their_own_operations():
    image = noise(3, 32, 32).expand(64, 3, 32, 32)
    out, actions = OLAAugment(generator=generator()).augment(image)
    assert len({tuple(row) for row in actions.ops.tolist()}) > 50
    assert len(torch.unique(out.flatten(1), dim=0)) > 40


def test_rand_augment_matches_its_arguments():
    augment = RandAugment(3, 7)
    _, actions = augment.augment(noise(50, 3, 8, 8))
    assert actions.ops.shape == (50, 3)
    assert actions.keep.all()
    assert (actions.magnitude_bins == 7).all()
    assert any(len(set(ops)) < 3 for ops in actions.ops.tolist())


def test_trivial_augment_draws_one_operation():
    _, actions = TrivialAugment().augment(noise(50, 3, 8, 8))
    assert actions.ops.shape == (50, 1)
    assert actions.keep.all()
    assert len(actions.magnitude_bins.unique()) > 10


def test_pil_in_pil_out():
    for mode in ("RGB", "L"):
        image = tvf.to_pil_image(noise(1 if mode == "L" else 3, 20, 30))
        augment = OLAAugment(generator=generator(3))
        out = augment(image)
        assert isinstance(out, Image.Image)
        assert (out.mode, out.size) == (mode, (30, 20))
        expected = augment.replay(tvf.pil_to_tensor(image), augment.last_actions)
        assert torch.equal(tvf.pil_to_tensor(out), expected)


def test_any_structure_passes_through():
    image = tv_tensors.Image(noise(3, 16, 16))
    sample = {"pair": [image, 7], "label": torch.tensor(3), "name": "x", "none": None}
    out = OLAAugment(generator=generator())(sample)
    assert isinstance(out["pair"][0], tv_tensors.Image)
    assert (out["pair"][1], out["name"], out["none"]) == (7, "x", None)
    assert out["label"] is sample["label"]
    images, labels = OLAAugment()(noise(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3]


def test_a_clip_gets_one_draw():
    frame = noise(3, 16, 16)
    augment = OLAAugment(generator=generator(1))
    for shape in ((5, 3, 16, 16), (2, 5, 3, 16, 16)):
        clip = tv_tensors.Video(frame.expand(shape).clone())
        out = augment(clip)
        assert isinstance(out, tv_tensors.Video)
        assert (out == out.select(-4, 0).unsqueeze(-4)).all()
    assert augment.last_actions.num_ops.shape == (2,)


GEOMETRY = [
    Operation("rotate", 30, 30.5, signed=True),
    Operation("shear_x", 0.3, 0.31, signed=True),
    Operation("shear_y", 0.3, 0.31, signed=True),
    Operation("translate_x", 8, 9, integer=True, signed=True),
    Operation("translate_y", 8, 9, integer=True, signed=True),
    Operation("flip_lr"),
    Operation("flip_ud"),
]


@pytest.mark.parametrize("operation", GEOMETRY, ids=lambda operation: operation.name)
@pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
def test_image_mask_box_and_points_stay_in_register(operation, box_format):
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    image[:, 10:20, 30:44] = 255
    mask = (image[0] > 0).to(torch.int64) * 5
    xyxy = torch.tensor([[30.0, 10.0, 44.0, 20.0]])
    boxes = tvf.convert_bounding_box_format(
        xyxy, tv_tensors.BoundingBoxFormat.XYXY, tv_tensors.BoundingBoxFormat(box_format)
    )
    sample = {
        "image": tv_tensors.Image(image),
        "mask": tv_tensors.Mask(mask),
        "boxes": tv_tensors.BoundingBoxes(boxes, format=box_format, canvas_size=(48, 64)),
        "points": tv_tensors.KeyPoints(torch.tensor([[37.0, 15.0]]), canvas_size=(48, 64)),
    }
    augment = always(operation)
    for _ in range(6):
        out = augment(sample)
        assert {key: type(value) for key, value in out.items()} == {
            key: type(value) for key, value in sample.items()
        }
        square = out["image"][0] > 0
        assert torch.equal(out["mask"] == 5, square)
        assert out["boxes"].format.value == box_format
        left, top, right, bottom = tvf.convert_bounding_box_format(
            out["boxes"], new_format=tv_tensors.BoundingBoxFormat.XYXY
        )[0].tolist()
        rows, columns = torch.nonzero(square, as_tuple=True)
        # Pixels are unit squares; nearest resampling may be off by half a pixel.
        assert columns.min() >= left - 0.51
        assert columns.max() + 1 <= right + 0.51
        assert rows.min() >= top - 0.51
        assert rows.max() + 1 <= bottom + 0.51
        x, y = out["points"][0].tolist()
        assert abs(x - (columns.float().mean() + 0.5)) < 1
        assert abs(y - (rows.float().mean() + 0.5)) < 1


def test_masks_of_a_batch_follow_their_images():
    images = torch.zeros(16, 1, 24, 24, dtype=torch.uint8)
    images[:, :, 4:12, 6:20] = 255
    augment = always(*GEOMETRY)
    for masks in (images[:, 0] > 0, (images > 0).expand(16, 2, 24, 24)):
        out, moved = augment(tv_tensors.Image(images), tv_tensors.Mask(masks))
        assert moved.shape == masks.shape
        expected = out > 0 if masks.ndim == 4 else (out > 0)[:, 0]
        assert torch.equal(moved.as_subclass(torch.Tensor), expected.expand(masks.shape))


def test_boxes_are_clamped_to_the_image():
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[20, 2, 30, 8]]), format="XYXY", canvas_size=(32, 32)
    )
    augment = always(Operation("translate_x", -8, -8, integer=True))
    _, moved = augment(tv_tensors.Image(noise(3, 32, 32)), boxes)
    assert moved.tolist() == [[28, 2, 32, 8]]
    assert moved.dtype == boxes.dtype


def test_composes_pickles_copies_and_prints():
    images = noise(4, 3, 16, 16)
    augment = OLAAugment("rand_augment", fill=(1, 2, 3), generator=generator(5))
    twins = [copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))]
    expected, _ = augment.augment(images)
    for twin in twins:
        assert torch.equal(twin.augment(images)[0], expected)
    composed = v2.Compose(
        [augment, v2.ToDtype(torch.float32, scale=True), v2.Lambda(nn.Identity())]
    )
    assert composed(images).dtype == torch.float32
    assert nn.Sequential(augment)(images).shape == images.shape
    assert "space='rand_augment', max_ops=4, num_magnitude_bins=31" in repr(augment)
    assert "interpolation=nearest, fill=(1, 2, 3)" in repr(augment)


def test_state_dict_holds_the_logits():
    augment = OLAAugment("rand_augment")
    with torch.no_grad():
        augment.policy.keep_logits.fill_(1.5)
    other = OLAAugment("rand_augment")
    other.load_state_dict(augment.state_dict())
    assert set(augment.state_dict()) == {
        "policy.num_ops_logits",
        "policy.keep_logits",
        "policy.magnitude_logits",
    }
    assert (other.policy.keep_logits == 1.5).all()


def test_empty_batch_comes_back_empty():
    for images in (noise(0, 3, 8, 8), torch.zeros(0, 1, 8, 8)):
        out, actions = OLAAugment().augment(images)
        assert (out.shape, out.dtype) == (images.shape, images.dtype)
        assert actions.batch_size == 0


def test_own_kernel_and_its_mistakes():
    def halve(images, magnitudes):
        assert images.dtype == torch.float32
        return images * magnitudes[:, None, None, None]

    images = noise(6, 3, 5, 5)
    out, _ = always(Operation("halve", 0.5, 0.5, kernel=halve)).augment(images)
    assert torch.equal(out, (images.float() / 255 * 0.5 * 255).round().to(torch.uint8))
    with pytest.raises(ValueError, match="'crop'"):
        always(Operation("crop", kernel=lambda images, _: images[..., 1:])).augment(images)
    mask = tv_tensors.Mask(torch.zeros(6, 5, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="halve"):
        always(Operation("halve", 0.5, 0.5, kernel=halve))(tv_tensors.Image(images), mask)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.int16), TypeError, "int16 images have no black"),
        (
            torch.zeros(3, 8, 8, dtype=torch.int64),
            TypeError,
            "uint8, uint16, int16 with a value_range",
        ),
        (torch.full((3, 8, 8), 200.0), ValueError, "divided by 255"),
        (torch.full((3, 8, 8), -0.6), ValueError, r"\[0, 1\]"),
        (torch.full((3, 8, 8), math.nan), ValueError, "NaN or infinite in 100 %"),
        (noise(8, 8), ValueError, r"\(8, 8\)"),
        (noise(0, 8, 8), ValueError, r"1 or more channels.*\(0, 8, 8\)"),
        (noise(3, 0, 8), ValueError, "height 0, width 8"),
        (Image.new("RGB", (0, 4)), TypeError, "Image"),
        ([1, 2], TypeError, "list"),
    ],
)
def test_bad_images_are_refused_before_anything_is_drawn(images, error, message):
    augment = OLAAugment(generator=generator())
    state = augment.generator.get_state()
    with pytest.raises(error, match=message):
        augment.augment(images)
    assert torch.equal(augment.generator.get_state(), state)
    assert augment.last_actions is None


def test_bad_samples_are_refused():
    image = tv_tensors.Image(noise(3, 8, 8))
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])

    def boxed(box_format="XYXY", size=(8, 8), values=boxes):
        return tv_tensors.BoundingBoxes(values, format=box_format, canvas_size=size)

    with pytest.raises(TypeError, match="no image"):
        OLAAugment()(tv_tensors.Mask(noise(8, 8)))
    for sample, message in (
        ((image, tv_tensors.Mask(noise(8, 9))), r"Mask must have the size \(8, 8\).*\(8, 9\)"),
        ((image, boxed(size=(4, 4))), r"BoundingBoxes must have the size"),
        ((tv_tensors.Image(noise(2, 3, 8, 8)), boxed()), "belong to one image"),
        ((tv_tensors.Image(noise(2, 3, 8, 8)), tv_tensors.Mask(noise(3, 8, 8))), r"\(2, \.\.\."),
        ((image, tv_tensors.Image(noise(3, 9, 8))), "same batch size and height and width"),
        ((Image.new("CMYK", (4, 4)),), "CMYK"),
        ((noise(3, 8, 8).as_subclass(tv_tensors.Video),), r"\(..., T, C, H, W\), got \(3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            OLAAugment()(*sample)


def test_actions_that_do_not_match_are_refused():
    augment = OLAAugment("rand_augment")
    images = noise(4, 3, 8, 8)
    _, actions = augment.augment(images)
    with pytest.raises(ValueError, match="hold 4 examples, the batch has 2"):
        augment.replay(images[:2], actions)
    with pytest.raises(ValueError, match="another space"):
        augment.replay(images, actions._replace(ops=actions.ops + 14))
    with pytest.raises(TypeError, match="Actions"):
        augment.replay(images, "draw")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"interpolation": InterpolationMode.BICUBIC}, ValueError, "NEAREST or BILINEAR"),
        ({"fill": ()}, ValueError, "one value or one per channel"),
        ({"fill": 70000}, ValueError, r"0 \.\. 65535"),
        ({"fill": "red"}, TypeError, "fill"),
        ({"space": "wide"}, ValueError, "known are rand_augment, wide_long, trivial_augment"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        OLAAugment(**arguments)


def test_fill_has_the_scale_of_the_images():
    grey = OLAAugment(fill=0.5)
    with pytest.raises(ValueError, match=r"1 \.\. 255 for uint8"):
        grey.augment(noise(2, 3, 8, 8))
    grey.augment(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"0 \.\. 1 for floating"):
        OLAAugment(fill=128).augment(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="one per channel"):
        OLAAugment(fill=(1, 2, 3)).augment(noise(2, 1, 8, 8))
    with pytest.raises(TypeError, match="Policy"):
        PolicyTransform(OLAAugment())
    assert isinstance(PolicyTransform(OLAPolicy()).policy, OLAPolicy)
