"""Search spaces against the table they implement."""

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ola_augment import Operation, SearchSpace
from ola_augment.space import named_space

SHARED = [
    *("identity", "auto_contrast", "equalize", "rotate", "solarize", "color", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
]
SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def bins_of(space, name, height=32, width=32):
    index = [operation.name for operation in space.operations].index(name)
    return space.magnitudes(height, width)[index].tolist()


def test_operations_and_their_order():
    assert [op.name for op in SearchSpace.rand_augment().operations] == SHARED
    wide = [op.name for op in SearchSpace.wide_long().operations]
    assert wide == [*SHARED, "blur", "invert", "flip_lr", "flip_ud", "cutout"]
    for space in (SearchSpace.rand_augment(), SearchSpace.wide_long()):
        assert {op.name for op in space.operations if op.signed} == SIGNED


@pytest.mark.parametrize(
    ("name", "rand_augment", "wide_long"),
    [
        ("rotate", lambda k: int(k * 30 / 30), lambda k: int(k * 135 / 30)),
        ("solarize", lambda k: 256 - int(k * 256 / 30), lambda k: 256 - int(k * 256 / 30)),
        ("color", lambda k: 0.1 + (1.9 - 0.1) * k / 30, lambda k: 0.01 + (2.0 - 0.01) * k / 30),
        ("contrast", lambda k: 0.1 + (1.9 - 0.1) * k / 30, lambda k: 0.01 + (2.0 - 0.01) * k / 30),
        ("sharpness", lambda k: 0.1 + (1.9 - 0.1) * k / 30, lambda k: 0.01 + 1.99 * k / 30),
        ("posterize", lambda k: 8 - int(k * 4 / 30), lambda k: 8 - int(k * 6 / 30)),
        ("shear_x", lambda k: 0.3 * k / 30, lambda k: 0.99 * k / 30),
        ("shear_y", lambda k: 0.3 * k / 30, lambda k: 0.99 * k / 30),
        ("translate_x", lambda k: int(k * 10 / 30), lambda k: int(k * 32 / 30)),
        ("translate_y", lambda k: int(k * 10 / 30), lambda k: int(k * 32 / 30)),
    ],
)
def test_magnitudes_are_those_of_the_table(name, rand_augment, wide_long):
    assert bins_of(SearchSpace.rand_augment(), name) == [rand_augment(k) for k in range(31)]
    assert bins_of(SearchSpace.wide_long(), name) == [wide_long(k) for k in range(31)]


def test_cutout_reaches_19_pixels_at_32():
    cutout = bins_of(SearchSpace.wide_long(), "cutout")
    assert (cutout[0], cutout[-1]) == (0, 19)
    assert bins_of(SearchSpace.wide_long(), "cutout", 10, 100)[-1] == 60


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (48, 75), (150, 30), (1, 1)])
def test_pixels_follow_their_side_exactly(height, width):
    for space, largest in ((SearchSpace.rand_augment(), 10), (SearchSpace.wide_long(), 32)):
        for name, side in (("translate_x", width), ("translate_y", height)):
            grown = min(side, 32) if largest == 32 else side  # WideLong's: at most 32 pixels
            exact = [int(Fraction(k * largest * grown, 30 * 32)) for k in range(31)]
            assert bins_of(space, name, height, width) == exact


@given(st.integers(2, 200))
def test_any_number_of_bins_spans_the_same_range(num_bins):
    space = SearchSpace.wide_long(num_bins)
    table = space.magnitudes(32, 32)
    assert table.shape == (19, num_bins)
    torch.testing.assert_close(
        table[:, [0, -1]], SearchSpace.wide_long().magnitudes(32, 32)[:, [0, -1]]
    )


def test_print_shows_the_table():
    lines = str(SearchSpace.wide_long()).splitlines()
    assert len(lines) == 21
    assert lines[1].split() == ["operation", "bin", "0", "bin", "15", "bin", "30", "signed"]
    row = next(line for line in lines if line.startswith("rotate"))
    assert row.split() == ["rotate", "0", "67", "135", "yes"]
    assert next(line for line in lines if line.startswith("flip_lr")).split()[1:] == [*"---", "no"]


def test_print_of_a_small_space():
    operations = (
        Operation("invert"),
        Operation("color", 0.1, 1.9),
        Operation("translate_x", 0, 32, integer=True, signed=True, side="width"),
    )
    assert str(SearchSpace(operations, 4, "small")).splitlines() == [
        "SearchSpace 'small': 3 operations, 4 magnitude bins (pixels for 32x32 images)",
        "operation    bin 0  bin 1  bin 3  signed",
        "invert           -      -      -      no",
        "color          0.1    0.7    1.9      no",
        "translate_x   0 px  10 px  32 px     yes",
    ]


