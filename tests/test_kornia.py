"""kornia's augmentations as operations, our transforms in kornia's containers."""

import copy
import pickle

import kornia.augmentation as K
import pytest
import torch
from images import crops
from kornia.augmentation.auto import operations as wrappers
from kornia.augmentation.auto.rand_augment import ops as makers
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
from pillow_reference import one_operation

from ola_augment import (
    GARUpdater,
    OLAAugment,
    PolicyTransform,
    RandAugmentPolicy,
    SearchSpace,
    UniformPolicy,
    load_policy,
    save_policy,
)
from ola_augment.integrations.kornia.draws import Draws
from ola_augment.integrations.kornia.kernels import seeds_of
from ola_augment.kornia import operation, search_space
from ola_augment.operations import apply_actions

SPACE = search_space()
FLOATS = crops(12, 24, 40) / 255


def always(*operations, num_ops=1):
    return PolicyTransform(UniformPolicy(SearchSpace(operations), num_ops, 1.0))


def lone_seed():
    """torch's global generator, as someone else would see it."""
    return torch.random.get_rng_state()


NEEDS = {
    "RandomRotation": {"degrees": 30.0},
    "RandomAffine": {"degrees": 30.0, "translate": (0.1, 0.1), "shear": 10.0},
    "RandomShear": {"shear": 10.0},
    "RandomTranslate": {"translate_x": (0.1, 0.2), "translate_y": (0.1, 0.2)},
    "RandomMotionBlur": {"kernel_size": (3, 9), "angle": 35.0, "direction": 0.5},
    "RandomGaussianBlur": {"kernel_size": (3, 3), "sigma": (0.1, 2.0)},
    "RandomRotation90": {"times": (-1, 1)},
    "RandomCrop": {"size": (24, 40), "padding": 4},
    "RandomResizedCrop": {"size": (24, 40)},
    "RandomRain": {"drop_height": (1, 3), "drop_width": (1, 3), "number_of_drops": (3, 5)},
    "RandomFisheye": {
        "center_x": torch.tensor([-0.3, 0.3]),
        "center_y": torch.tensor([-0.3, 0.3]),
        "gamma": torch.tensor([0.9, 1.1]),
    },
}
#: RandomDissolving needs another package, and mixes and volumes are refused.
NAMES = [
    name
    for name in K.__all__
    if name.startswith("Random")
    and name != "RandomDissolving"
    and issubclass(getattr(K, name), K.AugmentationBase2D)
]


@pytest.mark.parametrize("name", NAMES)
def test_every_augmentation_is_replayed_and_does_not_depend_on_its_batch(name):
    augment = always(operation(getattr(K, name)(**NEEDS.get(name, {}))))
    images = FLOATS[:5]
    before, state = images.clone(), lone_seed()
    augment.generator = torch.Generator().manual_seed(3)
    out, actions = augment.augment(images)
    assert torch.equal(lone_seed(), state)
    assert torch.equal(images, before)
    torch.rand(7)  # someone else draws in between
    assert torch.equal(augment.replay(images, actions), out)
    for i in range(5):
        alone = augment.replay(images[i], actions.select(i))
        torch.testing.assert_close(alone, out[i], atol=1e-5, rtol=0)


def test_images_draw_for_themselves():
    augment = always(
        operation(K.RandomErasing(scale=(0.1, 0.4))), operation(K.RandomRotation(90.0))
    )
    out, _ = augment.augment(FLOATS[:1].expand(16, 3, 24, 40))
    assert len(torch.unique(out.flatten(1), dim=0)) == 16


def test_uint8_images_go_through_floats():
    images = crops(6, 24, 40)
    space = SearchSpace(
        (
            operation(K.RandomInvert()),
            operation(K.RandomBrightness((0, 2)), 0, 2, parameter="brightness_factor"),
        )
    )
    assert torch.equal(apply_actions(images, space, one_operation(6, 0, 0)), 255 - images)
    assert torch.equal(apply_actions(images, space, one_operation(6, 1, 15)), images)
    assert (apply_actions(images, space, one_operation(6, 1, 30)) == 255).all()


def test_the_magnitude_is_the_parameter():
    angles = [operation(K.RandomRotation(1.0), 0, 90, parameter="degrees", signed=True)]
    space = SearchSpace(angles, 7)
    for k in range(7):
        for sign in (1, -1):
            augmentation = K.RandomRotation((sign * 15.0 * k, sign * 15.0 * k), p=1.0)
            result = apply_actions(FLOATS, space, one_operation(12, 0, k, sign))
            torch.testing.assert_close(result, augmentation(FLOATS).clamp(0, 1))
    both = SearchSpace((operation(K.RandomAffine(0.0), 1, 2, parameter="scale"),))
    zoomed = K.RandomAffine(0.0, scale=(2.0, 2.0), p=1.0)(FLOATS)
    result = apply_actions(FLOATS, both, one_operation(12, 0, 30))
    torch.testing.assert_close(result, zoomed.clamp(0, 1))


def test_a_function_of_the_magnitude_gives_any_other_argument():
    def blur(magnitude):
        return K.RandomBoxBlur((2 * int(magnitude) + 1,) * 2)

    def noise(magnitude):
        return K.RandomGaussianNoise(std=magnitude)

    space = SearchSpace((operation(blur, 0, 3, integer=True), operation(noise, 0, 0.3)), 4)
    assert [o.name for o in space.operations] == ["RandomBoxBlur", "RandomGaussianNoise"]
    assert [o.random for o in space.operations] == [False, True]
    mixed = one_operation(12, 0, 0)._replace(magnitude_bins=torch.arange(12)[:, None] % 4)
    result = apply_actions(FLOATS, space, mixed)
    for k in range(4):
        torch.testing.assert_close(result[k::4], blur(k)(FLOATS[k::4], params={}))
    noisy = mixed._replace(ops=torch.ones_like(mixed.ops))
    difference = apply_actions(FLOATS, space, noisy) - FLOATS
    assert torch.equal(difference[::4], torch.zeros_like(difference[::4]))
    assert difference[3::4].std() > 2 * difference[1::4].std() > 0


