"""The package as it is installed and imported."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ola_augment
from ola_augment import __main__ as command

ROOT = Path(__file__).parents[1]


def test_public_names_exist_and_are_documented():
    for name in ola_augment.__all__:
        assert getattr(ola_augment, name).__doc__, name
    assert list(ola_augment.__all__) == sorted(ola_augment.__all__)


def test_import_leaves_heavy_optional_packages_out():
    heavy = ["backpack", "matplotlib", "sklearn", "lightning", "transformers", "timm", "kornia"]
    heavy += ["hypothesis", "numpy.typing"]
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


def test_the_command_prints_versions(capsys):
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ola_augment {ola_augment.__version__}"
    assert {"torch", "torchvision", "numba", "pillow"} <= {line.split()[0] for line in lines}
    with pytest.raises(SystemExit, match="0"):
        command.main(["--version"])
    assert capsys.readouterr().out == lines[0] + "\n"


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("ola_augment.kornia", "kornia", "kornia"),
        ("ola_augment.testing", "hypothesis", "testing"),
        ("ola_augment.integrations.huggingface", "transformers", "huggingface"),
        ("ola_augment.integrations.lightning", "lightning", "lightning"),
        ("ola_augment.integrations.mixup", "timm", "timm"),
        ("ola_augment.plots", "matplotlib", "demo"),
    ],
)
def test_a_missing_extra_is_named(module, missing, extra, monkeypatch):
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in (missing, "pytorch_lightning"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    ours = (module, f"ola_augment.integrations.{missing}")
    for name in [*sys.modules]:
        if name.split(".")[0] == missing or name.startswith(ours):
            monkeypatch.delitem(sys.modules, name)

    def use():
        plots = importlib.import_module(module)
        plots.augmented_samples(ola_augment.UniformAugment(), torch.full((1, 3, 8, 8), 9).byte())

    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'ola_augment\[{extra}\]'"):
        use()


def test_extras_that_are_named_exist():
    toml = (ROOT / "pyproject.toml").read_text()
    known = set(re.findall(r"^(\w+) = \[", toml.split("optional-dependencies]")[1], re.MULTILINE))
    for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("ola_augment/**/*.py")]:
        named = re.findall(r"ola_augment\[(\w+(?:,\w+)*)\]", file.read_text(encoding="utf-8"))
        assert {extra for names in named for extra in names.split(",")} <= known | {"extra"}, file


def test_workflows_call_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = [*(ROOT / ".github" / "workflows").glob("*.yml")]
    assert len(workflows) >= 2
    for workflow in workflows:
        called = re.findall(r"\bmake ([a-z-]+)", workflow.read_text())
        assert called, workflow
        assert set(called) <= targets, workflow


def test_supported_versions_are_those_that_are_tested():
    toml = (ROOT / "pyproject.toml").read_text()
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', toml)[1]
    torch_version = re.search(r'"torch>=([\d.]+)"', toml)[1]
    vision_version = re.search(r'"torchvision>=([\d.]+)"', toml)[1]
    assert f'python: "{oldest}"' in tests
    assert f"torch=={torch_version}." in tests
    assert f"torchvision=={vision_version}." in tests


def test_the_version_has_one_home():
    version = ola_augment.__version__
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_distributions_that_lack_or_hold_too_much_are_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reliability")
    import dist

    package = {str(path.relative_to(ROOT)) for path in (ROOT / "ola_augment").rglob("*.py")}
    package |= {"ola_augment/py.typed", "ola_augment-1.dist-info/licenses/LICENSE"}
    assert dist.wrong("wheel", package) == []
    bad = package - {"ola_augment/space.py"} | {"tests/a.py", "ola_augment/a.png"}
    assert dist.wrong("wheel", bad) == [
        "wheel holds ola_augment/a.png",
        "wheel lacks ola_augment/space.py",
        "wheel holds tests/a.py",
    ]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("ola_augment/a.py", "")
    assert dist.contents(tmp_path / "a.whl") == {"ola_augment/a.py"}
