"""Kill ``examples/train.py`` at random moments, saves included; resume; compare the results.

    python examples/reliability/kill.py --kills 20

Exits with 1 if the run that was killed ends differently from the one that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"


def command(out: Path, epochs: int) -> list[str]:
    options = f"--train-size 200 --batch-size 20 --epochs {epochs} --method ola --quiet"
    # A checkpoint after each pair: a large share of the time is spent saving.
    return [
        sys.executable, str(TRAIN), *options.split(), "--checkpoint-every", "1", "--resume",
        "--out", str(out),
    ]  # fmt: skip


def result(out: Path) -> tuple:
    """All that the run found, without its times."""
    folder = out / "ola-seed0"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    history = [{k: v for k, v in json.loads(r).items() if k != "seconds"} for r in lines]
    accuracy = json.loads((folder / "result.json").read_text())["accuracy"]
    return accuracy, history, (folder / "policy.json").read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    quiet = {"stdout": subprocess.DEVNULL, "env": environment}
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        subprocess.run(command(alone, options.epochs), check=True, **quiet)
        kills = saving = starts = 0
        while kills < options.kills:
            starts += 1
            process = subprocess.Popen(command(killed, options.epochs), **quiet)
            metrics = killed / "ola-seed0" / "checkpoint.pt"
            before = metrics.stat().st_mtime_ns if metrics.exists() else 0
            while process.poll() is None and (
                not metrics.exists() or metrics.stat().st_mtime_ns == before
            ):
                time.sleep(0.01)  # until this process has saved once
            time.sleep(moments.uniform(0, 0.6))
            if process.poll() is not None:
                print(f"the run ended after {kills} kills: more epochs are needed", flush=True)
                return 1
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            saving += any((killed / "ola-seed0").glob(".checkpoint.pt.*"))
            for left in (killed / "ola-seed0").glob(".*"):
                left.unlink()
        subprocess.run(command(killed, options.epochs), check=True, **quiet)
        same = result(alone) == result(killed)
    print(f"{kills} kills, {saving} of them during a save: {'same' if same else 'OTHER'} result")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
