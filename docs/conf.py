from __future__ import annotations

import logging
import shutil
from importlib.metadata import metadata
from pathlib import Path

project = "virtualcell"
author = metadata(project)["Author"]
release = metadata(project)["Version"]
copyright = f"2026, {author}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinxext.opengraph",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute"]
default_role = "code"  # `name` in a docstring is code

# The notebooks lie in tutorials/. A link to that folder would not do: links between them are followed from where they
# really are.
HERE = Path(__file__).resolve().parent
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "tutorials", HERE / "notebooks", ignore=shutil.ignore_patterns("README.md", ".*"))

# Public is what a subpackage lists in __all__: the API pages follow it by themselves.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Returns"]  # types live in signatures: what stands under "Returns" is prose

# Tutorials are executed by their own check; a page whose figures are drawn here says "force".
nb_execution_mode = "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
bibtex_reference_style = "author_year"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

intersphinx_timeout = 5
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "anndata": ("https://anndata.readthedocs.io/en/stable", None),
    "mudata": ("https://mudata.readthedocs.io/en/latest", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "pandas": ("https://pandas.pydata.org/docs", None),
    "matplotlib": ("https://matplotlib.org/stable", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
    "scipy": ("https://docs.scipy.org/doc/scipy", None),
    "scvi": ("https://docs.scvi-tools.org/en/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
}
nitpicky = True
nitpick_ignore_regex = [
    # other projects' names, which cannot be looked up where their inventories cannot be fetched
    ("py:.*", r"(anndata|collections|matplotlib|mudata|np|numpy|os|pandas|pathlib|pd|scipy|torch|typing)\..*"),
    # types in signatures that are not public, and so have no page
    ("py:class", r"virtualcell\.(\w+\.)?_\w+\.\w+"),
    # a class as its signature writes it: where it comes from cannot be told
    ("py:(class|exc)", r"(AnnData|MuData|Perturbation(Table|Model)|[A-Z]+Network|Screen|Sources|Start|\w+Error)"),
]

html_theme = "sphinx_book_theme"
html_title = "virtualcell"
html_logo = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["virtualcell.css"]
html_theme_options = {
    "repository_url": "https://github.com/virtualcell/virtualcell",
    "use_repository_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # the search box is in the sidebar, once
}
ogp_site_url = "https://virtualcell.readthedocs.io/en/latest/"
ogp_image = "_static/readme.png"
ogp_social_cards = {"enable": False}


class _OfflineIsNoError(logging.Filter):
    """Say, and do not warn, that inventories of other projects cannot be fetched: links to them are then plain text."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "failed to reach any of the inventories" in record.getMessage():
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(_OfflineIsNoError())
