"""What belongs together: clips, label maps beside their image, and what a picture carries along."""

import copy

import numpy as np
import pytest
import torch
from images import crops
from PIL import Image, ImageCms
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment import (
    OLAAugment,
    OLALearner,
    Operation,
    PolicyTransform,
    SearchSpace,
    UniformPolicy,
)
from ola_augment.integrations.pairs import Pairs

RGB = crops(4, 16, 20)
CLIPS = RGB[:, None].expand(4, 6, 3, 16, 20).contiguous()  # frames alike: one draw leaves them so


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(seed=0, **options):
    return OLAAugment(generator=generator(seed), **options)


def always(*operations, **options):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0), **options)


# ------------------------------------------------------------------------------------------ clips


def still(clips):
    return bool((clips == clips.select(-4, 0).unsqueeze(-4)).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (4,), (2, 2)])
@pytest.mark.parametrize("kind", [tv_tensors.Video, torch.Tensor])
def test_a_clip_has_one_draw_in_every_method(kind, batch, dtype):
    if kind is torch.Tensor and not batch:
        return  # four dimensions of a plain tensor are a batch of images
    pixels = RGB[:1].expand(*batch, 6, 3, 16, 20).contiguous()
    pixels = pixels if dtype == torch.uint8 else pixels / 255
    clips = pixels if kind is torch.Tensor else tv_tensors.Video(pixels)
    how = {"clips": True} if kind is torch.Tensor else {}
    transform = augment(3)
    out, actions = transform.augment(clips, **how)
    assert (type(out), out.shape, out.dtype) == (kind, clips.shape, dtype)
    assert still(out)
    count = (torch.Size(batch).numel(),) if batch else ()
    assert actions.num_ops.shape == count
    assert torch.equal(transform.replay(clips, actions, **how), out)
    frames = pixels.select(-4, 0)
    assert torch.equal(
        transform.replay(frames, actions), out.select(-4, 0).as_subclass(torch.Tensor)
    )
    if kind is tv_tensors.Video:
        called = augment(3)
        assert torch.equal(called(clips), out)
        assert torch.equal(called.replay(clips, called.last_actions), out)


def test_plain_images_of_five_dimensions_stay_images():
    transform = augment()
    out, actions = transform.augment(CLIPS)
    assert actions.batch_size == 24
    assert not still(out)
    assert torch.equal(transform.replay(CLIPS, actions), out)
    with pytest.raises(ValueError, match="hold 24 examples, the batch has 4"):
        transform.replay(CLIPS, actions, clips=True)


@pytest.mark.parametrize("kind", [tv_tensors.Video, lambda clip: clip])
def test_collate_makes_one_row_a_clip(kind):
    for fill in (0, {torch.Tensor: 7, tv_tensors.Video: 9}):
        transform = always(Operation("translate_x", 5, 5), fill=fill)
        samples = [(kind(clip), i) for i, clip in enumerate(CLIPS)]
        clips, labels, actions = transform.collate(samples)
        assert type(clips) is torch.Tensor
        assert clips.shape == CLIPS.shape
        assert still(clips)
        assert actions.batch_size == len(labels) == 4
        expected = (
            transform.replay(samples[0][0], actions.select(0)) if kind is tv_tensors.Video else None
        )
        assert expected is None or torch.equal(clips[0], expected.as_subclass(torch.Tensor))
    filled = 9 if kind is tv_tensors.Video else 7
    assert (clips[..., -1] == filled).all()
    masks = tv_tensors.Mask(torch.zeros(6, 16, 20))
    assert transform.collate([(kind(CLIPS[0]), masks)] * 2)[1].shape == (2, 6, 16, 20)


def test_samples_of_several_plain_clips_are_refused():
    with pytest.raises(
        ValueError, match=r"images \(C, H, W\) or clips \(T, C, H, W\), got \(4, 6, 3"
    ):
        augment().collate([CLIPS, CLIPS])
    with pytest.raises(ValueError, match="take as many frames of each"):
        augment().collate([CLIPS[0], CLIPS[0, :3]])


class VideoClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.frame = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, clips):
        features = self.frame(clips.flatten(0, 1)).mean((2, 3))
        return self.head(features.unflatten(0, clips.shape[:2]).mean(1))


