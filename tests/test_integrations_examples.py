"""Every script in examples/integrations runs, is short, and learns."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ola_augment import OLALearner
from ola_augment.training import ValueUpdater

SCRIPTS = Path(__file__).parents[1] / "examples" / "integrations"

# The frameworks' own warnings are not ours.
pytestmark = [pytest.mark.filterwarnings(which) for which in ("ignore", "error:::ola_augment")]


def run(script, *arguments):
    torch.manual_seed(0)
    main = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="example")["main"]
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _learns_in_few_pairs(monkeypatch):
    """The recommended setting learns nothing in runs that are too short for its trial."""
    recommended = OLALearner.recommended.__func__

    def at_once(cls, *arguments, **options):
        learner = recommended(cls, *arguments, **options)
        learner.learn_pairs, learner.learn_every = None, 1
        return learner

    monkeypatch.setattr(OLALearner, "recommended", classmethod(at_once))


def learned(learner):
    if isinstance(learner.updater, ValueUpdater):
        return bool(learner.updater.state_dict()["moment"].any())
    return bool(torch.cat([v.flatten() for v in learner.policy.named_logits().values()]).any())


def test_each_is_at_most_90_lines():
    for path in SCRIPTS.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 90, path.name


def test_lightning():
    pytest.importorskip("lightning")
    _, callback = run("lightning_trainer", "--epochs", 1)
    assert callback.learner.pairs == 4
    assert learned(callback.learner)


def test_huggingface(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    trainer = run("huggingface_trainer", "--epochs", 1, "--bf16", "--out", tmp_path)
    assert trainer.learner.pairs == 4
    assert learned(trainer.learner)
    assert list(tmp_path.glob("checkpoint-*/ola_learner.pt"))


def test_timm():
    pytest.importorskip("timm")
    learner = run("timm_loop", "--epochs", 1)
    assert learner.pairs == 4
    assert learned(learner)


@pytest.fixture
def no_accelerator():
    """Accelerate keeps what the first one in a process was told."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(True)
    yield
    state._reset_state(True)


@pytest.mark.usefixtures("no_accelerator")
def test_accelerate():
    learner = run("accelerate_loop", "--epochs", 1, "--mixed-precision", "bf16")
    assert learner.pairs == 8
    assert learned(learner)


@pytest.mark.parametrize("way", [[], ["--fit"]], ids=["loop", "fit"])
def test_compiled_and_mixed_precision(way):
    learner = run("compiled_amp", "--epochs", 1, "--device", "cpu", "--backend", "eager", *way)
    assert learner.pairs + learner.skipped.total() >= 8
    assert learned(learner)


@pytest.mark.parametrize("way", [[], ["--fit"]], ids=["loop", "fit"])
def test_workers(way):
    learner = run("workers", "--epochs", 1, *way)
    assert learner.pairs == 8
    assert learned(learner)


def agree(printed, pairs):
    """What every rank has is the same to the last bit, and what it draws is not."""
    # Lines of two processes may run into each other.
    digest = "([0-9a-f]{12})"
    line = rf"rank (\d): (\d+) pairs, weights {digest}, policy {digest}, draws {digest}"
    found = re.findall(line, printed)
    ranks, counts, weights, policies, draws = zip(*found, strict=True)
    assert sorted(ranks) == ["0", "1"]
    assert set(counts) == {str(pairs)}
    assert len(set(weights)) == len(set(policies)) == 1
    assert len(set(draws)) == 2


@pytest.mark.parametrize("script", ["torchrun_ddp", "lightning_trainer"])
def test_torchrun(script):
    if script == "lightning_trainer":
        pytest.importorskip("lightning")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(SCRIPTS / f"{script}.py"), "--epochs", "1"]
    command += ["--devices", "2"] * (script == "lightning_trainer")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    agree(done.stdout, 4 if script == "torchrun_ddp" else 2)


def test_ray(tmp_path, capsys):
    ray = pytest.importorskip("ray")
    try:
        run("ray_train", "--epochs", 1, "--out", tmp_path)
    finally:
        ray.shutdown()
    agree(capsys.readouterr().out, 4)
