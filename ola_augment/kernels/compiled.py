"""How the compiled kernels get compiled: once, in another process, while others serve.

A process asks one of :data:`KERNELS` for them with every batch. If they lie on disk it
loads them; if not, whoever gets the lock starts this file as a program that compiles them there. It
imports numba and the files of kernels alone, so nothing here may import torch or other parts of the
package at the top.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

RunBatch = Callable[..., None]

_LOOK_EVERY = 0.5
_MOST_STARTS = 2
_log = logging.getLogger("ola_augment")


class CompiledKernels:
    """The compiled ``run_batch`` for some images, as soon as this process has one.

    Args:
        name: the dtype of the images, as in ``loops/batch.py``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._run: RunBatch | None = None
        self._next_look = 0.0
        self._starts = 0
        self._compiling: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        # One byte that forked processes share: whether one of them uses the kernels.
        self._used = mmap.mmap(-1, 1)

    def ready(self) -> RunBatch | None:
        """Return ``run_batch``, or None while it is being compiled; never waits for that."""
        due = self._run is None and time.monotonic() >= self._next_look
        # Of several threads one looks; the others need not wait for it.
        if due and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._run

    def wait(self) -> RunBatch:
        """Return ``run_batch``, compiled here if it lies nowhere; waits for who compiles it."""
        with self._lock:
            if self._run is None:
                directory = cache_directory()
                with _locked(directory):
                    self._load(directory)
            assert self._run is not None
            return self._run

    def _look(self) -> None:
        directory = cache_directory()
        if _is_compiled(directory, self._name):
            self._load(directory)
            return
        self._next_look = time.monotonic() + _LOOK_EVERY
        if directory is None:
            _log.warning(
                "no directory to keep compiled kernels in (set NUMBA_CACHE_DIR to one that can be "
                "written to): the slower kernels that need no compiling serve"
            )
            self._next_look = float("inf")
        elif fcntl is None or not sys.executable:
            _log.warning("compiling the kernels for %s batches, once: under a minute", self._name)
            self._load(directory)
        elif self._compiling is not None and self._compiling.poll() is None:
            return
        elif self._starts >= _MOST_STARTS:
            _log.warning("compiling the kernels failed: those that need no compiling serve")
            self._next_look = float("inf")
        else:
            self._start(directory)

    def _start(self, directory: Path) -> None:
        with open(directory / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process compiles
            if _is_compiled(directory, self._name):
                return
            self._starts += 1
            _log.warning(
                "compiling the kernels for %s batches in another process, once for this machine "
                "(under a minute); until then slower ones with the same results serve",
                self._name,
            )
            # The lock goes over to the process and ends with it.
            self._compiling = subprocess.Popen(
                [sys.executable, __file__, str(directory), self._name],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )

    def _load(self, directory: Path | None) -> None:
        self._run = load(directory, self._name)
        self._used[0] = 1

    def load_for_forks(self) -> None:
        """Load what earlier forked workers used, so that the next ones need not."""
        if self._run is None and self._used[0]:
            self.ready()

    def renew_lock(self) -> None:
        """A thread that held the lock is not in the forked process."""
        self._lock = threading.Lock()


def load(directory: Path | None, name: str) -> RunBatch:
    """Load the ``run_batch`` for a dtype from a directory, or compile it into that."""
    numba = import_module("numba")
    given = numba.config.CACHE_DIR
    if directory is not None:
        numba.config.CACHE_DIR = str(directory)
    try:
        module = import_module("ola_augment.kernels.loops.batch")
    finally:
        numba.config.CACHE_DIR = given
    if not numba.config.DISABLE_JIT:
        module.run_batch.disable_compile(False)
        module.run_batch.compile(module.SIGNATURES[name])
        # Arguments of other types are an error, and no reason to compile here.
        module.run_batch.disable_compile()
        if directory is not None:
            (directory / f"compiled {name}").touch()
    run: RunBatch = module.run_batch
    return run


@lru_cache(maxsize=1)
def cache_directory() -> Path | None:
    """Where this version's kernels lie for this Python, CPU and settings of numba.

    None if no directory can be written to: not ``NUMBA_CACHE_DIR``, nor the user's cache, nor a
    directory of the user's own among the temporary ones.
    """
    name = f"ola_augment-{_digest()}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    for root in (
        os.environ.get("NUMBA_CACHE_DIR"),
        os.path.join(home, "ola_augment"),
        os.path.join(tempfile.gettempdir(), f"ola_augment-{owner}"),
    ):
        if root and (directory := _writable(Path(root), name)) is not None:
            return directory
    return None


def _writable(root: Path, name: str) -> Path | None:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Code is loaded from here: nobody else may have made it.
        if hasattr(os, "getuid") and root.stat().st_uid not in (os.getuid(), 0):
            return None
        directory = root / name
        directory.mkdir(mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return None
    return directory


def _is_compiled(directory: Path | None, name: str) -> bool:
    return directory is not None and (directory / f"compiled {name}").exists()


def _digest() -> str:
    parts = [platform.python_version(), sys.implementation.cache_tag or "", _cpu()]
    parts += [metadata.version("numba"), metadata.version("llvmlite"), str(_FOLDER)]
    parts += [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NUMBA_")]
    files = [_FOLDER / "kind.py", *sorted((_FOLDER / "loops").glob("*.py"))]
    sources = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256("\n".join(parts).encode() + sources).hexdigest()[:16]


_FOLDER = Path(__file__).parent


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features")))


@contextmanager
def _locked(directory: Path | None) -> Iterator[None]:
    if directory is None or fcntl is None:
        yield
        return
    with open(directory / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


#: By the dtype of the images that they are for; each is compiled when it is first wanted.
KERNELS = {name: CompiledKernels(name) for name in ("uint8", "uint16", "float32")}
if hasattr(os, "register_at_fork"):
    for _kernels in KERNELS.values():
        os.register_at_fork(before=_kernels.load_for_forks, after_in_child=_kernels.renew_lock)


def _compile(directory: str, name: str) -> None:
    """The program: compile into a directory, with the package around the kernels left out."""
    os.nice(5)
    for package_name, path in (("ola_augment", _FOLDER.parent), ("ola_augment.kernels", _FOLDER)):
        package: Any = types.ModuleType(package_name)
        package.__path__ = [str(path)]
        sys.modules[package_name] = package
    sys.path.pop(0)  # this folder, whose files are no top-level modules
    load(Path(directory), name)


if __name__ == "__main__":
    _compile(sys.argv[1], sys.argv[2])
