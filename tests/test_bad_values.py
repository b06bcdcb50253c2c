"""What must never reach a kernel is refused at the border, by name."""

import json
import math
import re

import numpy as np
import pytest
import torch
from images import crops
from PIL import Image
from pillow_reference import draw, one_operation
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode

from ola_augment import (
    GARUpdater,
    NSLRUpdater,
    OLAAugment,
    OLAPolicy,
    Operation,
    Policy,
    PolicyTransform,
    RandAugmentPolicy,
    SearchSpace,
    UniformPolicy,
    load_policy,
    save_policy,
)
from ola_augment.actions import check_actions
from ola_augment.operations import apply_actions, apply_geometry_to_masks, transform_points
from ola_augment.policy import LogProbs

SPACE = SearchSpace.wide_long()
IMAGES = crops(4, 8, 8)


def drawn(slots=3):
    return OLAPolicy(SPACE, slots).sample(4, torch.Generator().manual_seed(3))


def changed(field, where, value, dtype=None):
    """Actions that were right but for one entry."""
    actions = drawn()
    tensor = getattr(actions, field).clone()
    tensor[where] = value
    return actions._replace(**{field: tensor if dtype is None else tensor.to(dtype)})


def used(value):
    """The fourth example uses that many slots; the others all."""
    actions = drawn()._replace(num_ops=torch.tensor([3, 3, 3, value]), keep=torch.zeros(4, 3) > 0)
    ops = torch.arange(12).view(4, 3) % 5
    ops[3, max(value, 0) :] = -1
    return actions._replace(ops=ops, magnitude_bins=torch.zeros(4, 3, dtype=torch.int64))


FORGED = {
    "centre NaN": (changed("centers", (0, 0, 0), math.nan), "centers"),
    "centre infinite": (changed("centers", (0, 0, 1), math.inf), "centers"),
    "centre huge": (changed("centers", (0, 0, 0), -1e9), "centers"),
    "centre 1": (changed("centers", (3, 2, 1), 1.0), "centers"),
    "centres in double precision": (changed("centers", 0, 0.5, torch.float64), "centers"),
    "operation beyond the space": (changed("ops", (0, 0), len(SPACE)), "ops"),
    "operation -2": (changed("ops", (1, 0), -2), "ops"),
    "no operation in a used slot": (changed("ops", (1, 0), -1), "ops"),
    "bin beyond the space": (changed("magnitude_bins", (2, 1), 31), "magnitude_bins"),
    "bin -1": (changed("magnitude_bins", (2, 1), -1), "magnitude_bins"),
    "bin huge": (changed("magnitude_bins", (2, 1), 2**62), "magnitude_bins"),
    "keep in an unused slot": (
        used(1)._replace(keep=torch.tensor([[False] * 3] * 3 + [[False, False, True]])),
        "keep",
    ),
    "an operation in an unused slot": (used(1)._replace(ops=used(3).ops), "ops"),
    "num_ops 0": (used(0), "num_ops"),
    "num_ops -1": (used(-1), "num_ops"),
    "num_ops beyond the slots": (used(3)._replace(num_ops=torch.tensor([3, 3, 3, 4])), "num_ops"),
    "sign 0": (changed("signs", (0, 0), 0), "signs"),
    "sign 7": (changed("signs", (0, 0), 7), "signs"),
    "sign -128": (changed("signs", (0, 0), -128), "signs"),
    "log_prob NaN": (changed("log_prob", 1, math.nan), "log_prob"),
    "log_prob -inf": (changed("log_prob", 1, -math.inf), "log_prob"),
    "log_prob above 0": (changed("log_prob", 1, 3.0), "log_prob"),
    "log_prob whole": (changed("log_prob", 1, 0, torch.int64), "log_prob"),
    "keep as integers": (drawn()._replace(keep=drawn().keep.to(torch.int8)), "keep"),
    "a list": (drawn()._replace(num_ops=[1] * 4), "num_ops"),
    "another device": (drawn()._replace(ops=drawn().ops.to("meta")), "ops"),
    "no slots axis": (drawn()._replace(ops=drawn().ops[:, 0]), "ops"),
    "other slots": (drawn()._replace(signs=drawn().signs[:, :2]), "signs"),
    "two centres": (drawn()._replace(centers=torch.zeros(4, 3, 3)), "centers"),
}


def test_what_policies_draw_is_accepted_everywhere():
    for policy in (OLAPolicy(SPACE, 3), UniformPolicy(SPACE), RandAugmentPolicy(SPACE)):
        for n in (0, 1, 4):
            actions = policy.sample(n)
            PolicyTransform(policy).replay(IMAGES[:n], actions)
            policy.log_prob(actions)
            apply_geometry_to_masks(IMAGES[:n], SPACE, actions)


