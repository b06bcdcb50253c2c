"""The kit of property tests finds what is broken, and nothing where nothing is."""

import pytest
import torch
import torchvision
from hypothesis import given, settings

from ola_augment import OLAAugment, PolicyTransform, RandAugment, UniformPolicy
from ola_augment.actions import check_actions
from ola_augment.files import describe_policy
from ola_augment.kernels.table import TABLE
from ola_augment.operations import apply_actions
from ola_augment.testing import (
    CHECKS,
    LAYOUTS,
    actions,
    check_transform,
    images,
    policies,
    spaces,
)


def invert(x):
    return 255 - x if x.dtype == torch.uint8 else 1 - x


class Drawn:
    """A right transform of one's own: a random level for each image, which it remembers."""

    def __call__(self, x):
        self.levels = torch.rand(x.shape[0] if x.ndim == 4 else 1)
        return self.replay(x, None)

    def replay(self, x, index):
        levels = (self.levels if index is None else self.levels[index]).view(-1, 1, 1, 1)
        levels = levels if x.ndim == 4 else levels[0]
        top = 255 if x.dtype == torch.uint8 else 1
        return (x * (1 - levels) + top * levels).to(x.dtype)


def in_place(x):
    return x.zero_() if x.is_contiguous() and x.numel() else x.clone()


def by_memory(x):
    return x.clone() if x.is_contiguous() else x.contiguous() // 2


def by_batch(x):
    return x + (1 if x.ndim == 4 and len(x) > 1 else 0)


def unseeded(x, count=[0]):  # noqa: B006 - it shall remember
    count[0] += 1
    return x + count[0]


#: check -> a transform that breaks it, and the arguments that it takes.
BROKEN = {
    "shape": (lambda x: x[..., :1, :], {}),
    "dtype": (lambda x: x.double(), {}),
    "range": (lambda x: x * 3, {}),
    "input": (in_place, {}),
    "seed": (unseeded, {}),
    "layout": (by_memory, {}),
    "replay": (Drawn(), {"replay": lambda x, index: x * 0}),
    "batch": (by_batch, {}),
    "neutral": (invert, {"neutral": invert}),
    "reference": (invert, {"reference": lambda x: x}),
    "empty": (lambda x: x.clone() if x.numel() else x.flatten(), {}),
    "effect": (torch.clone, {}),
    "signs": (lambda x: x.roll(1, -1), {}),
}


def test_every_check_has_a_transform_that_fails_it():
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_broken_is_found_and_named(name):
    transform, arguments = BROKEN[name]
    with pytest.raises(AssertionError, match=rf"^\d+ of \d+ checks failed\n(.*\n)*{name}: \("):
        check_transform(transform, max_examples=20, **arguments)
    with pytest.raises(AssertionError, match=rf"^1 of 1 checks failed\n{name}: \("):
        check_transform(transform, checks=[name], max_examples=20, **arguments)


def test_the_smallest_image_is_reported():
    def breaks(x):
        if x.shape[-1] > 5:
            raise RuntimeError("too wide\nfor this")
        return x.clone()

    message = r"\nseed: \(1, 1, 6\) uint8: RuntimeError: too wide$"
    with pytest.raises(AssertionError, match=message):
        check_transform(breaks, checks=["seed"])


def test_what_is_right_passes():
    check_transform(invert, reference=invert, neutral=lambda x: x.clone())
    drawn = Drawn()
    check_transform(drawn, replay=drawn.replay)
    check_transform(OLAAugment(), max_examples=10)
    generator = torch.Generator()
    check_transform(RandAugment(generator=generator), max_examples=10)


def own_flip(x, generator=torch.Generator()):  # noqa: B008 - it shall remember
    return x.flip(-1) if torch.rand(1, generator=generator) < 0.5 else x.clone()


