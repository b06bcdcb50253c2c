"""The default device and dtype, and inference mode, leave drawing and learning alone."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
from images import crops
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from ola_augment import (
    GARUpdater,
    OLAAugment,
    OLALearner,
    RandAugment,
    TrivialAugment,
    UniformAugment,
    load_policy,
    save_policy,
)
from ola_augment.alignment import GradientAlignment
from ola_augment.operations import apply_geometry_to_masks, transform_points
from ola_augment.training import ValueUpdater
from ola_augment.training.rejoin import Rejoin

RGB = crops(4, 16, 16)
TRANSFORMS = {
    "ola": OLAAugment,
    "strength": lambda **options: OLAAugment(strength=1.5, **options),
    "uniform": UniformAugment,
    "rand": RandAugment,
    "trivial": TrivialAugment,
}


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "meta": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
}


def generator():
    return torch.Generator("cpu").manual_seed(0)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_defaults_change_nothing(name, default, tmp_path):
    boxes = tv_tensors.BoundingBoxes([[1, 2, 7, 9]], format="XYXY", canvas_size=(16, 16))
    points = tv_tensors.KeyPoints([[1.5, 2.0]], canvas_size=(16, 16))
    mask = tv_tensors.Mask(RGB[0, 0])
    pictures = [tvf.to_pil_image(image) for image in RGB]
    corners = RGB[:, 0, :5, :2] / 8
    samples = [
        RGB,
        RGB[0],
        RGB / 255,
        pictures[0],
        RGB[0].permute(1, 2, 0).numpy(),
        (tv_tensors.Image(RGB[0]), mask, boxes, points),
        list(RGB),
    ]

    def run():
        augment = TRANSFORMS[name](generator=generator())
        out = [augment(sample) for sample in samples for _ in range(3)]
        out.append(augment.collate(pictures))
        space, actions = augment.space, augment.policy.sample(4, generator())
        out.append(apply_geometry_to_masks(RGB[:, 0], space, actions))
        out.append(transform_points(corners, space, actions, 16, 16))
        out.append(augment.policy.log_prob(actions))
        out.append(augment.policy.entropy())
        out.append(augment.policy.summary())
        save_policy(augment.policy, tmp_path / "policy.json")
        out.append(repr(load_policy(tmp_path / "policy.json")))
        return out

    with DEFAULTS[default]():
        found = run()
    for one, other in zip(found, run(), strict=True):
        assert pickle.dumps(plain(one)) == pickle.dumps(plain(other))


def plain(value):
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu"
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.tobytes() if hasattr(value, "tobytes") else value


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("make", [GARUpdater, ValueUpdater])
def test_learning_is_that_of_no_default(make, default):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2))
    targets = torch.tensor([0, 1, 0, 1])

    def loss(images):
        return nn.functional.cross_entropy(model(images.float() / 255), targets)

    def learned():
        model.zero_grad()
        policy = {} if make is GARUpdater else {"strength": 1.0}
        augment = OLAAugment(generator=generator(), **policy)
        learner = OLALearner(model, augment, updater=make(augment.policy))
        with learner.augmented_step():
            loss(learner.augment(RGB)).backward()
        model.zero_grad()
        with learner.plain_step() as step:
            loss(RGB).backward()
        assert step.stats.stepped
        return augment.policy.state_dict()

    with DEFAULTS[default]():
        found = learned()
    for one, other in zip(found.values(), learned().values(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


class Indexed(nn.Module):
    """Two layers, and between them an index of any kind."""

    def __init__(self, index):
        super().__init__()
        self.first, self.last, self.index = nn.Linear(6, 4), nn.Linear(4, 2), index

    def forward(self, x):
        return self.last(self.first(x).relu()[self.index])


@pytest.mark.parametrize(
    "index",
    [[0, 1, 2, 3, 4], range(5), np.arange(5), (slice(None), [1, 0, 3, 2]), torch.arange(5)],
    ids=["list", "range", "array", "columns", "tensor"],
)
@pytest.mark.parametrize("rows", [(), (3,)], ids=["one", "several"])
def test_alignments_are_those_of_no_default_device(index, rows):
    model, inputs = Indexed(index), torch.randn(5, 6, generator=generator())
    gradients = {name: torch.ones(*rows, *p.shape) for name, p in model.named_parameters()}

    def align():
        engine = GradientAlignment(model)
        with engine.capture() as captured:
            model(inputs).square().sum().backward()
        return captured.align(gradients)

    with default_device("meta"):
        found = align()
    assert found.device.type == "cpu"
    assert torch.equal(found, align())


@pytest.mark.parametrize("views", [False, True], ids=["images", "tokens"])
def test_alignments_of_images_that_keep_their_class(views):
    layers = [nn.Flatten(2), nn.Linear(64, 4)] if views else [nn.Conv2d(3, 4, 8)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))
    images = torch.rand(5, 3, 8, 8, generator=generator())
    model(images)
    gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def align(images):
        engine = GradientAlignment(model)
        with engine.capture() as captured:
            model(images).square().sum().backward()
        return captured.align(gradients)

    with tv_tensors.set_return_type("TVTensor"):
        found = align(tv_tensors.Image(images))
    assert torch.equal(found.as_subclass(torch.Tensor), align(images))


def test_held_out_images_join_under_a_default_device():
    held_out = [(RGB, torch.arange(4))]
    train = (RGB.flip(0), torch.arange(4))

    def mixed():
        return Rejoin(held_out).mix(train, train_size=4)

    with default_device("meta"):
        found = mixed()
    for one, other in zip(found, mixed(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["ola", "strength"])
def test_what_was_made_in_inference_mode_learns(name):
    with torch.inference_mode():
        made = TRANSFORMS[name](generator=generator())
        copied = copy.deepcopy(made)
        unpickled = pickle.loads(pickle.dumps(made))
        actions = made.policy.sample(4)
        made.augment(RGB)
    for augment in (made, copied, unpickled):
        logits = augment.policy.named_logits()
        assert not any(entry.is_inference() for entry in logits.values())
        before = augment.policy.keep_logits.clone()
        updater = (GARUpdater if name == "ola" else ValueUpdater)(augment.policy)
        norms = () if name == "ola" else (torch.ones(4),)
        for _ in range(3):
            updater.step(actions, torch.tensor([1.0, -1.0, 0.5, 2.0]), *norms)
        assert not torch.equal(augment.policy.keep_logits, before)
        assert all(entry.requires_grad == (key != "expected_ops") for key, entry in logits.items())
    with torch.inference_mode():
        made.load_state_dict(copied.state_dict())
        made.double()
    assert made.policy.log_prob(actions).requires_grad


def test_actions_drawn_in_inference_mode_teach():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    learner = OLALearner(model, OLAAugment(generator=generator()))
    targets = torch.tensor([0, 1, 0, 1])
    with torch.inference_mode():
        images = learner.augment(RGB)
    with learner.augmented_step():
        nn.functional.cross_entropy(model(images.clone() / 255), targets).backward()
    model.zero_grad()
    with learner.plain_step() as step:
        nn.functional.cross_entropy(model(RGB / 255), targets).backward()
    assert step.stats.stepped
