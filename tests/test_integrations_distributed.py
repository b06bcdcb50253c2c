"""Two gloo processes: every way to run them learns one policy, the same on both ranks."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loops import CLIP, dataset, learner_of, logits, network, optimizer_of, plain_loop
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ola_augment.training import fit

RANKS = 2


def loader(rank):
    data = dataset(32)
    sampler = DistributedSampler(data, RANKS, rank, shuffle=False)
    return DataLoader(data, batch_size=4, sampler=sampler)


def by_loop(rank, accumulate):
    model = DistributedDataParallel(network())
    learner = learner_of(model, seed=rank)
    plain_loop(model, learner, list(loader(rank)), accumulate)
    return learner


def by_fit(rank):
    model = DistributedDataParallel(network())
    learner = learner_of(model, seed=rank)
    fit(
        model, loader(rank), optimizer_of(model), epochs=1, learner=learner, clip_norm=CLIP,
        progress=False,
    )  # fmt: skip
    return learner


def by_lightning(rank, accumulate):
    import test_integrations_lightning as case

    module = case.Module()
    learner = learner_of(module.network, seed=rank)
    trainer = case.trainer(
        case.OLACallback(learner), accumulate=accumulate, devices=RANKS, strategy="ddp",
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader(rank))
    return learner


def by_huggingface(rank, accumulate):
    import test_integrations_huggingface as case

    model = case.Model()
    learner = learner_of(model, seed=rank)
    run = case.trainer("unused", accumulate, model=model, learner=learner, ddp_backend="gloo")
    rows = [{"pixel_values": image, "labels": label} for image, label in dataset(32)]
    # accelerate deals batches out in turns, DistributedSampler examples: give each rank its own.
    order = torch.arange(32).reshape(-1, 4, RANKS).transpose(1, 2).flatten().tolist()
    run.train_dataset = [rows[i] for i in order]
    run.train()
    return learner


def by_accelerate(rank):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(network(), optimizer_of(network()))
    assert isinstance(model, DistributedDataParallel)
    learner = learner_of(model, seed=rank)
    plain_loop(model, learner, list(loader(rank)))
    return learner


def worker(rank, port, folder, ways):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
        "LOCAL_WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    dist.init_process_group("gloo")
    found = {}
    for name, way, arguments in ways:
        learner = way(rank, *arguments)
        assert learner.skipped.total() == 0
        found[name] = logits(learner)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # frameworks register ends of their own for the one process group


def test_every_way_learns_the_same_policy_on_both_ranks(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ways = [
        ("loop 1", by_loop, (1,)),
        ("loop 2", by_loop, (2,)),
        ("fit 1", by_fit, ()),
        ("lightning 2", by_lightning, (2,)),
        ("accelerate 1", by_accelerate, ()),
        ("huggingface 2", by_huggingface, (2,)),
    ]
    run_ranks(worker, str(tmp_path), ways, ranks=RANKS)
    first, second = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)
    )
    for name, found in first.items():
        assert torch.equal(found, second[name]), name
        assert found.abs().max() > 0.05
        torch.testing.assert_close(found, first[f"loop {name[-1]}"], msg=name)
