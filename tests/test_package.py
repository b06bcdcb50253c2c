"""The package as it is installed and imported."""

import subprocess
import sys
from pathlib import Path

import ola_augment

ROOT = Path(__file__).parents[1]


def test_public_names_exist_and_are_documented():
    for name in ola_augment.__all__:
        assert getattr(ola_augment, name).__doc__, name
    assert list(ola_augment.__all__) == sorted(ola_augment.__all__)


def test_import_leaves_heavy_optional_packages_out():
    code = (
        "import sys, ola_augment; print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_imports_run_one_way():
    layers = ["space", "actions", "operations", "policy", "annotations", "transforms", "training"]
    for level, layer in enumerate(layers):
        path = ROOT / "ola_augment" / layer
        files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            text = file.read_text()
            for later in layers[level + 1 :]:
                assert f"ola_augment.{later} import" not in text, f"{file} imports {later}"
    for file in (ROOT / "ola_augment" / "alignment").rglob("*.py"):
        for other in (*layers, "updater", "reward"):
            assert f"ola_augment.{other} import" not in file.read_text(), file
