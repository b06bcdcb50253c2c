"""One row per operation: what is derived from it, and that a row and a kernel are enough."""

import runpy
from dataclasses import MISSING, FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batched_kernels import apply_batched
from images import assorted
from PIL import ImageFilter
from pillow_reference import PILLOW, affine, draw, pillow_apply
from test_operations_exact import MODES

from ola_augment import Operation, SearchSpace
from ola_augment.kernels import levels
from ola_augment.kernels.kind import Kind
from ola_augment.kernels.table import TABLE, Affine, LookUp, Row, tabulate
from ola_augment.operations import apply_actions, apply_geometry_to_masks
from ola_augment.operations.program import program

DOCS = Path(__file__).parents[1] / "docs"


def test_every_operation_has_a_reference_and_both_spaces_know_it():
    assert set(PILLOW) == set(TABLE)
    assert [operation.name for operation in SearchSpace.wide_long().operations] == list(TABLE)


def test_the_documented_table_is_derived():
    generator = runpy.run_path(str(DOCS / "operations_table.py"))
    assert generator["TARGET"].read_text(encoding="utf-8") == generator["table"]()
    assert "{include} _operations_table.md" in (DOCS / "operations.md").read_text()


def zoom(m, height, width):
    return m, 0, (1 - m) * width / 2, 0, m, (1 - m) * height / 2


def threshold(given, bound, whole):
    return torch.where(torch.floor(given + 0.5) >= bound, 255, 0).to(given.dtype)


def largest_neighbour(given, _, whole):
    return torch.nn.functional.max_pool2d(given, 3, stride=1, padding=1)


#: A row, the magnitudes to try it with, and what it is in Pillow.
NEW = {
    "look-up table": (
        Row(
            *("threshold", (0, 255), ""),
            *(LookUp(lambda bound: np.where(np.arange(256) >= bound, 255, 0)), threshold),
            *(0, False, "`point`"),
        ),
        (0, 255),
        lambda im, m, *_: im.point(lambda level: 255 * (level >= m)),
    ),
    "matrix": (
        Row("zoom", (0.1, 10), "", Affine(zoom), None, 0, True, "`transform(AFFINE)`"),
        (0.5, 3),
        lambda im, m, center, *how: affine(im, zoom(m, im.height, im.width), *how),
    ),
    "batched kernel alone": (
        Row(
            *("largest_neighbour", None, "", Kind.BATCHED, largest_neighbour),
            *(0, True, "`MaxFilter(3)`"),
        ),
        (),
        lambda im, *_: im.filter(ImageFilter.MaxFilter(3)),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NEW)
def test_a_row_and_a_kernel_make_an_operation(kind, mode, monkeypatch):
    row, magnitudes, pillow = NEW[kind]
    monkeypatch.setitem(TABLE, row.name, row)
    monkeypatch.setitem(PILLOW, row.name, pillow)
    own = Operation(row.name, *magnitudes)
    first, *others = SearchSpace.wide_long().operations
    space = SearchSpace((first, own, *others))
    bilinear = mode is MODES[1]
    for seed, images in enumerate([*assorted(), *assorted(1)[:3]]):
        actions = draw(space, len(images), 3, seed)
        actions.ops[actions.ops == 1] = 2  # the new one once in every image, between two others
        actions.ops[:, 1] = 1
        expected = pillow_apply(images, space, actions, bilinear)
        exact = apply_actions(images, space, actions, interpolation=mode)
        assert torch.equal(exact, expected)
        table = program(space, *images.shape[2:])
        fill = (0,) * images.shape[1]
        assert torch.equal(apply_batched(images, table, actions, fill, bilinear), expected)
        alone = actions._replace(keep=actions.ops == 1)
        exact = apply_actions(images, space, alone, interpolation=mode)
        floats = apply_actions(images / 255, space, alone, interpolation=mode)
        bound = max(row.bound, float(bilinear and row.geometric)) + 1e-3
        assert (floats * 255 - exact).abs().max() <= bound
        masks = apply_geometry_to_masks(images, space, alone)
        nearest = apply_actions(images, space, alone)
        assert torch.equal(masks, nearest if row.geometric else images)


@pytest.mark.parametrize("missing", [f.name for f in fields(Row) if f.default is MISSING])
def test_a_row_without_one_of_its_fields_cannot_be_made(missing):
    complete = {field.name: getattr(TABLE["color"], field.name) for field in fields(Row)}
    assert Row(**complete) == TABLE["color"]
    del complete[missing]
    with pytest.raises(TypeError, match=missing):
        Row(**complete)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("color", {"batched": None}, TypeError, "'color'.*COLOR.*needs a batched kernel"),
        ("solarize", {"batched": None}, TypeError, "'solarize'.*needs a batched kernel"),
        ("rotate", {"batched": levels.invert}, TypeError, "AFFINE.*needs no batched kernel"),
        ("rotate", {"exact": Kind.AFFINE}, TypeError, "cannot be run"),
        ("invert", {"exact": Kind.SHIFT}, TypeError, "cannot be run"),
        ("invert", {"exact": "table"}, TypeError, "cannot be run"),
        ("color", {"domain": (0, float("inf"))}, ValueError, "no finite interval"),
        ("color", {"domain": (1, 0)}, ValueError, "no finite interval"),
        ("color", {"domain": (-float("inf"), 0)}, ValueError, "no finite interval"),
        ("color", {"domain": (float("nan"), 0)}, ValueError, "no finite interval"),
        ("color", {"bound": -1}, ValueError, "bound"),
    ],
)
def test_incomplete_rows_are_refused(name, change, error, message):
    with pytest.raises(error, match=message):
        replace(TABLE[name], **change)


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        ("rotate shear_x shear_y translate_x translate_y", (-1e6, 1e6)),
        ("color contrast brightness sharpness cutout", (0, 1e6)),
        ("solarize", (0, 256)),
        ("posterize", (0, 8)),
    ],
)
def test_magnitudes_are_accepted_up_to_both_ends(names, ends):
    for name in names.split():
        assert Operation(name, *ends).domain == ends
        for beyond in (np.nextafter(ends[0], -np.inf), np.nextafter(ends[1], np.inf)):
            with pytest.raises(ValueError, match="accepts magnitudes in"):
                Operation(name, beyond, 1)


def test_mirrors_reverse_the_dimension_that_they_name():
    images = torch.rand(2, 3, 4, 5)
    mirrors = {name: row.exact.mirrored for name, row in TABLE.items() if row.geometric}
    for name in ("flip_lr", "flip_ud"):
        space, dim = SearchSpace((Operation(name),)), mirrors.pop(name)
        assert torch.equal(apply_actions(images, space, draw(space, 2, 1)), images.flip(dim))
    assert set(mirrors.values()) == {None}


def test_a_row_of_one_magnitude_and_an_exact_one_are_complete():
    assert replace(TABLE["color"], domain=(1, 1), bound=0).domain == (1, 1)


def test_rows_do_not_change():
    for made, name in ((TABLE["color"], "bound"), (LookUp(abs), "values"), (Affine(abs), "matrix")):
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, 7)


def test_only_what_moves_pixels_is_geometric():
    moving = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y", "flip_lr", "flip_ud"}
    assert {name for name, row in TABLE.items() if row.geometric} == moving


def test_names_are_distinct():
    with pytest.raises(ValueError, match="distinct"):
        tabulate(TABLE["color"], TABLE["color"])