def test_what_differs_now_and_then_is_one_failure_of_several():
    kept = images(dtypes=[torch.uint8], batch=False, sides=(8, 9))
    message = r"^2 of 2 checks failed\nseed: \(\d, \d, \d\) uint8.*: the second call .* differs by"
    with pytest.raises(AssertionError, match=message) as caught:
        check_transform(
            own_flip, checks=["seed", "reference"], reference=torch.zeros_like, images=kept
        )
    assert "tensor(" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_the_tolerance_is_in_grey_levels_of_255(dtype):
    top = {torch.uint8: 255, torch.uint16: 65535, torch.int16: 32767}.get(dtype, 1)

    def brighter(x, by):
        levels = x.double().clamp(max=top * 0.9) + by * top / 255
        return (levels if dtype.is_floating_point else levels.floor()).to(dtype)

    for tolerance, passes in ((3.1, True), (2.9, False)):
        arguments = {
            "reference": lambda x: brighter(x, 3),
            "checks": ["reference"],
            "tolerance": tolerance,
            "images": images(dtypes=[dtype]),
            "max_examples": 10,
        }
        if passes:
            check_transform(lambda x: brighter(x, 0), **arguments)
        else:
            with pytest.raises(AssertionError, match="differs by 3 grey levels"):
                check_transform(lambda x: brighter(x, 0), **arguments)


def test_an_error_on_the_empty_batch_hides_no_wrong_numbers():
    def breaks(x):
        return x.reshape(len(x), -1).argmax(-1) if not x.numel() else x + 1

    message = r"\nempty: \(.*\) \w+.*: (IndexError|RuntimeError).*(.*\n)*reference: \(.*differs by"
    with pytest.raises(AssertionError, match=message):
        check_transform(breaks, reference=torch.clone, images=images(batch=True), max_examples=20)


def test_what_writes_into_its_input_is_compared_with_what_it_was():
    def invert_in_place(x):
        return x.copy_(invert(x))

    batches = images(layouts=["contiguous", "transposed", "channels last"], batch=True)
    found = {"input", "neutral"}
    for name in CHECKS:
        arguments = {"neutral": torch.Tensor.zero_, "reference": invert, "images": batches}
        if name == "replay":
            arguments["replay"] = lambda x, _: invert(x)
        if name in found:
            with pytest.raises(AssertionError, match=name):
                check_transform(invert_in_place, checks=[name], max_examples=20, **arguments)
        else:
            check_transform(invert_in_place, checks=[name], max_examples=20, **arguments)
    with pytest.raises(AssertionError, match=r"neutral: .*writes to its input"):
        check_transform(invert, checks=["neutral"], neutral=zero_later, max_examples=3)


def zero_later(x):
    result = x.clone()
    x.zero_()
    return result


class Turn:
    """A rotation whose angle has one sign, or both."""

    def __init__(self, low):
        self.low = low

    def __call__(self, x):
        angle = self.low + (30 - self.low) * float(torch.rand(1))
        return torchvision.transforms.v2.functional.rotate(x, angle)


def test_a_draw_that_goes_one_way_is_found():
    kept = images(dtypes=[torch.uint8, torch.float32], sides=(12, 16), layouts=["contiguous"])
    check_transform(Turn(-30), checks=["signs", "effect"], images=kept)
    with pytest.raises(AssertionError, match=r"signs: .*goes one way only: left and right"):
        check_transform(Turn(0), checks=["signs", "effect"], images=kept)


def test_what_moves_little_is_looked_at_where_it_moves_something():
    class Shear:
        def __call__(self, x):
            angle = 40 * float(torch.rand(1)) - 20
            return torchvision.transforms.v2.functional.affine(x, 0, [0, 0], 1, [angle, 0])

    narrow = images(dtypes=[torch.uint8], sides=(3, 40), layouts=["contiguous"])
    check_transform(Shear(), checks=["signs", "effect"], images=narrow)


def test_another_device_is_found():
    with pytest.raises(AssertionError, match=r"dtype: .*lies on meta, not cpu"):
        check_transform(lambda x: x.to("meta"), checks=["shape", "dtype"], max_examples=3)


