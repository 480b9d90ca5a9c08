"""Settings of the documentation: python -m sphinx -W --keep-going -b html docs docs/_build"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / "_ext"), str(Path(__file__).resolve().parents[1])]

project = "mscm"
author = "the mscm authors"
copyright = "the mscm authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "mathml", "docstrings", "reference"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures are those of the source
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}

highlight_language = "text"  # of what names no language: equations in docstrings
html_math_renderer = "mathml"
# Names of types in signatures are those of the source, where two modules may each have a Plan.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = "mscm"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_copy_source = False
