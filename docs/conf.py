"""Sphinx: `sphinx-build -W -b html docs docs/_build/html` builds the documentation.

Nothing is loaded from the network, neither by the build nor by the pages it makes.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
# The pages that run do so in processes of their own, with the same files.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import adamr  # noqa: E402

project = "adamr"
author = "The adamr authors"
project_copyright = f"2026, {author}"
release = version = adamr.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "forge",
    "lessons",
    "mathml",
    "tables",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autosummary_generate = False
toc_object_entries_show_parents = "hide"
autodoc_typehints = "none"  # Args say it in words, with shapes and ranges
default_role = "literal"
maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Attributes", "params_style"),
    ("Extra arguments", "params_style"),
]

copybutton_selector = "div:not(.output) > div.highlight pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "adamr"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/adamr-jax/adamr",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "footer_content_items": ["copyright"],
}
forge_root = "https://github.com/adamr-jax/adamr"
forge_branch = "main"
