"""Write what the manual says of configuration keys, methods and formats: python docs/make_reference.py

In docs/configuration.md the text above the first section is written by hand; everything below comes from
deca_ds/config/schema.py and from the ranges beside the checks. In docs/algorithm.md and docs/formats.md the tables
between two marks come from the registries.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from deca_ds.algorithm.methods import METHODS, Method
from deca_ds.config.schema import AlgorithmConfig, Config
from deca_ds.data.checks import NAMES as DATA_NAMES
from deca_ds.data.formats import FORMATS
from deca_ds.training.chosen_method import NAMES as METHOD_NAMES

PAGE = Path(__file__).with_name("configuration.md")
MARK = "<!-- The rest of this page is written by docs/make_reference.py. -->\n"
TIED = "\0"  # a space at which no line breaks
KINDS = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
NAMES = DATA_NAMES | METHOD_NAMES
# of a key that only some methods or formats use, these
USERS = {
    f"algorithm.{field.name}": [name for name, method in METHODS.items() if field.name in method.coefficients]
    for field in fields(AlgorithmConfig)
}
USERS = {key: names for key, names in USERS.items() if 0 < len(names) < len(METHODS)}
USERS |= {
    f"data.{key}": [name for name, other in FORMATS.items() if key in other.keys]
    for format in FORMATS.values()
    for key in format.keys
}
PAGES = ("configuration.md", "algorithm.md", "formats.md")


def algorithm() -> str:
    """The whole page, with what is outside the marks as it is on the disk."""
    head = "| method | what it does | active block's state, bytes per parameter | sent at an averaging |"
    rows = [
        f"| `{name}` | {_what(method)} | {method.rule().bytes_per_parameter} | {_sent(method)} |"
        for name, method in METHODS.items()
    ]
    return _between_marks("algorithm.md", methods=[head, "|---|---|---|---|", *rows])


def formats() -> str:
    """As `algorithm`."""
    trained = ["| format | a row | carries the loss |", "|---|---|---|"]
    handled = ["| format | field | what is done with it |", "|---|---|---|"]
    for format in FORMATS.values():
        trained.append(f"| `{format.name}` | `{json.dumps(format.sample)}` | {format.trained} |")
        for prefix, known in (("", format.fields), (f"{format.turns}[].", format.turn_fields)):
            for field in known:
                names = ", ".join(f"`{prefix}{name}`" for name in field.names)
                handled.append(f"| {format.name} | {names} | **{field.use.value}**: {field.note} |")
    handled.append("| every | any other | not used; named once a run |")
    return _between_marks("formats.md", trained=trained, fields=handled)


def _what(method: Method) -> str:
    return method.about + (f" ({', '.join(f'arXiv {paper}' for paper in method.papers)})" if method.papers else "")


def _sent(method: Method) -> str:
    if method.alone:
        return "nothing"
    block = "the adapters" if method.adapters else "the block"
    return " and ".join([block, *(f"the {name}" for name in method.rule.travels if name != "grad")])


def _between_marks(file: str, **tables: Sequence[str]) -> str:
    text = PAGE.with_name(file).read_text(encoding="utf-8")
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: written by docs/make_reference.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        old, _, after = rest.partition(end)
        assert old, f"docs/{file} has no marks for {name}"
        text = before + begin + "\n" + "\n".join(lines) + "\n\n" + end + after
    return text


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
    values, allowed = _values(get_type_hints(section)[field.name]), field.metadata["allowed"]
    if key in NAMES:
        values = ", ".join(f"`{name}`" for name in NAMES[key])
    elif allowed is not None:
        words = allowed.words.partition(":")[0].replace("null", "`null`")
        values = words if words.startswith("`null`") else f"{values}, {words}"
    users = f"; {_users(key)}" if key in USERS else ""
    see = _link(field.metadata["see"])
    text = f"- **`{key}`** ({values}{users}; {default}): {field.metadata['meaning']}{see}"
    text = re.sub(r"`.*?`|\[.*?\]\(", lambda words: words[0].replace(" ", TIED), text)  # code and links stay whole
    filled = textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return filled.replace(TIED, " ") + "\n"


def _users(key: str) -> str:
    """Say which methods or formats use the key, or which do not, whichever are fewer."""
    every = METHODS if key.startswith("algorithm.") else FORMATS
    others = [name for name in every if name not in USERS[key]]
    few = min(USERS[key], others, key=len)
    *first, last = [f"`{name}`" for name in few]
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"not for {listed}" if few is others else f"for {listed}"


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
    for file, make in zip(PAGES, (page, algorithm, formats), strict=True):
        PAGE.with_name(file).write_text(make(), encoding="utf-8")
