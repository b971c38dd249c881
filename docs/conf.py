from __future__ import annotations

from importlib.metadata import metadata

project = "virtualcell"
author = metadata(project)["Author"]
release = metadata(project)["Version"]
copyright = f"2026, {author}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute"]
default_role = "code"  # `name` in a docstring is code

# Public is what a subpackage lists in __all__: the API pages follow it by themselves.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Returns"]  # types live in signatures: what stands under "Returns" is prose

nb_execution_mode = "off"  # tutorials are executed by their own check, not while the pages are built
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "virtualcell"
html_logo = "_static/logo.svg"
html_static_path = ["_static"]
html_theme_options = {
    "repository_url": "https://github.com/virtualcell/virtualcell",
    "use_repository_button": True,
    "show_navbar_depth": 1,
}
