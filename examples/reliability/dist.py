"""Build the distributions, look at what lies in them, and try the wheel where nothing else is.

    python examples/reliability/dist.py --out dist

The wheel is installed without extras into a fresh environment, where the code of the README runs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
#: What no distribution may hold: caches, pictures of the documentation, what runs write.
UNWANTED = re.compile(
    r"__pycache__|\.py[co]$|\.nb[ic]$|\.png$|\.jpg$|(^|/)(runs|_build|generated|\.venv)/"
)
MOST_KILOBYTES = {"wheel": 400, "sdist": 800}
TRIED = """
import runpy, sys, ola_augment
assert "site-packages" in ola_augment.__file__, ola_augment.__file__
sys.argv = ["ola_augment"]
runpy.run_module("ola_augment", run_name="__main__")
"""
#: What needs an extra says which, and imports otherwise.
WITHOUT_EXTRAS = """
import importlib
for name in ("kornia", "testing", "integrations.huggingface", "integrations.lightning"):
    try:
        importlib.import_module("ola_augment." + name)
    except ModuleNotFoundError as missing:
        assert "pip install 'ola_augment[" in str(missing), missing
    else:
        raise AssertionError(f"{name} was imported without its extra")
"""


def build(out: Path) -> dict[str, Path]:
    """The sdist of this checkout and, from it, the wheel."""
    for old in out.glob("ola_augment-*"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def contents(path: Path) -> set[str]:
    """Names of the files in a distribution; without the folder that an sdist has around all."""
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    with tarfile.open(path) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}


def wrong(kind: str, names: set[str]) -> list[str]:
    """What should not be in a distribution, or is not in it and should."""
    found = [f"{kind} holds {name}" for name in sorted(names) if UNWANTED.search(name)]
    package = {
        str(path.relative_to(ROOT).as_posix())
        for path in (ROOT / "ola_augment").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    found += [f"{kind} lacks {name}" for name in sorted(package - names)]
    if kind == "wheel":
        beside = [n for n in names if not re.match(r"ola_augment(-[^/]+\.dist-info)?/", n)]
        found += [f"wheel holds {name}" for name in beside]
        if not any(name.endswith("licenses/LICENSE") for name in names):
            found.append("wheel lacks the licence")
    else:
        needed = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "tests/conftest.py"}
        found += [f"sdist lacks {name}" for name in sorted(needed - names)]
    return found


def try_wheel(wheel: Path, shared: bool) -> None:
    """Install it into an environment of its own and run there what the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
        python = home / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if shared:  # torch and the rest from here, our package from the wheel
            share(home / "venv")
            install.append("--no-deps")
        subprocess.run([*install, wheel], check=True)
        programs = [TRIED, *blocks] if shared else [TRIED, WITHOUT_EXTRAS, *blocks]
        for program in programs:
            subprocess.run([python, "-I", "-c", program], cwd=home, check=True)


def share(environment: Path) -> None:
    """Let an environment see the packages of this one, behind its own."""
    (packages,) = (environment / "lib").glob("python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "shared.pth").write_text(here + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("dist"))
    add("--shared", action="store_true", help="try the wheel with the packages installed here")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    problems = []
    for kind, path in build(options.out.resolve()).items():
        names, size = contents(path), path.stat().st_size / 1000
        print(f"{path.name}: {len(names)} files, {size:.0f} kB", flush=True)
        problems += wrong(kind, names)
        if size > MOST_KILOBYTES[kind]:
            problems.append(f"{kind}: {size:.0f} kB, at most {MOST_KILOBYTES[kind]}")
    print("\n".join(problems), end="\n" if problems else "")
    if not problems:
        try_wheel(next(options.out.resolve().glob("*.whl")), options.shared)
        print("The wheel works in an environment of its own, without extras.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