def test_settings_that_are_not_given():
    for space in (
        SearchSpace((Operation("invert"),)),
        SearchSpace.rand_augment(),
        SearchSpace.wide_long(),
        named_space("rand_augment"),
        named_space("wide_long"),
    ):
        assert space.num_magnitude_bins == 31
    assert named_space("wide_long", 7) == SearchSpace.wide_long(7)
    rotate = Operation("rotate", 0, 30)
    assert (rotate.integer, rotate.signed, rotate.random, rotate.per) == (False, False, False, 32)


def test_spaces_and_operations_do_not_change():
    space = SearchSpace.rand_augment()
    for changed, name in ((space, "num_magnitude_bins"), (space.operations[3], "high")):
        with pytest.raises(FrozenInstanceError):
            setattr(changed, name, 7)
    own = Operation("mine", 0, 1, kernel=abs, matrix=abs)
    assert repr(own) == (
        "Operation(name='mine', low=0, high=1, integer=False, signed=False, side=None, per=32, "
        "random=False)"
    )


def test_magnitudes_grow_up_to_a_side():
    own = Operation("translate_x", 0, 8, side="width", per=16, up_to=64)
    assert [own.magnitude(30, 31, 9, width) for width in (16, 32, 64, 65, 500)] == [
        8,
        16,
        32,
        32,
        32,
    ]
    for up_to, error in ((0, ValueError), (1.5, TypeError), (10**6 + 1, ValueError)):
        with pytest.raises(error, match="up_to"):
            Operation("translate_x", 0, 8, side="width", up_to=up_to)
    with pytest.raises(ValueError, match=r"up_to .* needs a side"):
        Operation("rotate", 0, 8, up_to=3)


def test_ends_of_what_is_accepted():
    assert SearchSpace.wide_long(10_000).num_magnitude_bins == 10_000
    with pytest.raises(ValueError, match="at most 10,000, got 10001"):
        SearchSpace.wide_long(10_001)
    at_the_end = {"name": "translate_x", "low": 0, "high": 1, "side": "width"}
    assert Operation(**at_the_end, per=10**6).per == 10**6
    with pytest.raises(ValueError, match=r"per must lie in 1 \.\. 1,000,000, got 1000001"):
        Operation(**at_the_end, per=10**6 + 1)
    with pytest.raises(ValueError, match="got -1 of 31"):
        Operation("rotate", 0, 30).magnitude(-1, 31, 8, 8)
    assert Operation("invert").magnitude(7, 31, 8, 8) == 0
    for size in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match=f"height and width must be .* {size[0]} and"):
            SearchSpace.wide_long().magnitudes(*size)


def test_custom_space_with_a_kernel():
    def darken(images, magnitudes):
        return images * magnitudes[:, None, None, None]

    space = SearchSpace((Operation("darken", 1, 0, kernel=darken), Operation("identity")), 5)
    assert bins_of(space, "darken") == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "rotat", "low": 0, "high": 1}, "unknown operation 'rotat'.*rotate"),
        ({"name": "rotate", "low": 0}, "both low and high"),
        ({"name": "rotate"}, "needs magnitudes"),
        ({"name": "invert", "low": 0, "high": 1}, "takes no magnitude"),
        ({"name": "posterize", "low": 9, "high": 4}, r"\[0, 8\].*low=9"),
        ({"name": "solarize", "low": 0, "high": 257}, r"\[0, 256\]"),
        ({"name": "color", "low": -0.5, "high": 1}, r"\[0, 1e\+06\]"),
        ({"name": "color", "low": 0, "high": 1, "signed": True}, "signed=True"),
        ({"name": "rotate", "low": 0, "high": math.nan}, "finite"),
        ({"name": "rotate", "low": 0, "high": math.inf}, "finite"),
        ({"name": "translate_x", "low": 0, "high": 1, "side": "depth"}, "side"),
        ({"name": "translate_x", "low": 0, "high": 1, "side": "width", "per": 0}, "per"),
    ],
)
def test_bad_operations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Operation(**arguments)


def test_bad_spaces_are_refused():
    with pytest.raises(TypeError, match="kernel"):
        Operation("mine", kernel=3)
    with pytest.raises(TypeError, match="'rotate'"):
        SearchSpace(("rotate",))
    with pytest.raises(ValueError, match="at least one"):
        SearchSpace(())
    with pytest.raises(ValueError, match="distinct"):
        SearchSpace((Operation("invert"), Operation("invert")))
    with pytest.raises(ValueError, match="at least 2"):
        SearchSpace.wide_long(1)
    with pytest.raises(TypeError, match="int"):
        SearchSpace.wide_long(31.0)
    with pytest.raises(ValueError, match=r"'wide'.*rand_augment, wide_long"):
        named_space("wide")
    with pytest.raises(TypeError, match="int"):
        named_space(3)


def test_the_last_bin_is_exactly_the_high_end():
    """Computed, low + (high - low) would be -2.8e-14 here, which solarize does not accept."""
    solarize = Operation("solarize", 137.32631517078084, 0.0)
    assert solarize.magnitude(30, 31, 1, 1) == 0.0
    assert SearchSpace((solarize,)).magnitudes(1, 1)[0, -1] == 0.0
