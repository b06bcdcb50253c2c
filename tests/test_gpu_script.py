"""`make gpu`, tried without a GPU."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "gpu"


@pytest.fixture
def script(monkeypatch):
    """Modules of the folder, which are not left in ``sys.modules``."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import run

    yield run
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def rows(text):
    return [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]


def test_operations_of_the_batched_kernels_are_compared(script, capsys):
    import operations

    assert operations.chains(True, "cpu", quick=True) == (True, "0 of 120 images differ")
    ok, found = operations.floats(False, "cpu", quick=True)
    assert ok
    assert found.endswith("grey levels")


def test_a_kernel_that_differs_is_noticed(script, monkeypatch):
    import operations

    true = operations.apply_batched
    monkeypatch.setattr(operations, "apply_batched", lambda *given: true(*given) ^ 1)
    ok, found = operations.chains(False, "cpu", quick=True)
    assert not ok
    assert found == "120 of 120 images differ"


@pytest.mark.parametrize("case", ["float32", "float16 autocast", "float32, channels_last"])
def test_alignments_are_compared_with_double_precision(script, case):
    import engine

    ok, found = engine.alignments(case, "cpu", quick=True)
    assert ok, found


def test_a_wrong_alignment_is_noticed(script, monkeypatch):
    import engine

    true = engine.in_double
    monkeypatch.setattr(engine, "in_double", lambda *given: 1.01 * true(*given))
    assert not engine.alignments("float32", "cpu", quick=True)[0]


def test_an_error_is_a_row(script, capsys):
    from rows import check

    check("part", "what", "goal", lambda: torch.zeros(2) @ torch.zeros(3))
    (row,) = rows(capsys.readouterr().out)
    assert row["ok"] is False
    assert row["found"].startswith("RuntimeError: ")


def test_a_part_that_takes_too_long_is_stopped_and_said(script, tmp_path):
    options = argparse.Namespace(device="cpu", data="digits", out=tmp_path, quick=True)
    (row,) = script.run_part("operations", options, 0.2, str(FOLDER.parents[1]))
    assert (row["found"], row["ok"]) == ("stopped after 0 s", False)


def test_what_is_not_installed_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setitem(script.PARTS, "ranks", (("no_such_package",), 1))
    options = argparse.Namespace(device="cpu", data="digits", out=tmp_path, quick=True)
    (row,) = script.run_part("ranks", options, 1, "")
    assert row["found"] == "not run: no_such_package is not installed"
    assert row["ok"] is None


def test_the_table_has_the_card_the_versions_and_the_date(script):
    rows = [{"part": "a", "what": "b|c", "found": "d", "goal": "e", "ok": False}]
    text = script.table(rows, script.machine("cpu"), 12.3)
    assert f"torch {torch.__version__}" in text
    assert "| a | b\\|c | d | e | **no** |" in text
    assert "12 s in all" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_what_to_do(script, capsys, tmp_path):
    assert script.main(["--out", str(tmp_path / "gpu")]) == 1
    assert "--device cpu --quick" in capsys.readouterr().out
