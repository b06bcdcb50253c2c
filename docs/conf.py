"""Sphinx configuration. Nothing here needs a network: maths are MathML, links have an inventory."""

import importlib.metadata
import sys
import zlib
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed
sys.path.insert(0, str(Path(__file__).parent))
import catalogue

HERE = Path(__file__).parent

project = "ola_augment"
author = "The ola_augment developers"
copyright = author
version = release = importlib.metadata.version("ola_augment")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = "ola_augment"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
exclude_patterns = [
    "_build",
    "_*.md",
    "generated",
    "auto_examples/README.rst",
    "**sg_execution_times.rst",
]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# What docstrings name in single backticks is code, and a link where it can be.
default_role = "py:obj"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"(^|/)(?!plot_)\w+\.py$|benchmarks",
    "download_all_examples": False,
    "image_scrapers": ("gallery",),
    "show_memory": False,
    # That page loads its table from elsewhere.
    "write_computation_times": False,
}

#: Where torch documents what our signatures name; a local inventory, so that no build asks for it.
TORCH = {
    "Tensor": "tensors.html#torch.Tensor",
    "nn.Module": "generated/torch.nn.Module.html#torch.nn.Module",
    "torch.Generator": "generated/torch.Generator.html#torch.Generator",
    "torch.Tensor": "tensors.html#torch.Tensor",
    "torch.amp.GradScaler": "amp.html#torch.amp.GradScaler",
    "torch.device": "tensor_attributes.html#torch.device",
    "torch.dtype": "tensor_attributes.html#torch.dtype",
    "torch.nn.Module": "generated/torch.nn.Module.html#torch.nn.Module",
    "torch.nn.modules.module.Module": "generated/torch.nn.Module.html#torch.nn.Module",
    "torch.nn.parameter.Parameter": (
        "generated/torch.nn.parameter.Parameter.html#torch.nn.parameter.Parameter"
    ),
    "torch.optim.Optimizer": "optim.html#torch.optim.Optimizer",
    "torch.optim.optimizer.Optimizer": "optim.html#torch.optim.Optimizer",
    "torch.utils.data.DataLoader": "data.html#torch.utils.data.DataLoader",
}


def inventory(path, entries):
    """Write Sphinx's inventory file, version 2."""
    head = "# Sphinx inventory version 2\n# Project: torch\n# Version: \n# The rest is zlib.\n"
    lines = "".join(f"{name} py:class 1 {where} -\n" for name, where in entries.items())
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress(lines.encode()))
    return path


intersphinx_mapping = {
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        str(inventory(HERE / "_build" / "torch.inv", TORCH)),
    )
}


def mathml(self, node):
    """Write a formula as MathML, which browsers draw without scripts or fonts of ours."""
    display = node.__class__.__name__ == "math_block"
    text = latex2mathml.converter.convert(node.astext(), display="block" if display else "inline")
    self.body.append(f'<div class="math">{text}</div>' if display else text)
    raise nodes.SkipNode


def classify_cells(app, doctree):
    """Short cells, numbers above all, stay on one line; long ones may be broken anywhere."""
    for entry in doctree.findall(nodes.entry):
        length = len(entry.astext())
        entry["classes"] += ["short"] * (length <= 16) + ["long"] * (length > 100)


def setup(app):
    """Formulas without a network, and what is generated from the package."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None)
    )
    app.connect("doctree-read", classify_cells)
    app.connect("builder-inited", lambda app: catalogue.write(HERE / "generated"))


html_math_renderer = "mathml"