def thresholds(centers):
    """What kornia draws for images whose actions recorded these centers."""
    with Draws(seeds_of(centers, len(centers))):
        shape = (len(centers), 3, 24, 40)
        return K.RandomSolarize(0.5, (0.0, 0.43)).generate_parameters(shape)["thresholds"]


@pytest.mark.parametrize("entry", default_policy, ids=lambda entry: entry[0][0])
def test_the_search_space_computes_what_kornias_own_wrappers_do(entry):
    ((name, low, high),) = entry
    op = [o.name for o in SPACE.operations].index(name)
    wrapper = getattr(makers, name)(low, high)
    assert isinstance(wrapper, wrappers.OperationBase)
    signed = low == -high and low != 0
    assert SPACE.operations[op].signed == signed
    for k in (1, 10, 15, 30):
        actions = one_operation(12, op, k)
        result = apply_actions(FLOATS, SPACE, actions)
        params = wrapper.op.forward_parameters(FLOATS.shape)
        if wrapper._factor_name is not None:
            start, end = wrapper.magnitude_range
            share = 1 - k / 30 if name == "posterize" else k / 30
            magnitude = torch.full((12,), start + (end - start) * share)
            magnitude *= {"translate_x": 40, "translate_y": 24}.get(name, 1)
            mapped = getattr(wrapper._magnitude_fn, "fn", wrapper._magnitude_fn)
            params[wrapper._factor_name] = mapped(magnitude)
        if name == "solarize_add":  # its threshold is random: what the actions record
            params["thresholds"] = thresholds(actions.centers[:, 0])
        expected = wrapper.op(FLOATS, params=params)
        torch.testing.assert_close(result, expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_every_operation_of_kornias_policy_is_there():
    assert {entry[0][0] for entry in default_policy} == {o.name for o in SPACE.operations} - {
        "identity"
    }
    assert search_space(5).num_magnitude_bins == 5


def test_it_is_learned_saved_copied_and_pickled_like_any_other(tmp_path):
    augment = OLAAugment(SPACE, generator=torch.Generator().manual_seed(0))
    twins = copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))
    out, actions = augment.augment(FLOATS)
    assert all(torch.equal(twin.replay(FLOATS, actions), out) for twin in twins)
    updater = GARUpdater(augment.policy, lr=0.1)
    updater.step(actions, torch.linspace(-1, 1, 12))
    assert augment.policy.keep_logits.abs().sum() > 0
    save_policy(augment.policy, tmp_path / "policy.json")
    loaded = load_policy(tmp_path / "policy.json", SPACE)
    assert torch.equal(loaded.keep_logits, augment.policy.keep_logits)
    images = FLOATS[:2].clone().requires_grad_()
    augment.replay(images, actions.select([0, 1])).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((K.RandomMixUpV2(),), {}, TypeError, "single images"),
        ((K.RandomRotation3D(30.0),), {}, TypeError, "single images"),
        ((K.ImageSequential(K.RandomInvert()),), {}, TypeError, "ImageSequential"),
        (("blur",), {}, TypeError, "got str"),
        ((K.RandomInvert,), {}, TypeError, "got the class RandomInvert"),
        ((lambda m: K.RandomInvert(p=m), 0, 1), {}, ValueError, "changes nothing.*than p"),
        ((lambda m: K.RandomErasing(), 0.02, 0.3), {}, ValueError, "changes nothing"),
        ((lambda m: torch.nn.Identity(), 0, 1), {}, TypeError, r"augmentation\(0\) must be"),
        ((K.RandomRotation(30.0), 0, 30), {}, ValueError, "together with parameter"),
        ((K.RandomRotation(30.0),), {"parameter": "degrees"}, ValueError, "together with"),
        ((lambda m: K.RandomInvert(),), {}, ValueError, "together with"),
        ((K.RandomRotation(30.0), 0, 30), {"parameter": "angle"}, ValueError, r"\['degrees'\]"),
        ((K.RandomRotation(30.0), None, 30), {}, ValueError, "both low and"),
        ((K.RandomRotation(30.0), 0, None), {"parameter": "degrees"}, ValueError, "both low and"),
        ((K.RandomRotation(30.0), 0, "1"), {"parameter": "degrees"}, TypeError, "must be a number"),
        (
            (K.RandomSaltAndPepperNoise(), 0.01, 0.5),
            {"parameter": "amount_factor"},
            ValueError,
            "changes nothing.*pass a function",
        ),
    ],
)
def test_what_is_no_operation_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        operation(*arguments, **options)


@pytest.mark.parametrize("kind", [K.LongestMaxSize, K.SmallestMaxSize])
def test_what_changes_the_size_is_refused_when_it_does(kind):
    # Tried on 32 x 40, the longest side changes and the smallest does not.
    augment = PolicyTransform(RandAugmentPolicy(SearchSpace((operation(kind(32)),)), 1))
    assert augment(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match=f"{kind.__name__}' must return the shape"):
        augment(torch.rand(2, 3, 48, 48))
