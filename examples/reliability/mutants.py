"""Mutation testing, bounded: change one expression of a module and see whether its tests notice.

    python examples/reliability/mutants.py --each 10

Draws that many mutants of each module below and runs, in a copy of the repository, its tests that
reach the changed line, or that start processes, which may; the quick ones first. Prints
the survivors, and exits with 1 if fewer than 90 % were noticed. Needs `os.fork`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[2]
_RULES = "test_alignment test_alignment_rules test_alignment_norms"
#: Module -> the tests that must notice.
MODULES = {
    "training/policy_gradient.py": "test_updater test_updater_survives test_bad_values test_values",
    "training/updater.py": "test_updater test_updater_survives test_bad_values test_values",
    "training/reward.py": "test_updater test_updater_survives test_values",
    "training/values.py": "test_values",
    "training/thermostat.py": "test_learner test_updater_survives",
    "training/learner.py": "test_learner test_updater_survives",
    "training/signals.py": "test_learner test_updater",
    "files.py": "test_files test_files_survive test_learner",
    **{
        f"policy/{file}.py": "test_policy test_draw test_bad_values test_policies_in_models "
        "test_files test_values test_watch"
        for file in ("base", "learned", "fixed")
    },
    "actions.py": "test_bad_values test_policy",
    "space.py": "test_space test_bad_values test_files",
    "operation.py": "test_space test_bad_values test_operations_custom",
    "kernels/table.py": "test_table test_space test_operations_exact",
    "alignment/method/rules/layers.py": _RULES,
    "alignment/method/rules/normalization.py": _RULES,
    "alignment/method/rules/generic.py": _RULES,
}
#: What the tests import and no mutant changes: once, before the forks.
IMPORTS = ("torch", "torchvision.transforms.v2", "numba", "PIL.Image", "sklearn")
OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or,
    ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}  # fmt: skip
QUIET = ("-q", "--no-header", "-p", "no:cacheprovider")
#: Replaces a line that no test ran in its own process.
_UNSEEN = 0
#: Seconds of processor time after which a mutant counts as noticed: it runs for ever.
LIMIT = 120


def places(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Numbers of the nodes, in the order of `ast.walk`, that a mutation can change, and how."""
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
        for inner in ast.walk(part)
    }
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in annotations:
            continue
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OTHER:
            yield number, "operator"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            yield number, "comparison"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield number, "constant"
        elif isinstance(node, (ast.If, ast.IfExp)):
            yield number, "condition"


def mutate(tree: ast.Module, number: int) -> tuple[ast.Module, int]:
    """A changed copy, and the line that changed."""
    tree = copy.deepcopy(tree)
    node = list(ast.walk(tree))[number]
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        node.op = OTHER[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = OTHER[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    else:
        node.test = ast.UnaryOp(ast.Not(), node.test)
    return ast.fix_missing_locations(tree), node.lineno


def statement(tree: ast.Module, line: int) -> range:
    """Lines of the innermost statement, or head of one, that a line belongs to."""
    found = range(line, line + 1)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno
            if node.lineno <= line <= max(end, node.lineno):
                found = range(node.lineno, max(end, node.lineno) + 1)
    return found


def forked(work: Callable[[], int]) -> int:
    """Exit status of a function in a process of its own, silent and limited."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that wait for one that is gone
        return status
    status = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        signal.alarm(5 * LIMIT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = int(work())
    finally:
        os._exit(status)


class Seconds:
    """Of each test function, for pytest, and which ones had processes of their own."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self.parents: set[str] = set()
        self._of_children = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("[")[0]
        self.of[name] = self.of.get(name, 0) + report.duration
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if used.ru_utime + used.ru_stime > self._of_children:
            self._of_children = used.ru_utime + used.ru_stime
            self.parents.add(name)


def reached(module: str, tests: list[str], folder: Path) -> dict[int, list[str]]:
    """Line of a module -> the test functions that may run it, the quick ones first.

    What a test's own processes run is not seen; they may run every line.
    """
    found = folder / "reached.txt"

    def work() -> int:
        watched = str(Path("ola_augment", module).resolve())
        recorder = coverage.Coverage(data_file=None, include=[watched], config_file=False)
        recorder.set_option("run:dynamic_context", "test_function")
        seconds = Seconds()
        with recorder.collect():
            failed = pytest.main([*QUIET, "-k", "not every_bin", *tests], [seconds])
        lines = recorder.get_data().contexts_by_lineno(watched)
        quick_first = sorted(seconds.of, key=seconds.of.__getitem__)
        parents = {name.rsplit("::", 1)[-1] for name in seconds.parents}
        lines[_UNSEEN] = []
        with found.open("w") as file:
            for line, contexts in lines.items():
                # A line that runs while a module is imported concerns all tests.
                names = {context.rsplit(".", 1)[-1] for context in contexts} | parents
                chosen = [n for n in quick_first if "" in names or n.rsplit("::", 1)[-1] in names]
                file.write(f"{line} {' '.join(chosen)}\n")
        return int(failed)

    if forked(work):
        raise SystemExit(f"the tests of {module} fail without a mutation")
    rows = (row.split() for row in found.read_text().splitlines())
    return {int(line): names for line, *names in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    options = parser.parse_args()
    killed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "_build", ".*_cache", ".numba*")
        shutil.copytree(ROOT, copied, ignore=ignored)
        os.environ |= {"PYTHONPATH": str(copied), "OMP_NUM_THREADS": "1"}
        os.chdir(copied)
        sys.path[:] = [str(copied), *(entry for entry in sys.path if entry != str(ROOT))]
        for name in IMPORTS:
            importlib.import_module(name)
        sys.dont_write_bytecode = True
        for module in options.modules:
            start = time.perf_counter()
            chance = random.Random(f"{options.seed} {module}")
            path = copied / "ola_augment" / module
            source = path.read_text()
            tree = ast.parse(source)
            tests = [f"tests/{name}.py" for name in MODULES[module].split()]
            lines = reached(module, tests, Path(folder))
            found = list(places(tree))
            own = 0
            chosen = chance.sample(found, min(options.each, len(found)))
            for number, kind in chosen:
                mutant, line = mutate(tree, number)
                path.write_text(ast.unparse(mutant))
                names = [lines.get(near, lines[_UNSEEN]) for near in statement(tree, line)]
                selected = list(dict.fromkeys(name for group in names for name in group))
                arguments = [*QUIET, "-x", *selected]
                noticed = bool(selected) and bool(forked(lambda a=arguments: pytest.main(a)))
                own += noticed
                if not noticed:
                    text = source.splitlines()[line - 1].strip()
                    print(f"survivor: {module}:{line} ({kind}): {text}", flush=True)
            path.write_text(source)
            spent = time.perf_counter() - start
            print(f"{module}: {own} of {len(chosen)} noticed, {spent:.0f} s", flush=True)
            killed, total = killed + own, total + len(chosen)
    print(f"{killed} of {total} mutants noticed ({100 * killed / total:.0f} %)")
    return 0 if killed >= 0.9 * total else 1


if __name__ == "__main__":
    sys.exit(main())