@pytest.mark.parametrize(
    ("field", "where", "value", "quoted"),
    [
        ("centers", (2, 1, 0), -0.25, r"-0\.25"),
        ("centers", (2, 1, 0), 1.0, r"got 1\.0"),
        ("centers", (2, 1, 0), math.nan, "nan"),
        ("log_prob", 2, 3.0, r"got 3\.0"),
        ("log_prob", 2, 2e-3, r"got 0\.00"),
        ("log_prob", 2, -math.inf, "-inf"),
        ("signs", (2, 1), 7, "got 7"),
        ("ops", (2, 1), 19, r"-1 \.\. 18 .* \.\. 19"),
        ("magnitude_bins", (2, 1), 31, r"0 \.\. 30, got 0 \.\. 31"),
        ("num_ops", 2, 4, r"1 \.\. 3, got \d \.\. 4"),
        ("num_ops", 2, 0, r"1 \.\. 3, got 0 \.\. \d"),
    ],
)
def test_refusals_quote_the_bad_value(field, where, value, quoted):
    good = drawn()
    check_actions(good._replace(log_prob=torch.full((4,), 1e-3)), SPACE)
    check_actions(good._replace(log_prob=good.log_prob.bfloat16()), SPACE)
    with pytest.raises(ValueError, match=quoted):
        check_actions(changed(field, where, value), SPACE)
    allowed = torch.full((4,), 1e-3).index_fill(0, torch.tensor([2]), 2e-3)
    with pytest.raises(ValueError, match=r"got 0\.002"):  # and not what stands before it
        check_actions(good._replace(log_prob=allowed), SPACE)
    misplaced = used(1)._replace(ops=torch.tensor([[0, 1, 2]] * 3 + [[4, -1, 7]]))
    with pytest.raises(ValueError, match=r"and only there, got \[4, -1, 7\]"):
        check_actions(misplaced, SPACE)


@pytest.mark.parametrize("name", FORGED)
def test_forged_actions_are_refused_everywhere(name):
    actions, field = FORGED[name]
    augment = OLAAugment(SPACE, max_ops=3)
    updaters = GARUpdater(augment.policy), NSLRUpdater(augment.policy)
    before = augment.policy.state_dict()
    for entry in (
        lambda: augment.replay(IMAGES, actions),
        lambda: augment.replay(IMAGES / 255, actions),
        lambda: augment.policy.log_prob(actions),
        lambda: updaters[0].step(actions, torch.tensor([1.0, -1, 2, 0])),
        lambda: updaters[1].step(actions, torch.tensor(1.0)),
        lambda: apply_actions(IMAGES, SPACE, actions),
        lambda: apply_actions(IMAGES / 255, SPACE, actions),
        lambda: apply_geometry_to_masks(IMAGES, SPACE, actions),
        lambda: transform_points(torch.zeros(4, 1, 2), SPACE, actions, 8, 8),
    ):
        with pytest.raises((ValueError, TypeError), match=f"actions.{field} must"):
            entry()
    after = augment.policy.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(updater.state_dict()["pending"] for updater in updaters)


def test_an_operation_twice_is_no_draw_without_replacement():
    for twice in ([1, 2, 1], [0, 2, 0], [3, 3, 0]):
        actions = used(3)._replace(ops=torch.tensor([[0, 1, 2]] * 3 + [twice]))
        with pytest.raises(ValueError, match="distinct"):
            OLAPolicy(SPACE, 3).log_prob(actions)
        assert RandAugmentPolicy(SPACE, 3).log_prob(actions).shape == (4,)


