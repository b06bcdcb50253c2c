"""Files are whole whatever happens while they are written, and harmless when they are read."""

import errno
import json
import os
import runpy
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ola_augment import OLAPolicy, SplitPolicy, UniformPolicy, load_policy, save_policy
from ola_augment.files import write_atomically
from ola_augment.training.checkpoint import load_checkpoint, save_checkpoint

SCRIPTS = Path(__file__).parents[1] / "examples" / "reliability"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    save_policy(OLAPolicy("rand_augment", 2), path)
    old = path.read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_policy(OLAPolicy("wide_long"), path)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "run.ckpt", {})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["policy.json"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "policy.json"
    code = (
        "import sys; from ola_augment import OLAPolicy, save_policy\n"
        "policy = OLAPolicy('wide_long')\n"
        f"save_policy(policy, {str(path)!r})\n"
        "print('ready', flush=True)\n"
        f"while True: save_policy(policy, {str(path)!r})"
    )
    for delay in (0.0, 0.003, 0.01):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        assert load_policy(path).max_ops == 4


def test_permissions_and_links_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_new_file_has_the_permissions_of_the_umask_and_survives_a_power_cut(
    tmp_path, monkeypatch
):
    path, synced, original = tmp_path / "new", [], os.fsync

    def recorded(number):
        folder = stat.S_ISDIR(os.fstat(number).st_mode)
        synced.append(("folder" if folder else "file", path.exists()))
        original(number)

    monkeypatch.setattr(os, "fsync", recorded)
    before = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    # What it holds before its name appears, and then its name.
    assert synced == [("file", False), ("folder", True)]
    path = tmp_path / ("n" * 250)  # the temporary name is not longer still
    write_atomically(path, b"long")
    assert path.read_bytes() == b"long"


def refused(path, content, message):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as refusal:
        load_policy(path)
    assert str(path) in str(refusal.value)


def test_a_small_file_does_not_ask_for_much_memory(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    save_policy(UniformPolicy("rand_augment"), path)
    good = json.loads(path.read_text())
    space = good["space"]
    for bins in (10**8, 10**400, 100_000, -(10**9)):
        refused(path, good | {"space": space | {"num_magnitude_bins": bins}}, "more than 1000000")
    refused(path, good | {"space": space | {"num_magnitude_bins": 10**400}}, "is 10{19}, more")
    save_policy(SplitPolicy(2), path)
    good = json.loads(path.read_text())
    for number in (10**6 + 1, 10**9, 1e300, float("inf"), float("nan")):
        refused(path, good | {"arguments": {"num_splits": number}}, "num_splits is")
    refused(path, good | {"arguments": {"num_splits": 10**6}}, "logits of shapes")
    save_policy(SplitPolicy(2), path)
    with monkeypatch.context() as patch:
        patch.setattr("ola_augment.files._MOST_BYTES", path.stat().st_size)
        assert len(load_policy(path).logits) == 2
        patch.setattr("ola_augment.files._MOST_BYTES", path.stat().st_size - 1)
        with pytest.raises(ValueError, match="larger than"):
            load_policy(path)
    path.write_bytes(b" " * (64 * 2**20 + 1))
    with pytest.raises(ValueError, match="larger than"):
        load_policy(path)


def test_an_entry_twice_and_a_deep_document_are_refused(tmp_path):
    path = tmp_path / "policy.json"
    refused(path, '{"kind": 0, "format": 1, "format": 2}', "'format' occurs twice")
    refused(path, "[" * 100_000, "not a policy file")


def test_damaged_files_are_read_or_refused():
    fuzz = runpy.run_path(str(SCRIPTS / "fuzz_files.py"), run_name="example")["fuzz"]
    read, refusals = fuzz(400, seed=1)
    assert read + refusals == 400
    assert refusals > 200


def test_a_checkpoint_holds_no_code(tmp_path):
    import torch

    path = tmp_path / "run.ckpt"
    torch.save({"format": "ola_augment/checkpoint/1", "parts": Path("x")}, path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path)
