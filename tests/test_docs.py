"""The documentation: nothing public is missing, what it shows runs, and its pages have pictures."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTML = ROOT / "docs" / "_build" / "html"
GALLERY = sorted(path.stem for path in (ROOT / "examples").glob("plot_*.py"))
PUBLIC = (
    "",
    ".training",
    ".alignment",
    ".operations",
    ".plots",
    ".testing",
    ".kornia",
    ".integrations.huggingface",
    ".integrations.kornia",
    ".integrations.lightning",
    ".integrations.mixup",
    ".integrations.pairs",
    ".integrations.timm",
)


def public(module):
    """Public name -> what it is."""
    try:
        found = importlib.import_module("ola_augment" + module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("ola_augment"):
            raise
        pytest.skip(f"{missing.name} is not installed")
    return {name: getattr(found, name) for name in found.__all__}


def documented():
    """Names of every auto directive."""
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("**/*.md"))
    return {name.split(".")[-1] for name in re.findall(r"auto\w+:: ([\w.]+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_place_in_the_api(module):
    names = set(public(module))
    assert names <= documented(), f"not in docs/api: {sorted(names - documented())}"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_class_has_an_example(module):
    classes = [found for found in public(module).values() if inspect.isclass(found)]
    bare = [c.__name__ for c in classes if "Example:\n" not in c.__doc__ or ">>>" not in c.__doc__]
    assert not bare


def described(doc):
    """Names with a description in the sections Args and Attributes."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?: {4}.*\n|\n)+)", doc + "\n", re.MULTILINE)
    heads = re.findall(r"^ {4}([\w, ]+?)(?: \(.*?\))?:", "".join(sections), re.MULTILINE)
    return {name for head in heads for name in head.split(", ")}


def methods(kind):
    """Public methods that are ours, with their names; not what a framework's class has as well."""
    theirs = {
        name
        for base in kind.__mro__
        if not base.__module__.startswith("ola_augment")
        for name in vars(base)
    }
    for base in kind.__mro__:
        if base.__module__.startswith("ola_augment"):
            for name, value in vars(base).items():
                function = getattr(value, "__func__", value)
                ours = not name.startswith("_") and name not in theirs
                if ours and inspect.isfunction(function):
                    yield f"{kind.__name__}.{name}", function


def incomplete(name, function, doc):
    """What a docstring does not say of a function or class."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters if p not in ("self", "cls")]
    found = [f"{name}: {p}" for p in parameters if p not in described(doc)]
    if inspect.isclass(function):
        return found
    returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if returns and "Returns:\n" not in doc and "Yields:\n" not in doc:
        found.append(f"{name}: what it returns")
    try:
        source = inspect.getsource(function)
    except OSError:  # made by a decorator of hypothesis
        return found
    if re.search(r"^\s+raise \w", source, re.MULTILINE) and "Raises:\n" not in doc:
        found.append(f"{name}: what it raises")
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_parameter_is_described(module):
    missing = []
    for name, found in public(module).items():
        if inspect.isclass(found) and issubclass(found, Exception):
            continue  # has no parameters of its own
        if inspect.isclass(found):
            missing += incomplete(name, found, inspect.getdoc(found))
            for method, function in methods(found):
                missing += incomplete(method, function, inspect.getdoc(function) or "")
        elif callable(found):
            missing += incomplete(name, found, inspect.getdoc(found))
    assert not missing


def test_no_argument_is_described_elsewhere():
    """Who reads ``help(function)`` wants to know there, not to be sent away."""
    away = r"^ +[a-z_, ]+: (?:see :|as (?:for|there|in|of)\b).*"
    lines = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "ola_augment").rglob("*.py")
        for line in re.findall(away, path.read_text(), re.MULTILINE)
        if "Table 3" not in line
    ]
    assert not lines


def test_pages_are_reached_from_the_first():
    docs = ROOT / "docs"
    found, todo = set(), ["index"]
    while todo:
        page = todo.pop()
        if page in found:
            continue
        found.add(page)
        path = docs / f"{page}.md"
        if path.exists():
            for tree in re.findall(r"```\{toctree\}(.*?)```", path.read_text(), re.DOTALL):
                entries = [line for line in tree.split() if not line.startswith(":")]
                todo += [str((path.parent / entry).relative_to(docs)) for entry in entries]
    pages = {str(path.relative_to(docs))[:-3] for path in docs.glob("**/*.md")}
    lost = {
        page for page in pages - found if not re.search(r"(^|/)_|generated|^auto_examples", page)
    }
    assert not lost


def test_the_loop_of_the_readme_runs_when_it_is_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        learner = names["learner"]  # random images: what it finds may be nothing
        assert learner.settled
        assert learner.evidence().pairs >= 10
        assert learner.evidence().strength is not None


@pytest.mark.skipif(not HTML.exists(), reason="the documentation is not built (make docs)")
@pytest.mark.parametrize("script", GALLERY)
def test_every_page_of_the_gallery_has_a_picture(script):
    page = (HTML / "auto_examples" / f"{script}.html").read_text()
    assert re.search(rf'<img[^>]+src="[^"]*sphx_glr_{script}_\d+', page)
    assert "&lt;Figure size" not in page


@pytest.mark.skipif(not HTML.exists(), reason="the documentation is not built (make docs)")
def test_built_pages_need_no_network():
    """Scripts, styles and pictures are their own; links may lead out."""
    for page in HTML.glob("**/*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not loaded, page


def test_the_paper_map_leads_where_it_says():
    text = (ROOT / "docs" / "paper_map.md").read_text()
    cells = re.findall(r"((?:`[\w.]+`(?:, )?)+) \(`([\w./]+\.py)`\)", text)
    assert len(cells) > 12
    for names, path in cells:
        code = (ROOT / path).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", code), f"{name} in {path}"
    for path in re.findall(r"`((?:ola_augment|examples|tests)/[\w./]+\.py)`", text):
        assert (ROOT / path).exists(), path
