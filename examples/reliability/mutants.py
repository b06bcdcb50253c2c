"""Mutation testing, bounded: change one expression of a module and see whether its tests notice.

    python examples/reliability/mutants.py --each 10

Draws so many mutants of each module below, runs that module's tests on each in a copy of the
repository, and prints the survivors. Exits with 1 if fewer than 90 % were noticed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Module -> the tests that must notice.
MODULES = {
    "training/updater.py": "test_updater test_updater_survives test_bad_values",
    "training/reward.py": "test_updater test_updater_survives",
    "training/learner.py": "test_learner test_updater_survives",
    "training/signals.py": "test_learner test_resume",
    "files.py": "test_files test_files_survive test_learner",
    "policy.py": "test_policy test_bad_values test_policies_in_models",
    "actions.py": "test_bad_values test_policy test_workers",
    "space.py": "test_space test_bad_values test_files",
    "kernels/table.py": "test_table test_operations_exact test_space",
    "alignment/rules/layers.py": "test_alignment test_alignment_rules test_alignment_norms",
}
OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or,
    ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}  # fmt: skip


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    killed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "_build", ".*_cache")
        shutil.copytree(ROOT, copied, ignore=ignored)
        environment = {**os.environ, "PYTHONPATH": str(copied), "OMP_NUM_THREADS": "1"}
        for module in options.modules:
            path = copied / "ola_augment" / module
            source = path.read_text()
            tree = ast.parse(source)
            found = list(places(tree))
            tests = [f"tests/{name}.py" for name in MODULES[module].split()]
            own = 0
            chosen = chance.sample(found, min(options.each, len(found)))
            for number, kind in chosen:
                mutant, line = mutate(tree, number)
                path.write_text(ast.unparse(mutant))
                command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *tests]
                try:
                    noticed = subprocess.run(
                        command, cwd=copied, env=environment, capture_output=True, timeout=120
                    ).returncode
                except subprocess.TimeoutExpired:
                    noticed = True
                own += bool(noticed)
                if not noticed:
                    text = source.splitlines()[line - 1].strip()
                    print(f"survivor: {module}:{line} ({kind}): {text}", flush=True)
            path.write_text(source)
            print(f"{module}: {own} of {len(chosen)} noticed", flush=True)
            killed, total = killed + own, total + len(chosen)
    print(f"{killed} of {total} mutants noticed ({100 * killed / total:.0f} %)")
    return 0 if killed >= 0.9 * total else 1


if __name__ == "__main__":
    sys.exit(main())
