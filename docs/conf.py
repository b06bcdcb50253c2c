"""Sphinx configuration."""

import importlib.metadata

project = "ola_augment"
author = "The ola_augment developers"
copyright = author
version = release = importlib.metadata.version("ola_augment")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = "ola_augment"
exclude_patterns = ["_build", "_*.md", "auto_examples/README.rst"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"(^|/)(?!plot_)\w+\.py$|benchmarks",
    "download_all_examples": False,
    "show_memory": False,
}
