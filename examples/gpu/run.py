"""Everything that wants a GPU, in one command that ends within some minutes, as one table.

    python examples/gpu/run.py                         # or: make gpu
    python examples/gpu/run.py --data imagefolder:CIFAR.zip --wheels WHEELS
    python examples/gpu/run.py --device cpu --quick    # tries the script itself

Needs torch and torchvision, nothing from a network, and says what else is missing for a part.
``--wheels`` installs packages from a folder of wheels first. Each part is a process of its own with
a limit, so that one that fails or hangs costs the table its rows and no others; the table is
written anew after each. Exits with 1 if a goal is missed; ``--quick`` judges no speed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MINUTES = 7.5
#: part -> (modules it needs beyond torch, the most seconds it may take of MINUTES)
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "operations": (("torchvision", "PIL", "tqdm"), 90),
    "engine": (("torchvision", "PIL", "tqdm"), 90),
    "ranks": (("torchvision", "PIL", "tqdm"), 45),
    "speed": (("torchvision", "PIL", "tqdm"), 90),
    "table2": (("torchvision", "PIL", "tqdm", "matplotlib", "scipy", "sklearn"), 400),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="a few images and steps: tries the script itself")
    add("--minutes", type=float, default=MINUTES, help="for all parts together")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--data", default="digits", help="for Table 2 in miniature, as in examples/train.py")
    add("--wheels", type=Path, help="a folder from which missing packages are installed")
    add("--out", type=Path, default=Path("runs/gpu"))
    add("--only", choices=PARTS, help=argparse.SUPPRESS)  # a part, in the process that it gets
    add("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def install(wheels: Path) -> str:
    """Install wheels into a folder of their own, behind what is there already; its path."""
    site = tempfile.mkdtemp(prefix="ola-augment-wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    subprocess.run([*command, "--no-compile", "--target", site, *files], check=True)
    return site


def missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def run_part(part: str, options: argparse.Namespace, limit: float, path: str) -> list[dict]:
    """The rows of a part; a last one says why it ended early, if it did."""
    needed = missing(PARTS[part][0])
    if needed:
        return [row(part, "", f"not run: {', '.join(needed)} is not installed")]
    command = [sys.executable, str(HERE / "run.py"), "--only", part, "--device", options.device]
    command += ["--data", options.data, "--out", str(options.out), "--seconds", f"{limit - 5:.0f}"]
    command += ["--quick"] * options.quick
    log = options.out / f"{part}.log"
    ended = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            if process.wait(limit):
                ended = f"stopped with exit status {process.returncode}, see {log.name}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"stopped after {limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    if ended:
        rows.append(row(part, "", ended) | {"ok": False})
    return rows


def row(part: str, what: str, found: str) -> dict:
    return {"part": part, "what": what, "found": found, "goal": "", "ok": None}


def machine(device: str) -> str:
    """The card and the versions, as one line."""
    import torch

    packages = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
        packages.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    today = datetime.date.today().isoformat()
    return f"{name}; {', '.join(packages)}; {today}"


def table(rows: list[dict], head: str, seconds: float) -> str:
    marks = {True: "yes", False: "**no**", None: ""}
    lines = [f"{head}; {seconds:.0f} s in all.", "", "| part | what | found | goal | met |"]
    lines.append("|---|---|---|---|---|")
    for r in rows:
        cells = [r["part"], r["what"], r["found"], r["goal"], marks[r["ok"]]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def collect(options: argparse.Namespace) -> int:
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    if options.wheels:
        site = install(options.wheels)
        sys.path.append(site)
        path += os.pathsep + site
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("torch sees no CUDA device here; --device cpu --quick tries the script itself")
            return 1
    head, rows = machine(options.device), []
    for part in options.part:
        left = 60 * options.minutes - (time.monotonic() - start)
        if left < 15:
            rows.append(row(part, "", "no time left"))
            continue
        limit = PARTS[part][1] * max(1.0, options.minutes / MINUTES)
        found = run_part(part, options, min(left, limit), path)
        rows += found
        text = table(rows, head, time.monotonic() - start)
        (options.out / "gpu.md").write_text(text)
        for r in found:
            print(f"{r['part']}: {r['what']}: {r['found']}", flush=True)
    print("\n" + (options.out / "gpu.md").read_text())
    return int(any(r["ok"] is False for r in rows))


def run_only(options: argparse.Namespace) -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    part = importlib.import_module(options.only)
    if options.only == "table2":
        part.main(options, options.out)
    else:
        part.main(options.device, options.quick)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.only:
        run_only(options)
        return 0
    return collect(options)


if __name__ == "__main__":
    sys.exit(main())
