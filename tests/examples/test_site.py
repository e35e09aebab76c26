"""What the site is made of exists; that it comes without a warning is `make site`'s business."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "deca_ds"
SITE = REPOSITORY / "docs/site"
MESSAGES = runpy.run_path(str(SITE / "messages.py"))
VARIES = MESSAGES["VARIES"]


def test_the_messages_of_the_failure_guide_are_the_codes():
    """Word by word; what varies in the code varies in the guide."""
    guide = (REPOSITORY / "docs/failures.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Find a message$(.*?)^## ", guide, re.M | re.S)
    listed = re.findall(r"^\| `(.*?)` \|", section, re.M)
    assert len(listed) == len(set(listed)) == section.count("\n| `")
    code = set(MESSAGES["texts"](PACKAGE))
    for message in listed:
        words = re.compile(".*".join(map(re.escape, message.split(VARIES))), re.S)
        assert any(words.fullmatch(text) for text in code), message


def test_every_error_has_its_place_on_the_page_of_messages():
    page = MESSAGES["page"](PACKAGE)
    entries = page.count("\n: ")
    assert entries == len(set(MESSAGES["errors"](PACKAGE))) > 250
    assert "``of RANK and WORLD_SIZE only one is set``\n: set both; for one process unset both (`deca" in page


def test_the_site_has_every_page_of_the_manual():
    entries = re.findall(r"^\.\./\S+$", (SITE / "index.md").read_text(), re.M)
    pages = {(SITE / entry).resolve() for entry in entries}
    assert all(page.with_suffix(".md").is_file() for page in pages)
    patterns = ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    found = {path.with_suffix("") for pattern in patterns for path in REPOSITORY.glob(pattern)}
    assert found <= pages, "docs/site/index.md has the order of the pages"


def test_the_names_for_python_code_exist_and_are_described():
    names = re.findall(r"^\.\. auto\w+:: (\S+)$", (SITE / "api.md").read_text(), re.M)
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
