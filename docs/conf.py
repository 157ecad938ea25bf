"""Sphinx settings: pages in Markdown, the API from docstrings."""

from mla_fp8 import __version__

project = "mla_fp8"
author = "the mla_fp8 authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_show_copyright = False
default_role = "any"
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say more than Any
autodoc_member_order = "bysource"
autodoc_mock_imports = ["torch"]  # the modules that import it are documented without it
napoleon_google_docstring = False
napoleon_use_rtype = False
