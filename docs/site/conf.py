"""The site of the manual, from the pages as they are: `make site`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY), str(HERE)]

import messages  # noqa: E402

import deca_ds  # noqa: E402

project, release = "deca_ds", deca_ds.__version__
root_doc = "docs/site/index"
include_patterns = ["*.md", "docs/**.md", "examples/**.md", "benchmarks/**.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
html_theme = "furo"
html_title = f"deca_ds {release}"
html_show_copyright = html_show_sourcelink = False

(HERE / "messages.md").write_text(messages.page(REPOSITORY / "deca_ds"), encoding="utf-8")