def test_a_policy_of_your_own_cannot_draw_anything_else():
    class Careless(UniformPolicy):
        def sample(self, n, generator=None):
            return changed("centers", (0, 0, 0), math.nan)

    with pytest.raises(ValueError, match=r"actions\.centers"):
        PolicyTransform(Careless(SPACE))(IMAGES)
    careless = UniformPolicy(SPACE)
    careless.sample = lambda n, generator=None: drawn()
    with pytest.raises(ValueError, match="hold 4 examples, the batch has 2"):
        PolicyTransform(careless)(IMAGES[:2])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :0], r"1 or more channels, got \(4, 0, 8, 8\)"),
        (IMAGES[:, :, :0], "height 0, width 8"),
        (IMAGES[..., :0], "height 8, width 0"),
        (IMAGES[0], r"shape \(B, C, H, W\)"),
        (IMAGES[:3], "actions hold 4 examples, the batch has 3"),
        (torch.cat([IMAGES, IMAGES]), "actions hold 4 examples, the batch has 8"),
        (IMAGES.short(), r"value_range=\(low, high\)"),
        (IMAGES.long(), "uint8, uint16, int16 with a value_range"),
        (IMAGES * 1.0, r"\[0, 1\]"),
        (torch.full((4, 3, 8, 8), math.nan), "NaN or infinite in 100 %"),
        (IMAGES.numpy(), "must be a tensor"),
        (torch.zeros(1, 1, 1, dtype=torch.uint8).expand(4, 1, 2**16, 2**16), "pixels"),
    ],
)
def test_apply_actions_refuses_other_images(images, message):
    with pytest.raises((ValueError, TypeError), match=message):
        apply_actions(images, SPACE, drawn())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolation": InterpolationMode.BICUBIC}, "interpolation must be NEAREST or BILINEAR"),
        ({"interpolation": InterpolationMode.LANCZOS}, "interpolation"),
        ({"interpolation": 3}, "interpolation"),
        ({"interpolation": True}, "interpolation"),
        ({"interpolation": "bicubic"}, "interpolation"),
        ({"interpolation": None}, "interpolation"),
        ({"fill": 65536}, r"fill must lie in 0 \.\. 65535"),
        ({"fill": -1}, "fill"),
        ({"fill": math.nan}, "fill"),
        ({"fill": "black"}, "fill"),
        ({"fill": [1, 2]}, "fill must hold one value or one per channel"),
        ({"fill": [1, True, 2]}, "fill"),
    ],
)
def test_apply_actions_refuses_other_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        apply_actions(IMAGES, SPACE, drawn(), **arguments)
    with pytest.raises(ValueError, match=r"fill must lie in 0 \.\. 1 for floating"):
        apply_actions(IMAGES / 255, SPACE, drawn(), fill=2)


