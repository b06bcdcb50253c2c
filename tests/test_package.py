"""The package as it is installed and imported."""

import re
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
    heavy = ["backpack", "matplotlib", "sklearn", "lightning", "transformers", "timm", "kornia"]
    heavy += ["hypothesis"]
    code = f"""
import sys, ola_augment, ola_augment.alignment, ola_augment.training
print([m for m in {heavy} if m in sys.modules])
assert ola_augment.BackPACKAlignment is ola_augment.alignment.BackPACKAlignment
print("backpack" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "True"]


def _imported(layer):
    """File -> the parts of the package that it imports."""
    path = ROOT / "ola_augment" / layer
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    pattern = re.compile(r"^\s*(?:from|import) ola_augment\.(\w+)", re.MULTILINE)
    return {file: set(pattern.findall(file.read_text())) for file in files}


def test_imports_run_one_way():
    layers = [
        "kernels",
        "operation",
        "space",
        "actions",
        "draw",
        "summary",
        "logits",
        "streams",
        "policy",
    ]
    layers.insert(layers.index("policy"), "streams")
    layers += [
        "files",
        "operations",
        "transforms",
        "training",
        "plots",
        "testing",
        "integrations",
        "kornia",
    ]
    for level, layer in enumerate(layers):
        for file, imported in _imported(layer).items():
            assert not imported & set(layers[level + 1 :]), f"{file} imports {imported}"
    for file, imported in _imported("alignment").items():
        assert imported <= {"alignment"}, f"{file} imports {imported}"


def test_rooms_of_the_alignments():
    below = {
        "calls": {"calls"},
        "proof": {"calls", "proof"},
        "method": {"calls", "proof", "method"},
    }
    root = Path(ola_augment.__file__).parent / "alignment"
    for room, known in below.items():
        for file in (root / room).rglob("*.py"):
            text = file.read_text()
            imported = set(re.findall(r"ola_augment\.alignment\.([a-z]+)", text))
            assert imported <= known, f"{file} imports {imported}"
            if room == "method":  # through the door
                assert "ola_augment.alignment.proof." not in text, file
    assert not [file for file in root.rglob("*.py") if len(file.read_text().splitlines()) > 300]
