"""What no operation changes comes back bit for bit; other scales are refused, a batch at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import crops, patterns, photographs
from sklearn.datasets import load_digits
from torchvision import tv_tensors
from torchvision.transforms import v2

from ola_augment import (
    OLAAugment,
    Operation,
    PolicyTransform,
    RandAugment,
    SearchSpace,
    UniformPolicy,
)
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions

RGB = crops(4, 16, 20)
SPACE = SearchSpace.wide_long()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, generator=generator())


def always(*operations, **options):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), 1, 1.0), **options)


#: Bicubic resizing of photographs, of noise, of drawings and of black and white noise.
OVERSHOOT = {
    "photographs": F.interpolate(photographs() / 255, (100, 150), mode="bicubic"),
    "noise": F.interpolate(uniform(2, 3, 24, 24), (48, 48), mode="bicubic"),
    "digits": F.interpolate(
        torch.from_numpy(load_digits().images[:50, None]) / 16, (24, 24), mode="bicubic"
    ),
    "black and white": F.interpolate(uniform(8, 3, 32, 32).round(), (64, 64), mode="bicubic"),
}


@pytest.mark.parametrize("kind", OVERSHOOT)
def test_what_resizing_leaves_is_accepted_and_kept(kind):
    images = OVERSHOOT[kind]
    assert float(images.min()) < -0.05  # or nothing is tested
    assert float(images.max()) > 1.05
    before = images.clone()
    OLAAugment(generator=generator())(images)
    assert torch.equal(images, before)
    for name, expected in (
        ("identity", images),
        ("flip_lr", images.flip(-1)),
        ("flip_ud", images.flip(-2)),
        ("invert", 1 - images),
    ):
        out = always(Operation(name))(images)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
        assert name == "invert" or torch.equal(out, expected)
    for bilinear in ("nearest", "bilinear"):
        turned = always(Operation("rotate", 180, 180), interpolation=bilinear)(images)
        torch.testing.assert_close(turned, images.flip(-1, -2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "images",
    [
        uniform(4, 3, 16, 16, low=-0.5, high=0.5),
        uniform(4, 3, 16, 16, low=-0.3, high=0.9),
        uniform(4, 1, 16, 16, high=1.5),
        torch.full((2, 3, 4, 4), 3000.0),
        torch.tensor([0.0, math.nan, math.inf, -0.0]).expand(1, 1, 4, 4),
    ],
)
def test_where_nothing_is_applied_any_values_come_back_bit_for_bit(images, dtype):
    images = images.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()]
    nothing = RandAugment(num_ops=0)
    out = nothing(images)
    assert torch.equal(out.contiguous().view(bits), images.contiguous().view(bits))
    _, actions = nothing.augment(images)
    for again in (
        nothing.replay(images, actions),
        nothing([images[0]])[0][None],
        apply_actions(images, nothing.space, actions),
        torch.from_numpy(nothing(images.movedim(1, -1).float().numpy())).movedim(-1, 1).to(dtype),
    ):
        count = len(again)
        same = again.contiguous().view(bits) == images[:count].contiguous().view(bits)
        assert bool(same.all())


#: Bins of WideLong at which an operation changes nothing, by the values of Table 3.
NEUTRAL = {
    "identity": None,
    "rotate": 0,
    "solarize": 0,
    "posterize": 0,
    "shear_x": 0,
    "shear_y": 0,
    "translate_x": 0,
    "translate_y": 0,
    "cutout": 0,
}
FACTORS = ("color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", [*NEUTRAL, *FACTORS])
def test_a_neutral_bin_changes_nothing(name, interpolation):
    if name in FACTORS:
        operation, bins = Operation(name, 1, 2), [0]
    else:
        operation = next(o for o in SPACE.operations if o.name == name)
        bins = range(31) if NEUTRAL[name] is None else [NEUTRAL[name]]
    for images in (OVERSHOOT["noise"], uniform(3, 1, 9, 7), uniform(2, 3, 8, 8).double(), RGB):
        for k in bins:
            at = always(operation, interpolation=interpolation)
            actions = at.policy.sample(len(images))
            actions = actions._replace(magnitude_bins=torch.full_like(actions.ops, k))
            assert torch.equal(at.replay(images, actions), images)


def test_no_gradient_is_lost_at_a_neutral_bin_or_where_values_stay():
    images = uniform(2, 3, 8, 8).requires_grad_()
    posterize = always(Operation("posterize", 8, 8))
    assert (torch.autograd.grad(posterize(images).sum(), images)[0] == 1).all()
    # The lowest value stays where it is, and moves all the others.
    ends = torch.tensor([[0.0, 0.25], [0.5, 1.0]]).view(1, 1, 2, 2).requires_grad_()
    stretched = always(Operation("auto_contrast"))(ends)
    assert torch.equal(stretched, ends)
    (gradient,) = torch.autograd.grad(stretched[..., 0, 1].sum(), ends)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([-0.75, 1.0, 0.0, -0.25]))


def test_what_an_operation_leaves_alone_comes_back_bit_for_bit():
    images = OVERSHOOT["noise"].clone()
    images[:, :, :4] = 1.07  # solarized below 256, constant at the border
    for name, magnitudes, kept in (
        ("solarize", (128, 128), lambda x: torch.floor(x * 255 + 0.5) < 128),
        ("sharpness", (2, 2), lambda x: border(x, 1)),
        ("blur", (), lambda x: border(x, 2)),
        ("cutout", (0.5, 0.5), lambda x: torch.ones_like(x) > 0),
    ):
        out = always(Operation(name, *magnitudes))(images)
        where = kept(images)
        assert torch.equal(out[where], images[where])
    constant = torch.full((2, 3, 6, 6), 1.03)
    for name in ("auto_contrast", "equalize"):
        assert torch.equal(always(Operation(name))(constant), constant)
    grey = images[:, :1]
    assert torch.equal(always(Operation("color", 0.3, 0.3))(grey), grey)


def border(images, width):
    inside = torch.zeros_like(images, dtype=torch.bool)
    inside[..., width:-width, width:-width] = True
    return ~inside


@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if row.leaves_range])
def test_what_leads_out_of_the_range_is_clamped(name):
    images = uniform(8, 3, 16, 16)
    magnitudes = (1.9, 1.9) if TABLE[name].domain else ()
    out = always(Operation(name, *magnitudes))(images)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert float(((out == 0) | (out == 1)).float().mean()) > 0.001


@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if not row.leaves_range])
def test_no_other_operation_leads_out_of_the_range(name):
    row = TABLE[name]
    low, high = row.domain or (0, 0)
    ends = (max(low, -40), min(high, 256)) if row.domain else ()
    operation = Operation(name, *ends)
    for images in (crops(8, 16, 16) / 255, patterns(16, 16) / 255, uniform(8, 1, 5, 4)):
        for interpolation in ("nearest", "bilinear"):
            out = always(operation, interpolation=interpolation)(images)
            assert float(out.min()) >= -1e-6
            assert float(out.max()) <= 1 + 1e-6


def test_a_kernel_of_ones_own_sees_the_range_and_leaves_values_alone():
    def lit_corner(images, _):
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        images = images.clone()
        images[..., 0, 0] = 0.25
        return images

    images = OVERSHOOT["noise"].double()
    out = always(Operation("corner", kernel=lit_corner))(images)
    changed = out != images
    assert not bool(changed.flatten(2)[..., 1:].any())
    assert (out[..., 0, 0] == 0.25).all()


# --------------------------------------------------------------------------------- another scale

OTHER_SCALES = {
    "0 .. 255": (RGB * 1.0, r"got \d \.\. 2\d\d, 87\S* %"),
    "-1 .. 1": (RGB / 127.5 - 1, r"got -[01]\S* \.\. .*, \d\d\S* %"),
    "-0.5 .. 0.5": (uniform(4, 3, 16, 16, low=-0.5, high=0.5), r", (49|50)\S* %"),
    "NDVI": (uniform(16, 1, 32, 32, low=-0.3, high=0.9), r", 2[45]\S* %"),
    "reflectance": (uniform(4, 3, 16, 16, high=1.5), r", 3[2345]\S* %"),
    "normalised": (
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(RGB / 255),
        r"got -[12]\.\d+ \.\.",
    ),
    "a few of 0 .. 255": (
        F.pad(torch.full((1, 1, 1, 1), 255.0), (9, 9, 9, 9)),
        r"255, 0\.277 %",
    ),
    "half": (torch.full((1, 2, 2), -0.51).half(), r"-0\.5\d+"),
}


@pytest.mark.parametrize("scale", OTHER_SCALES)
def test_another_scale_is_refused_with_the_share_outside(scale):
    images, message = OTHER_SCALES[scale]
    batch = images.reshape(-1, *images.shape[-3:])
    augment = OLAAugment(generator=generator())
    state = augment.generator.get_state()
    for entry in (
        lambda: augment(images),
        lambda: augment.augment(images),
        lambda: augment(images.movedim(-3, -1).numpy()),
        lambda: augment(list(batch)),
        lambda: augment(tv_tensors.Image(images), 3),
        lambda: augment.collate(list(batch)),
        lambda: apply_actions(batch, SPACE, augment.policy.sample(len(batch), generator(1))),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            entry()
        assert "value_range=(low, high)" in str(caught.value)
        assert "divided by 255" in str(caught.value)
    assert torch.equal(augment.generator.get_state(), state)
    assert augment.last_actions is None


@pytest.mark.parametrize("high", [1.6, 2.0, 3.0])
def test_one_of_many_images_does_not_end_an_epoch(high):
    images = uniform(64, 3, 16, 16)
    images[63] *= high
    augment = OLAAugment(generator=generator())
    out = augment(images)
    assert out.shape == images.shape
    assert len(augment(list(images))) == 64
    assert len(augment.collate(list(images))[0]) == 64
    assert torch.equal(always(Operation("flip_lr"))(images), images.flip(-1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_named_and_its_advice_works(value):
    images = RGB / 255
    images[1, :, 3, 3:7] = value
    augment = OLAAugment(generator=generator())
    with pytest.raises(ValueError, match=r"NaN or infinite in 0\.312 % of the values") as caught:
        augment(images)
    assert "255" not in str(caught.value)
    missing = tv_tensors.Mask(~images.isfinite())  # what the message says
    out, moved = augment(tv_tensors.Image(images.nan_to_num(0, 0, 0)), missing)
    assert out.isfinite().all()
    assert moved.shape == images.shape


def test_arrays_of_another_scale_too():
    with pytest.raises(ValueError, match="divided by 255"):
        OLAAugment()(np.full((8, 8, 3), 200.0))