def test_a_transform_of_ours_that_is_broken_is_found():
    class Broken(PolicyTransform):
        def replay(self, images, actions):
            return super().replay(images, actions).roll(1, -1)

    with pytest.raises(AssertionError, match=r"replay: .*\nbatch: .*\nneutral: "):
        check_transform(Broken(UniformPolicy()), images=images(sides=(8, 9)), max_examples=20)


def test_unknown_and_impossible_checks_are_refused():
    with pytest.raises(ValueError, match="unknown check 'shapes'; known are shape, dtype"):
        check_transform(invert, checks=["shapes"])
    with pytest.raises(ValueError, match="check 'reference' needs the argument reference"):
        check_transform(invert, checks=["shape", "reference"])


def seen(strategy, count=200):
    """What a strategy draws."""
    values = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(strategy)
    def collect(value):
        values.append(value)

    collect()
    return values


def test_images_reach_every_layout_dtype_and_degenerate_size():
    drawn = seen(images())
    assert {x.dtype for x in drawn} == {torch.uint8, torch.float32, torch.float64}
    assert {x.ndim for x in drawn} == {3, 4}
    assert {1, 3} == {x.shape[-3] for x in drawn}
    assert {0, 1, 4} <= {len(x) for x in drawn if x.ndim == 4}
    assert any(x.shape[-2:] == (1, 1) for x in drawn)
    assert any(x.shape[-2] == 1 < 20 < x.shape[-1] for x in drawn)
    assert sum(not x.is_contiguous() for x in drawn) > 50
    floats = [x for x in drawn if x.is_floating_point() and x.numel()]
    assert all(x.min() >= 0 and x.max() <= 1 for x in floats)
    assert any((x * 255 - (x * 255).round()).abs().max() > 0.1 for x in floats)
    few = seen(images(dtypes=[torch.bfloat16], channels=[2], batch=True, max_batch=1, sides=(7, 8)))
    assert {x.dtype for x in few} == {torch.bfloat16}
    assert {x.shape[1:] for x in few} == {(2, a, b) for a in (7, 8) for b in (7, 8)}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7)])
def test_layouts_keep_values(name, shape):
    x = torch.rand(shape)
    assert torch.equal(LAYOUTS[name](x), x)
    assert LAYOUTS[name](x).is_contiguous() == (name in ("contiguous", "a view on zeros"))


def test_spaces_reach_every_operation_and_are_valid_at_every_size():
    drawn = seen(spaces())
    assert {o.name for space in drawn for o in space.operations} == set(TABLE)
    assert any(o.side for space in drawn for o in space.operations)
    for space in drawn:
        for size in ((1, 1), (224, 33)):
            space.magnitudes(*size)


@settings(deadline=None, derandomize=True)
@given(spaces().flatmap(lambda space: actions(space).map(lambda drawn: (space, drawn))))
def test_actions_are_valid(pair):
    check_actions(pair[1], pair[0])


def test_actions_reach_what_is_rare():
    (space,) = seen(spaces(names=["cutout", "rotate", "invert"]), 1)
    drawn = [a for a in seen(actions(space)) if len(a.ops)]
    assert any(not a.keep.any() for a in drawn)
    assert any((a.centers == 1 - 2**-24).any() for a in drawn)
    assert any((a.num_ops < a.ops.shape[1]).any() for a in drawn) or len(space) == 1
    assert {a.batch_size for a in seen(actions(space, batch_size=7), 5)} == {7}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(policies())
def test_policies_draw_what_can_be_applied_and_scored(policy):
    drawn = policy.sample(3, torch.Generator().manual_seed(0))
    assert torch.allclose(policy.log_prob(drawn).detach(), drawn.log_prob.float(), atol=1e-4)
    apply_actions(torch.zeros(3, 1, 9, 8, dtype=torch.uint8), policy.space, drawn)
    assert describe_policy(policy)
