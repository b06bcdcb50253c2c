"""The first calls: kernels are compiled once, in another process, while others serve."""

import logging
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from images import crops
from pillow_reference import draw, pillow_apply

from ola_augment import SearchSpace
from ola_augment.kernels import compiled
from ola_augment.kernels.compiled import CompiledKernels, cache_directory
from ola_augment.kernels.loops import batch
from ola_augment.operations import apply_actions, compile_kernels

pytestmark = pytest.mark.skipif(compiled.fcntl is None, reason="compiled in the process itself")

#: Some processes at once, each from its first batch to its first compiled one.
SCRIPT = """
import os, sys, time, torch
from ola_augment import TrivialAugment
from ola_augment.kernels.compiled import KERNELS

def first_calls():
    images = torch.arange(16 * 3 * 32 * 32).view(16, 3, 32, 32).to(torch.uint8)
    augment = TrivialAugment()
    start = time.process_time()
    first, actions = augment.augment(images)
    augment(images[0])
    seconds, numba = time.process_time() - start, "numba" in sys.modules
    while KERNELS["uint8"].ready() is None:
        time.sleep(0.05)
    same = torch.equal(augment.replay(images, actions), first)
    os.write(1, f"{int(seconds < 2)} {int(numba)} {int(same)}\\n".encode())  # at once

for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        first_calls()
        os._exit(0)
for _ in range(int(sys.argv[1])):
    assert os.wait()[1] == 0
"""


def first_calls(processes, directory):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(processes)],
        # optimised less: the kernels are there sooner
        env={**os.environ, "NUMBA_CACHE_DIR": str(directory), "NUMBA_OPT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )


def test_four_processes_on_a_cold_cache_compile_once_and_do_not_wait(tmp_path):
    cold = first_calls(4, tmp_path)
    assert cold.stdout.splitlines() == ["1 0 1"] * 4
    assert cold.stderr.count("compiling the kernels") == len(cold.stderr.splitlines()) == 1
    assert len(list(tmp_path.rglob("batch.run_batch*.nbc"))) == 1
    warm = first_calls(1, tmp_path)
    assert (warm.stdout.split(), warm.stderr) == (["1", "1", "1"], "")


@pytest.fixture
def kernels(monkeypatch):
    """Not yet loaded ones, instead of this process's."""
    fresh = CompiledKernels("uint8")
    monkeypatch.setitem(compiled.KERNELS, "uint8", fresh)
    monkeypatch.setattr(compiled, "_LOOK_EVERY", 0.0)
    return fresh


def augmented_as_by_pillow():
    """Whether small and large batches of small and large images come out as from Pillow."""
    space = SearchSpace.wide_long()
    batches = [crops(40, 24, 24), crops(2, 24, 24), crops(2, 70, 65), crops(17, 70, 65)]
    return all(
        torch.equal(apply_actions(images, space, actions), pillow_apply(images, space, actions))
        for images, actions in ((images, draw(space, len(images), 3)) for images in batches)
    )


def test_nothing_is_compiled_in_a_process_that_loads():
    compile_kernels()
    run = compiled.KERNELS["uint8"].wait()
    assert augmented_as_by_pillow()
    images = crops(4, 70, 65)
    actions = draw(SearchSpace.wide_long(), 4, 3)
    for given in (images / 255, (images.int() * 257).to(torch.uint16), images[:1]):
        apply_actions(given, SearchSpace.wide_long(), actions.select(slice(len(given))))
    assert len(run.signatures) == len(batch.SIGNATURES)
    fill = np.zeros(3, np.float64)  # of another type than the images
    with pytest.raises(TypeError):
        run(images.numpy(), images.numpy(), *(None,) * 6, fill, *(None,) * 5)


def test_without_any_directory_others_serve_for_good(kernels, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "cache_directory", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert all(augmented_as_by_pillow() for _ in range(3))
    assert kernels.ready() is None
    assert ["no directory" in record.message for record in caplog.records] == [True]


def test_a_compilation_that_fails_is_given_up(kernels, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(compiled, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            assert augmented_as_by_pillow()
            if "failed" in caplog.text:
                break
            time.sleep(0.05)
    assert kernels.ready() is None
    assert caplog.records[-1].message.startswith("compiling the kernels failed")
    assert len(caplog.records) == compiled._MOST_STARTS + 1


def test_who_holds_the_lock_compiles_alone(kernels, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(compiled, "cache_directory", lambda: tmp_path)
    with compiled._locked(tmp_path), caplog.at_level(logging.WARNING):
        assert all(kernels.ready() is None for _ in range(3))
    assert not caplog.records


def test_directories_that_cannot_be_written_are_passed_over(monkeypatch, tmp_path):
    no_directory = tmp_path / "file"
    no_directory.touch()
    find = cache_directory.__wrapped__
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "given"))
    assert find().parent == tmp_path / "given"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(no_directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert find().parent == tmp_path / "home" / "ola_augment"
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_directory))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert find().parent.parent == tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(no_directory))
    assert find() is None


def test_settings_of_numba_are_kept_apart(monkeypatch):
    find = cache_directory.__wrapped__
    before = find()
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    assert find() != before
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "0")
    assert find() != before