def test_masks_and_points_of_another_kind_are_refused():
    for masks, message in (
        (IMAGES[0, 0], r"\(B, \.\.\., H, W\)"),
        (IMAGES[:2], "hold 4 examples, the batch has 2"),
        (IMAGES[:, :, :0], "height 0"),
        ([0], "must be a tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            apply_geometry_to_masks(masks, SPACE, drawn())
    for points, size, message in (
        (torch.zeros(4, 2), (8, 8), r"\(B, N, 2\)"),
        (torch.zeros(4, 1, 3), (8, 8), r"\(B, N, 2\)"),
        (torch.zeros(3, 1, 2), (8, 8), "hold 4 examples, the batch has 3"),
        (torch.zeros(4, 1, 2, dtype=torch.int64), (8, 8), "floating-point"),
        (torch.zeros(4, 1, 2), (0, 8), "height 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            transform_points(points, SPACE, drawn(), *size)


@pytest.mark.parametrize("size", [(46340, 46340), (1, 800_000_000)])
def test_pixels_are_counted_with_the_border_that_interpolation_adds(size):
    images = torch.zeros(1, dtype=torch.uint8).expand(1, 1, *size)
    with pytest.raises(ValueError, match="at most 2,147,483,647 pixels, got height"):
        apply_actions(images, SPACE, drawn().select([0]))


@pytest.mark.parametrize("last_first", [False, True])
def test_floats_of_another_scale_are_found_beside_images_of_bytes(last_first):
    images = [Image.new("RGB", (8, 8)), tv_tensors.Image(IMAGES[0].float())]
    with pytest.raises(ValueError, match=r"floating images must lie in \[0, 1\]"):
        OLAAugment()(images[::-1] if last_first else images)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_empty_pil_image_is_refused(size, mode):
    with pytest.raises(ValueError, match="pixels, got height"):
        OLAAugment()(Image.new(mode, size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "shear_x", "low": -1e308, "high": 1e308}, "accepts magnitudes"),
        ({"name": "rotate", "low": 0, "high": 1e300}, "accepts magnitudes"),
        ({"name": "sharpness", "low": 0, "high": 1e308}, "accepts magnitudes"),
        ({"name": "translate_x", "low": 0, "high": 10**400}, "high must be finite"),
        ({"name": "translate_x", "low": 0, "high": 10**30}, "accepts magnitudes"),
        ({"name": "cutout", "low": 0, "high": 2**70}, "accepts magnitudes"),
        ({"name": "mine", "low": -1e308, "high": 1e308, "kernel": abs}, "accepts magnitudes"),
        ({"name": "translate_x", "low": 0, "high": 1, "side": "width", "per": math.nan}, "per"),
        ({"name": "translate_x", "low": 0, "high": 1, "side": "width", "per": 10**400}, "per"),
        ({"name": "translate_x", "low": 0, "high": 1, "side": "width", "per": True}, "per"),
        ({"name": "translate_x", "low": 0, "high": 1, "side": "width", "per": 0.5}, "per"),
        ({"name": "posterize", "low": 8, "high": 4, "side": "width"}, "side is for magnitudes in"),
        ({"name": "rotate", "low": 0, "high": 4, "side": "height"}, "side is for magnitudes in"),
        ({"name": "invert", "side": "height"}, "side is for magnitudes in"),
        ({"name": ["rotate"], "low": 0, "high": 1}, "name"),
        ({"name": "rotate", "low": "0", "high": 1}, "low must be a number"),
        ({"name": "rotate", "low": [0], "high": 1}, "low must be a number"),
        ({"name": "rotate", "low": False, "high": 1}, "low must be a number"),
        ({"name": "rotate", "low": 0, "high": 1, "integer": []}, "integer must be a bool"),
        ({"name": "rotate", "low": 0, "high": 1, "signed": 1}, "signed must be a bool"),
        ({"name": "mine", "kernel": {}.get}, ""),  # hashable: the one that is accepted
        ({"name": "mine", "kernel": type("K", (), {"__call__": abs, "__hash__": None})()}, "hash"),
        ({"name": "mine", "matrix": type("M", (), {"__call__": abs, "__hash__": None})()}, "hash"),
        ({"name": "mine", "matrix": 3}, "matrix .* callable"),
    ],
)
def test_operations_refuse_what_would_fail_later(arguments, message):
    if not message:
        assert hash(Operation(**arguments))
        return
    with pytest.raises((ValueError, TypeError), match=message):
        Operation(**arguments)


def test_numpy_numbers_are_plain_numbers():
    operation = Operation("rotate", np.float32(0.5), np.int64(30), per=np.int32(32))
    assert [type(v) for v in (operation.low, operation.high, operation.per)] == [float, int, int]
    assert operation == Operation("rotate", 0.5, 30)


@pytest.mark.parametrize(
    ("operation", "side"),
    [
        (Operation("cutout", 8, 0, integer=True, side="width"), 64),
        (Operation("translate_x", 0, 1e6, signed=True, side="width"), 33),
        (Operation("mine", 0, 1e30, side="width", per=1, kernel=lambda x, m: x), 2),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_magnitudes_that_outgrow_their_domain_are_refused_at_that_size(operation, side):
    space = SearchSpace((operation,))
    low, high = operation.domain
    message = rf"{operation.name}.*\[{re.escape(f'{low:g}, {high:g}')}\], for images of 2 x {side}"
    images = torch.zeros(1, 1, 2, side, dtype=torch.uint8)
    for given in (images, images / 255):
        apply_actions(given[..., :1], space, one_operation(1, 0, 30))
        with pytest.raises(ValueError, match=message):
            apply_actions(given, space, one_operation(1, 0, 30))


def test_spaces_refuse_what_would_fail_later():
    for bins in (10**12, 10**400, math.nan, True):
        with pytest.raises((ValueError, TypeError), match="num_magnitude_bins"):
            SearchSpace.wide_long(bins)
    with pytest.raises(TypeError, match="name of a space"):
        SearchSpace((Operation("invert"),), name=["mine"])
    with pytest.raises(ValueError, match="magnitude_bin"):
        Operation("rotate", 0, 1).magnitude(31, 31, 8, 8)
    with pytest.raises(ValueError, match="magnitude_bin"):
        Operation("rotate", 0, 1).magnitude(0, 1, 8, 8)
    with pytest.raises(ValueError, match="height and width"):
        SPACE.magnitudes(0, 8)
    with pytest.raises(ValueError, match=r"1 \.\. 1000"):
        RandAugmentPolicy(SPACE, 10**9)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("space", "operations", 3, "high"), 1e308),
        (("space", "operations", 10, "low"), -1e308),
        (("space", "operations", 12, "per"), math.nan),
        (("space", "operations", 3, "high"), 10**400),
        (("space", "operations", 6, "side"), "width"),
        (("space", "operations", 0, "name"), ["identity"]),
        (("space", "operations", 0, "integer"), []),
        (("space", "operations"), {}),
        (("space", "name"), ["wide_long"]),
        (("space", "num_magnitude_bins"), 10**12),
        (("space",), 3),
        (("logits", "keep_logits"), [[0.0], 0.0]),
        (("logits", "keep_logits"), [10**400] * 19),
    ],
    ids=lambda value: str(value)[:40],
)
def test_policy_files_refuse_the_same(tmp_path, path, value):
    file = tmp_path / "policy.json"
    save_policy(OLAPolicy(SPACE), file)
    content = json.loads(file.read_text())
    *outer, last = path
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"policy\.json"):
        load_policy(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"policy\.json"):
        load_policy(file)