@pytest.mark.parametrize("kind", [tv_tensors.Video, lambda clip: clip])
def test_a_video_classifier_teaches_the_policy(kind):
    torch.manual_seed(0)
    model = VideoClassifier()
    learner = OLALearner(model, augment())
    targets = torch.tensor([0, 1, 2, 0])
    criterion = nn.CrossEntropyLoss()
    with learner.augmented_step():
        clips = learner.augment(kind(CLIPS))
        assert still(clips)
        criterion(model(clips / 255), targets).backward()
    model.zero_grad()
    with learner.plain_step() as step:
        criterion(model(CLIPS / 255), targets).backward()
    assert step.stats.stepped


def test_clips_pass_through_the_loops_of_other_frameworks():
    torch.manual_seed(0)
    model = VideoClassifier()
    pairs = Pairs(OLALearner(model, augment()))
    targets = torch.tensor([0, 1, 2, 0])
    for half in range(2):
        with pairs.batch({"pixel_values": CLIPS, "labels": targets}, 1) as batch:
            assert still(batch["pixel_values"])
            loss = nn.functional.cross_entropy(model(batch["pixel_values"] / 255), targets)
            loss.backward()
        model.zero_grad()
        pairs.updated()
        assert (pairs.stats is not None) == bool(half)


def test_a_model_of_frames_can_take_each_for_an_example():
    model = nn.Sequential(nn.Flatten(), nn.Linear(960, 3))
    learner = OLALearner(model, augment())
    targets = torch.zeros(24, dtype=torch.long)
    with learner.augmented_step():
        images = learner.augment(CLIPS, clips=False).flatten(0, 1)
        nn.functional.cross_entropy(model(images / 255), targets).backward()
    model.zero_grad()
    with learner.plain_step() as step:
        nn.functional.cross_entropy(model(CLIPS.flatten(0, 1) / 255), targets).backward()
    assert step.stats.stepped


# ------------------------------------------------------------------------------------- label maps


