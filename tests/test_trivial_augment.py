"""TrivialAugment against torchvision's, by distribution, and how far images are translated."""

import pytest
import torch
from torchvision.transforms import v2

from ola_augment import (
    OLAAugment,
    Operation,
    SearchSpace,
    TrivialAugment,
    UniformAugment,
    UniformPolicy,
)
from ola_augment.kernels.compiled import KERNELS
from ola_augment.operations import apply_actions

#: torchvision's names of our operations.
NAMES = {
    "identity": "Identity",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "rotate": "Rotate",
    "solarize": "Solarize",
    "color": "Color",
    "posterize": "Posterize",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
}
COUNT = 150
ENHANCING = ("color", "contrast", "brightness", "sharpness")


class Recorded(v2.TrivialAugmentWide):
    """Says what it would have done."""

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, **others):
        self.drawn = transform_id, magnitude
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, **others)


@pytest.mark.parametrize("side", [32, 176, 224])
def test_magnitudes_are_torchvisions_at_every_size(side):
    space = TrivialAugment().space
    assert [o.name for o in space.operations] == list(NAMES)
    table = dict(zip((o.name for o in space.operations), space.magnitudes(side, side), strict=True))
    for name, (magnitudes, signed) in v2.TrivialAugmentWide._AUGMENTATION_SPACE.items():
        own = next(key for key, value in NAMES.items() if value == name)
        operation = next(o for o in space.operations if o.name == own)
        theirs, ours = magnitudes(31, side, side), table[own]
        if theirs is None:
            assert operation.low is None
        elif own in ENHANCING:  # 1 +- theirs; every other of ours lies between two of them
            both = torch.cat((1 - theirs.flip(0), 1 + theirs[1:])).double()
            torch.testing.assert_close(ours, both[::2], atol=1e-6, rtol=0)
        else:
            assert operation.signed == signed
            theirs = theirs.double() * (255 if own == "solarize" else 1)
            if own.startswith("translate"):  # linspace's 16 pixels are 15.999998 in float32
                theirs = (theirs + 1e-4).trunc()
            atol = 1 if own == "posterize" else 1e-3  # ours truncates bits, theirs are float32
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_frequencies_and_signs_are_torchvisions():
    draws = 4000
    augment = TrivialAugment()
    actions = augment.policy.sample(draws, torch.Generator().manual_seed(0))
    assert actions.keep.all()
    assert actions.ops.shape == (draws, 1)
    counts = torch.bincount(actions.ops[:, 0], minlength=14)
    bins = torch.bincount(actions.magnitude_bins[:, 0], minlength=31)
    for found, expected in ((counts, draws / 14), (bins, draws / 31)):
        assert ((found - expected).abs() < 5 * expected**0.5).all()
    signed = torch.tensor([o.signed for o in augment.space.operations])[actions.ops]
    assert abs(float(actions.signs[signed].double().mean())) < 0.1
    theirs, image = Recorded(), torch.zeros(3, 8, 8, dtype=torch.uint8)
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        theirs(image)
        seen.add(theirs.drawn[0])
    assert seen == set(NAMES.values())


@pytest.mark.parametrize("side", [32, 176, 224])
def test_as_much_is_uncovered_as_by_torchvision(side):
    images = torch.full((COUNT, 1, side, side), 200, dtype=torch.uint8)
    geometric = [o for o in TrivialAugment().space.operations if o.signed]
    space = SearchSpace(tuple(geometric))
    one = TrivialAugment(space=space)
    drawn = one.policy.sample(COUNT, torch.Generator().manual_seed(0))
    shares = (one.replay(images, drawn) == 0).double().mean((1, 2, 3))
    theirs, expected = Recorded(), torch.zeros(COUNT, dtype=torch.float64)
    table = theirs._AUGMENTATION_SPACE
    theirs._AUGMENTATION_SPACE = {NAMES[o.name]: table[NAMES[o.name]] for o in geometric}
    torch.manual_seed(0)
    for i in range(COUNT):
        expected[i] = (theirs(images[i]) == 0).double().mean()
    error = (shares.var() / COUNT + expected.var() / COUNT) ** 0.5
    assert abs(shares.mean() - expected.mean()) < 4 * error


@pytest.mark.parametrize("made", [OLAAugment, UniformAugment])
def test_no_translation_leaves_nothing_of_a_large_image(made):
    space = made().space
    names = [o.name for o in space.operations]
    for side, most in ((16, 16), (32, 32), (33, 32), (224, 32), (512, 32)):
        for name in ("translate_x", "translate_y"):
            assert space.magnitudes(side, side)[names.index(name)].max() == most
    wide = space.magnitudes(224, 224)[names.index("cutout")].max()
    assert wide == int(0.6 * 224)


def test_floats_are_solarized_where_bytes_are():
    """Between two levels, too: most of the thresholds are no whole ones."""
    KERNELS["float32"].wait()
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 1, 1, 1)
    thresholds = TrivialAugment().space.magnitudes(16, 16)[list(NAMES).index("solarize")]
    for threshold in [*thresholds.tolist(), 255.5, 0.3]:
        space = SearchSpace((Operation("solarize", threshold, threshold),), 2)
        actions = UniformPolicy(space, 1, keep_prob=1.0).sample(2)
        expected = torch.where(levels >= threshold, 255 - levels, levels)
        assert torch.equal(apply_actions(levels, space, actions), expected)
        for dtype in (torch.float32, torch.float64):  # the compiled loop, the batched kernels
            floats = apply_actions(levels.to(dtype) / 255, space, actions)
            assert ((floats * 255).round() == expected).all(), threshold