class Tables(Policy):
    """A user's own policy over tables that are given."""

    def __init__(self, **tables):
        super().__init__(SPACE, 2)
        uniform = UniformPolicy(SPACE, 2).log_probs()
        self.tables = uniform._replace(**tables)

    def arguments(self):
        return {}

    def log_probs(self):
        return self.tables


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"num_ops": torch.full((9,), -math.log(9))},
            r"num_ops must have shape \(2,\), got \(9,\)",
        ),
        ({"num_ops": torch.tensor(0.0)}, "num_ops must have shape"),
        ({"keep": torch.full((3,), -0.7)}, "keep must have shape"),
        ({"drop": torch.full((19, 1), -0.7)}, "drop must have shape"),
        ({"magnitude": torch.full((19, 99), -math.log(99))}, "magnitude must have shape"),
        ({"magnitude": torch.full((4, 31), -math.log(31))}, "magnitude must have shape"),
        ({"keep": [0.5] * 19}, "keep must be a floating-point tensor"),
        ({"keep": torch.zeros(19, dtype=torch.int64)}, "keep must be a floating-point tensor"),
    ],
)
def test_tables_of_another_shape_are_refused(tables, message):
    policy = Tables(**tables)
    for entry in (
        lambda: policy.sample(3),
        lambda: PolicyTransform(policy)(IMAGES),
        lambda: policy.log_prob(drawn(2)),
        policy.entropy,
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            entry()


@pytest.mark.parametrize(
    "tables",
    [
        {"num_ops": torch.full((2,), math.nan)},
        {"num_ops": torch.full((2,), -math.inf)},
        {"num_ops": torch.zeros(2)},
        {"keep": torch.full((19,), math.nan)},
        {"keep": torch.full((19,), 3.0)},
        {"magnitude": torch.full((19, 31), -math.inf)},
        {"magnitude": torch.zeros(19, 31)},
        {"keep": torch.full((19,), -math.inf), "drop": torch.full((19,), -math.inf)},
        {"keep": torch.zeros(19).double(), "drop": torch.full((19,), 0.5).double().log()},
    ],
)
def test_tables_that_are_no_probabilities_are_refused(tables):
    with pytest.raises(ValueError, match=f"{next(iter(tables))} of Tables must be log-prob"):
        PolicyTransform(Tables(**tables))(IMAGES)


def test_logits_that_are_not_finite_or_of_another_shape_are_refused():
    policy = OLAPolicy(SPACE)
    with torch.no_grad():
        policy.magnitude_logits[3] = math.nan
    with pytest.raises(ValueError, match=r"magnitude of OLAPolicy.*are the logits finite"):
        policy.sample(2)
    policy = OLAPolicy(SPACE)
    policy.num_ops_logits = nn.Parameter(torch.zeros(9))
    with pytest.raises(ValueError, match="num_ops must have shape"):
        policy.sample(2)


def test_log_probs_are_log_probs():
    policy = Tables()
    policy.tables = tuple(policy.tables)
    with pytest.raises(TypeError, match="must return LogProbs"):
        policy.sample(1)
    assert isinstance(Tables().tables, LogProbs)


def test_what_others_were_built_on_cannot_be_changed():
    for made, names in (
        (OLAPolicy(SPACE), ("space", "max_ops", "replacement")),
        (UniformPolicy(SPACE), ("space", "max_ops", "replacement", "keep_prob")),
        (RandAugmentPolicy(SPACE), ("space", "max_ops", "replacement", "magnitude")),
        (OLAAugment(SPACE), ("space", "fill", "interpolation")),
    ):
        for name in names:
            before = getattr(made, name)
            with pytest.raises(AttributeError, match=name):
                setattr(made, name, 7)
            with pytest.raises(AttributeError, match=name):
                delattr(made, name)
            assert getattr(made, name) is before
        assert type(made)(SPACE).__dict__.keys() == made.__dict__.keys()


def test_a_sharpness_that_reaches_its_end_stays_a_number():
    space = SearchSpace((Operation("sharpness", 0, 1e6), Operation("contrast", 0, 1e6)))
    for op in (0, 1):
        for images in (IMAGES, IMAGES / 255, (IMAGES / 255).half()):
            result = apply_actions(images, space, one_operation(4, op, 30))
            assert result.double().isfinite().all()


def test_draws_of_the_tests_are_valid():
    apply_actions(IMAGES, SPACE, draw(SPACE, 4, 3, keep_prob=0.5))
