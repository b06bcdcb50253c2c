"""Real processes of one process group, for tests."""

import os
import socket
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(worker, *given, ranks=2):
    """``worker(rank, port, *given)`` in a process for each rank, with a free port."""
    mp.start_processes(worker, (free_port(), *given), ranks, start_method="forkserver")


def run_checks(checks, folder, given=None, ranks=2):
    """Name -> what every rank returned, of functions ``check(rank, given)``.

    ``given`` travels to the ranks in shared memory. A check that raises gives its traceback.
    """
    run_ranks(_rank, str(folder), checks, given, ranks, ranks=ranks)
    found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {name: [one[name] for one in found] for name in found[0]}


def _rank(rank, port, folder, checks, given, ranks):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
        "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            found[check.__name__] = check(rank, given)
        except Exception:
            found[check.__name__] = traceback.format_exc()
            if "imeout" in found[check.__name__] or "onnection" in found[check.__name__]:
                break
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)  # frameworks register ends of their own for the one process group
