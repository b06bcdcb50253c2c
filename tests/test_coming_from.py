"""What the page on other libraries says is what the script finds, and its lines of ours work."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import ola_augment
from ola_augment import Operation, SearchSpace

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "_coming_from_table.md").read_text(encoding="utf-8")


def script():
    path = ROOT / "examples" / "coming_from.py"
    spec = importlib.util.spec_from_file_location("coming_from", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["coming_from"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ola_augment", "torchvision", "timm", "kornia"])
def test_what_is_installed_does_what_the_table_says(name):
    pytest.importorskip(name)
    (row,) = script().rows([name])
    said = [line for line in TABLE.splitlines() if line.startswith(f"| {name} ")]
    assert [line.split(" | ", 1)[1] for line in said] == [row.split(" | ", 1)[1]]


def test_the_table_has_every_library_of_the_script():
    named = re.findall(r"^\| (\w+) [\d.]+", TABLE, re.MULTILINE)
    missing = re.findall(r"^<!-- (\w+) does not import", TABLE, re.MULTILINE)
    assert sorted(named + missing) == sorted(script().LIBRARIES)
    assert set(missing) <= {"mmpretrain", "imgaug"}


def test_a_difference_is_seen():
    module = script()
    given = module.images()
    assert module.turned(given["dot"][::-1, ::-1].transpose(1, 0, 2)) == "counter-clockwise"
    assert module.turned(given["dot"].transpose(1, 0, 2)) == "clockwise"
    halves = given["halves"].astype(float)
    for pivot, name in ((127.5, "mid-grey"), (0, "black"), (100, "each channel's mean")):
        result = (pivot + 0.5 * (halves - pivot)).round()
        assert module.pivot(given["halves"], result) == name


@pytest.mark.parametrize("page", ["coming_from", "guides/albumentations"])
def test_what_the_pages_say_to_write_can_be_made(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    operations = (Operation(name) for name in ("identity", "invert", "flip_lr"))
    names = {**vars(ola_augment), "space": SearchSpace(operations)}
    if "search_space()" in text:
        pytest.importorskip("kornia")
        names["search_space"] = importlib.import_module("ola_augment.kornia").search_space
    if "TimmRandAugmentPolicy" in text:
        pytest.importorskip("timm")
        timm = importlib.import_module("ola_augment.integrations.timm")
        names["TimmRandAugmentPolicy"] = timm.TimmRandAugmentPolicy
    kinds = {"Operation": Operation, **{name: names[name] for name in POLICIES}}
    found = re.findall(rf"`(({'|'.join(kinds)})\([^`]*\))`", text)
    assert found
    for code, kind in found:
        if "(...)" not in code:
            assert isinstance(eval(code, dict(names)), kinds[kind]), code


#: What a page names of ours, beside operations.
POLICIES = ("TrivialAugment", "RandAugment", "OLAAugment", "UniformPolicy", "PolicyTransform")
