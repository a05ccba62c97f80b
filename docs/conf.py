"""Sphinx: guides in Markdown (MyST), the reference from the docstrings (autodoc, Google style). ``make docs`` builds; warnings are errors.

The build needs no network: no inventories of other projects are fetched.
"""

import influence_ext

project = "influence_ext"
author = "the influence_ext authors"
copyright = author
version = release = influence_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["examples/**"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Reference", "notes_style"), ("Statistics", "notes_style")]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "inherited-members": "Module,Exception"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = f"influence_ext {release}"
html_static_path: list[str] = []
html_show_sphinx = False
