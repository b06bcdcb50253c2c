"""Both ends of the supported versions: the tests that would notice, with each, and a table.

    python examples/reliability/matrix.py --out runs/matrix

Each version is installed beside this environment, into a folder of its own that comes first on the
path (torch with its torchvision takes some gigabytes).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATIONS = ("test_operations_exact.py", "test_single.py", "test_table.py")
TORCH = (
    "test_alignment.py",
    "test_alignment_rules.py",
    "test_alignment_norms.py",
    "test_learner.py",
    "test_policy.py",
    "test_torchvision_contract.py",
    "test_transforms.py",
    "test_updater.py",
)
#: What is installed, and the tests that see it.
VERSIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("pillow==10.1.0",): OPERATIONS,
    ("pillow==11.3.0",): OPERATIONS,
    ("pillow==12.0.0",): OPERATIONS,
    ("pillow",): OPERATIONS,
    ("numpy==1.26.4",): (*OPERATIONS, "test_draw.py", "test_files.py"),
    ("torch==2.8.0", "torchvision==0.23.0"): TORCH,
}
SHOWN = "import torch, torchvision, PIL, numpy; print(torch.__version__.split('+')[0], "
SHOWN += "torchvision.__version__.split('+')[0], PIL.__version__, numpy.__version__)"


def run(packages: tuple[str, ...], tests: tuple[str, ...], out: Path) -> str:
    """Install, test; a row of the table."""
    folder = out / re.sub(r"\W+", "-", "-".join(packages))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    if not folder.exists():
        needed = [] if packages[0].startswith("torch") else ["--no-deps"]
        subprocess.run([*install, *needed, *packages], check=True)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    shown = subprocess.run(
        [sys.executable, "-c", SHOWN], env=environment, check=True, capture_output=True, text=True
    )
    command = [sys.executable, "-m", "pytest", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout):
        found[what] = int(count)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
    bad = found["failed"] + found["error"] or done.returncode
    versions = " | ".join(shown.stdout.split())
    return (
        f"| {'.'.join(map(str, sys.version_info[:3]))} | {versions} | {found['passed']} | {bad} |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--only", default="", help="packages whose name holds this text")
    options = parser.parse_args(arguments)
    rows = []
    for packages, tests in VERSIONS.items():
        if options.only in " ".join(packages):
            rows.append(run(packages, tests, options.out.resolve()))
            print(rows[-1], flush=True)
    print("\n| Python | torch | torchvision | Pillow | NumPy | passed | failed |")
    print("|---|---|---|---|---|---:|---:|")
    print("\n".join(rows))
    return int(any(not row.endswith("| 0 |") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
