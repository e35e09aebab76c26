"""Write the keys of docs/configuration.md from the schema: python docs/make_reference.py

The text above the first section is written by hand; everything below comes from deca_ds/config/schema.py and from the
ranges in deca_ds/config/checks.py and deca_ds/data/checks.py.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from deca_ds.config.checks import RANGES
from deca_ds.config.schema import Config
from deca_ds.data.checks import RANGES as DATA_RANGES

PAGE = Path(__file__).with_name("configuration.md")
MARK = "<!-- The rest of this page is written by docs/make_reference.py. -->\n"
TIED = "\0"  # a space at which no line breaks
KINDS = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
RANGE = {key: allowed.partition(":")[0].replace("null", "`null`") for key, _, allowed in (*RANGES, *DATA_RANGES)}


def page() -> str:
    """The whole page, with the text above the mark as it is on the disk."""
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    return by_hand + MARK + "".join(_section(section) for section in fields(Config))


def _section(section: Field[Any]) -> str:
    if section.default_factory is MISSING:
        return f"\n## {section.name}\n\n{_entry(section.name, section, Config)}"
    kind = section.default_factory
    head = [textwrap.fill(" ".join(paragraph.split()), 120) for paragraph in (kind.__doc__ or "").split("\n\n")]
    keys = [_entry(f"{section.name}.{field.name}", field, kind) for field in fields(kind)]
    return "\n" + "\n\n".join([f"## {section.name}", *head, "".join(keys)])


def _entry(key: str, field: Field[Any], section: type) -> str:
    default = "required" if field.default == "???" else f"default `{_default(field)}`"
    values, allowed = _values(get_type_hints(section)[field.name]), RANGE.get(key, "")
    values = allowed if allowed.startswith("`null`") else ", ".join(filter(None, [values, allowed]))
    see = _link(field.metadata["see"])
    text = f"- **`{key}`** ({values}; {default}): {field.metadata['meaning']}{see}"
    text = re.sub(r"`.*?`|\[.*?\]\(", lambda words: words[0].replace(" ", TIED), text)  # code and links stay whole
    filled = textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return filled.replace(TIED, " ") + "\n"


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    style = '"' if isinstance(value, str) and "\n" in value else None
    return yaml.safe_dump(value, default_flow_style=True, default_style=style, width=200).removesuffix("...\n").strip()


def _values(kind: Any) -> str:
    """In words: what may stand there."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if get_origin(kind) is list:
        return f"list of {KINDS[inner[0]]}s"
    if get_origin(kind) is dict:
        return "mapping of texts to texts"
    if type(None) in inner:
        return f"{_values(inner[0])} or `null`"
    return KINDS[kind]


def _link(see: str | None) -> str:
    """A link to the section of the manual that tells more, by its heading."""
    if see is None:
        return ""
    file, _, anchor = see.partition("#")
    headings = re.findall(r"^#+ (.*)$", PAGE.with_name(file).read_text(encoding="utf-8"), re.MULTILINE)
    titles = [h for h in headings if anchor in ("", re.sub(r"[^\w -]", "", h).lower().replace(" ", "-"))]
    assert titles, f"docs/{file} has no section {anchor}"
    return f" See [{titles[0]}]({see})."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
