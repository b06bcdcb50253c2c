"""No input reaches a kernel that would read or write out of bounds (`make bounds`, and here)."""

import importlib
from pathlib import Path

import pytest
from numba import config

SCRIPTS = Path(__file__).parents[1] / "examples" / "reliability"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("fuzz_kernels")


def test_every_entry_returns_or_refuses_by_name(fuzz):
    counts = fuzz.fuzz(180, seed=1)
    assert {entry.__name__ for entry in fuzz.ENTRIES} == counts.keys()
    assert all(sum(count) == 20 for count in counts.values())
    assert sum(returned for returned, _ in counts.values()) > 60


def test_checked_kernels_are_told_from_others(fuzz):
    assert fuzz.indices_are_checked() == bool(config.BOUNDSCHECK)