def label_map(mode="L"):
    labels = torch.arange(16 * 20).view(1, 16, 20) % 19
    return tvf.to_pil_image(labels.to(torch.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1", "I;16"])
@pytest.mark.parametrize("structure", ["tuple", "list", "dict", "nested", "arguments", "collate"])
def test_a_second_pil_image_is_refused_and_both_ways_out_work(structure, mode):
    image, second = tvf.to_pil_image(RGB[0]), label_map(mode)
    make = {
        "tuple": lambda x: (image, x),
        "list": lambda x: [image, x],
        "dict": lambda x: {"image": image, "target": x},
        "nested": lambda x: (image, {"targets": [x, 3]}),
        "arguments": lambda x: (image, x),
        "collate": lambda x: (image, x),
    }[structure]
    transform = augment()

    def call(x):
        if structure == "arguments":
            return transform(*make(x))
        if structure == "collate":
            return transform.collate([make(x)] * 2)
        return transform(make(x))

    state = transform.generator.get_state()
    if not (structure == "list" and mode == "RGB"):  # two images of a list, a draw each
        with pytest.raises(ValueError, match=r"tv_tensors\.Mask\((image|label_map)\)"):
            call(second)
        assert torch.equal(transform.generator.get_state(), state)
    invert = always(Operation("invert"))
    sample = (image, tv_tensors.Mask(second))
    assert torch.equal(invert(sample)[1], tv_tensors.Mask(second))
    if mode in ("L", "RGB"):
        out = invert(image, tv_tensors.Image(second))[1]
        assert torch.equal(out, 255 - tv_tensors.Image(second))


def test_lists_of_images_of_one_mode_or_of_several_sizes_stay_lists():
    image, grey = tvf.to_pil_image(RGB[0]), tvf.to_pil_image(RGB[1, :1])
    for pictures in ([image, image], [grey, grey], [image, grey.resize((9, 9))]):
        out = augment()(pictures)
        assert [x.size for x in out] == [x.size for x in pictures]
    for pictures in ([image, grey], [grey, tv_tensors.Image(RGB[0])]):
        with pytest.raises(ValueError, match=r"after image\.convert\('RGB'\)"):
            augment()(pictures)
    augment()([image, grey.convert("RGB")])


def test_sixteen_bits_beside_colour_are_told_to_scale_their_levels():
    image = Image.new("RGB", (3, 1))
    deep = Image.fromarray(np.array([[0, 30000, 65535]], "uint16"))
    with pytest.raises(ValueError, match="16 bits after ") as caught:
        augment()([image, deep])
    code = str(caught.value).split("16 bits after ")[1].split(", with")[0]
    scaled = eval(code, {"image": deep, "top": 65535})
    assert np.asarray(scaled)[0].tolist() == [[0] * 3, [117] * 3, [255] * 3]
    augment()([image, scaled])


@pytest.mark.parametrize(
    "mode", ["1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La", "I", "F"]
)
def test_other_pil_modes_are_refused_and_the_advice_works(mode):
    picture = Image.new(mode, (4, 4))
    with pytest.raises(ValueError, match=f"mode L, RGB, LA, RGBA, I;16, got {mode}; ") as caught:
        augment()(picture)
    message = str(caught.value)
    advice = message.split(f"got {mode}; ")[1].split(" makes one")[0]
    label_map = message.split("is wrapped in ")[-1]
    if mode in ("1", "P", "PA", "I", "F"):
        code = {"tv_tensors": tv_tensors, "image": picture}
        mask = augment()(Image.new("RGB", (4, 4)), eval(label_map, code))[1]
        assert isinstance(mask, tv_tensors.Mask)
        assert mask.shape[-2:] == (4, 4)
    else:
        assert "tv_tensors.Mask" not in message
    if mode in "IF":
        picture = Image.fromarray(np.full((4, 4), 500, "int32" if mode == "I" else "float32"))
        code = "np.asarray(image, 'float32')[..., None] / top"
        assert code in message
        scaled = eval(code, {"np": np, "image": picture, "top": 1000})
        assert (always(Operation("identity"))(scaled) == 0.5).all()
        return
    made = eval(advice, {"image": picture, "ImageCms": ImageCms})
    kept = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}  # with their alpha
    assert augment()(made).mode == made.mode == kept.get(mode, "RGB")


# ------------------------------------------------------------------- what a picture carries along


class Scan(torch.Tensor):
    """A tensor with metadata, as MONAI's: results of torch functions keep what the first has."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        first = next((a for a in args if isinstance(a, Scan)), None)
        if isinstance(result, Scan) and first is not None:
            result.__dict__.update(copy.copy(first.__dict__))
        return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(3, 16, 20), (4, 3, 16, 20)])
def test_subclasses_of_tensor_keep_type_and_metadata(shape, dtype):
    pixels = RGB[0].expand(shape) if dtype == torch.uint8 else RGB[0].expand(shape) / 255
    scan = pixels.clone().as_subclass(Scan)
    scan.affine = torch.eye(4)
    before = pixels.clone()
    transform = augment(2)
    expected = augment(2)(before)
    for out in (
        transform(scan),
        transform.replay(scan, transform.last_actions),
        augment(2).augment(scan)[0],
        augment(2)(scan, 5)[0],
        augment(2)({"image": scan})["image"],
    ):
        assert type(out) is Scan
        assert out.affine is scan.affine
        plain = torch.tensor(out.tolist(), dtype=dtype)
        torch.testing.assert_close(plain, expected, atol=1e-6, rtol=0)
    assert torch.equal(torch.tensor(scan.tolist(), dtype=dtype), before)
    kept = tv_tensors.Image(RGB)
    assert type(augment().augment(kept)[0]) is tv_tensors.Image
    assert type(augment()(nn.Parameter(RGB / 255))) is torch.Tensor


def test_a_subclass_keeps_its_gradient():
    scan = (RGB / 255).as_subclass(Scan).requires_grad_()
    out = always(Operation("invert"))(scan)
    assert type(out) is Scan
    (gradient,) = torch.autograd.grad(out.sum(), scan)
    assert (gradient == -1).all()


@pytest.mark.parametrize(
    "operation", SearchSpace.wide_long().operations, ids=lambda operation: operation.name
)
def test_a_pil_image_keeps_its_orientation(operation):
    picture = tvf.to_pil_image(RGB[0])
    exif = picture.getexif()
    exif[274] = 6
    picture.info.update(exif=exif.tobytes(), icc_profile=b"profile", comment="first")
    before = dict(picture.info)
    out = always(operation)(picture)
    assert out.info == before
    assert out.getexif()[274] == 6
    if out is not picture:
        out.info["comment"] = "second"
    assert picture.info == before
