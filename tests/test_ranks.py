"""A rank that dies or lags: torch.distributed's own error, and nothing is half done."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ola_augment import GARUpdater, OLAAugment, OLALearner, OLAPolicy
from ola_augment.training import Callback, fit
from ola_augment.training.checkpoint import load_checkpoint


def join(rank, port, seconds):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", address, world_size=2, rank=rank, timeout=timeout)


class Die(Callback):
    def on_step(self, step, loss):
        if step == 5:  # in the middle of the third pair
            os._exit(0)


def one_dies(rank, port, folder):
    join(rank, port, 120)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    images = torch.randint(0, 256, (24, 3, 2, 2), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.arange(24) % 2), batch_size=4)
    learner = OLALearner(model, OLAAugment("rand_augment"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    files = {"checkpoint_path": Path(folder, "run.ckpt"), "metrics_path": Path(folder, "m.jsonl")}
    with pytest.raises(RuntimeError) as caught:
        fit(
            model, loader, optimizer, epochs=3, learner=learner, progress=False,
            checkpoint_every=2, callbacks=[Die()] * rank, **(files if not rank else {}),
        )  # fmt: skip
    Path(folder, "error").write_text(str(caught.value))
    os._exit(0)  # as the group is broken


def test_a_rank_that_dies_leaves_the_others_an_error_and_a_whole_checkpoint(tmp_path):
    run_ranks(one_dies, str(tmp_path))
    error = (tmp_path / "error").read_text()
    assert "peer" in error.lower() or "connection" in error.lower(), error
    assert sorted(os.listdir(tmp_path)) == ["error", "m.jsonl", "run.ckpt"]
    content = load_checkpoint(tmp_path / "run.ckpt")
    assert content["batches"] == 4
    learner = content["parts"]["learner"]
    assert learner["pairs"] == 2
    assert all(value.isfinite().all() for value in learner["policy"].values())


def one_lags(rank, port, folder):
    join(rank, port, 3)
    dist.monitored_barrier(timeout=timedelta(seconds=120))
    if rank:
        dist.all_reduce(torch.tensor(0.0))  # takes part in the first of a step's messages only
        deadline = time.monotonic() + 120
        while not Path(folder, "passed").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(0)
    policy = OLAPolicy("rand_augment", 2)
    updater = GARUpdater(policy, accumulate=2)
    actions = policy.sample(4)
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        updater.step(actions, torch.arange(4.0))
    assert not any(logits.any() for logits in policy.named_logits().values())
    assert updater.state_dict()["pending"] == []
    assert updater.state_dict()["optimizer"]["state"] == {}
    Path(folder, "passed").touch()
    os._exit(0)


def test_a_rank_that_lags_behind_the_timeout_is_an_error_and_moves_nothing(tmp_path):
    run_ranks(one_lags, str(tmp_path))
    assert (tmp_path / "passed").exists()
