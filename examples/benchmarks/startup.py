"""What starting costs: the import, and the first batch with and without compiled kernels on disk.

    python examples/benchmarks/startup.py

Each number is a process of its own. All but the time to the first result are processor time; the
import is the fastest of several, since whatever else runs can only slow it down, and without
Python's garbage collector: a full collection looks through all of torch's objects, too, and falls
into the import or not by chance.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

#: Seconds that the import may add to torch's and torchvision's.
IMPORT = 0.08
#: Seconds to the first result on a cold cache.
FIRST = 0.5

TIMED_IMPORT = """
import gc, time, torch, torchvision.transforms.v2
gc.disable()
start = time.process_time()
import ola_augment
print(time.process_time() - start)
"""
FIRST_CALL = """
import time, torch, ola_augment
images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
augment = ola_augment.OLAAugment()
start, busy = time.perf_counter(), time.process_time()
augment.augment(images)
print(time.perf_counter() - start, time.process_time() - busy)
"""
COMPILE = """
import time
from ola_augment.operations import compile_kernels
start = time.process_time()
compile_kernels()
print(time.process_time() - start)
"""


def seconds(code: str, **environment: str) -> list[float]:
    """Run code in a process of its own; the numbers that it prints."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in run.stdout.split()]


def measure_import(turns: int = 9) -> list[str]:
    """Print what importing the package adds; return what is past the limit."""
    # Unless bytecode is kept, every process compiles the package anew.
    added = min(seconds(TIMED_IMPORT, PYTHONDONTWRITEBYTECODE="")[0] for _ in range(turns))
    print(f"\nImport: {added:.3f} s beside torch and torchvision")
    return [f"import: {added:.2f} s, at most {IMPORT}"] if added > IMPORT else []


def measure_first_call() -> list[str]:
    """Print the seconds to the first result, to compile the kernels, and to load them again."""
    with tempfile.TemporaryDirectory() as directory:
        (compiled,) = seconds(COMPILE, NUMBA_CACHE_DIR=directory)
        _, again = seconds(FIRST_CALL, NUMBA_CACHE_DIR=directory)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        # The compiling process goes on for a while after this one.
        first, _ = seconds(FIRST_CALL, NUMBA_CACHE_DIR=directory)
    print(
        f"\nFirst batch of 64 images on a cold cache: {first:.2f} s; compiling the kernels: "
        f"{compiled:.1f} s; first batch of the next process, which loads them: {again:.2f} s"
    )
    return [f"first call: {first:.2f} s, at most {FIRST}"] if first > FIRST else []


def main() -> int:
    missed = measure_import() + measure_first_call()
    print("\n".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
