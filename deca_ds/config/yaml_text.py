"""What YAML makes of unquoted values, held against what stands in the file or the argument.

YAML 1.1 reads `no` as false, `010` as 8, `12:30` as 750 and `~` as nothing. A name, a path or a label that was read so
would be another one than the user has written, so it is refused, and so is a number whose digits mean another one.
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from deca_ds.config.schema import Config
from deca_ds.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_READ_AS_SOMETHING_ELSE = {_TAG + kind for kind in ("bool", "int", "float", "null")}
_QUOTES = "put it in quotes"
_REFERENCE = re.compile(r"\$\{[^{}]*\}")  # to another key
_SHAPES = {
    yaml.MappingNode: "a mapping of names to values",
    yaml.SequenceNode: "a list",
    yaml.ScalarNode: "a single value",
}
_EXAMPLES = {
    yaml.MappingNode: "{name: value}",
    yaml.SequenceNode: "[value]",
    yaml.ScalarNode: "one value, a text with such signs in quotes",
}

_hints = functools.cache(get_type_hints)
_Changed = Iterator[tuple[yaml.Node, str, str]]  # where, what, fix


class _Loader(yaml.SafeLoader):
    """Resolves unquoted values as OmegaConf does, which reads 1e3 as a number."""


_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def check_file(text: str, path: str, *, lines: bool = True) -> None:
    """Raise ConfigError for what YAML would change in `text`, a configuration that stands in the file `path`. lines:
    whether these can be looked up there."""
    for node, message, fix in _look_through(text, ""):
        raise ConfigError(message, where=path + f", line {node.start_mark.line + 1}" * lines, fix=fix)


def check_argument(key: str, text: str) -> None:
    """Check `text`, the value of `key` on the command line, as `check_file` does; it has no comments and no lines to be
    folded. Raises ConfigError, also for a key that continues below a value."""
    _check_depth(key, text)
    for node, message, fix in _look_through(text, key):
        quoted = fix.startswith(_QUOTES) and node.value == text and "'" not in text
        raise ConfigError(
            message,
            where=f"command line, {f'{key}={text}'!r}",
            fix=f"put it in quotes that the shell leaves alone: '{key}=\"{text}\"'" if quoted else fix,
        )


def _check_depth(key: str, text: str) -> None:
    parts = _parts(key)
    for depth in range(1, len(parts)):
        above, below = ".".join(parts[:depth]), ".".join(parts[depth:])
        kind = _without_none(_kind_of(above))
        if kind is None or is_dataclass(kind) or (get_origin(kind) is dict and depth == len(parts) - 1):
            continue
        if get_origin(kind) is dict:
            what = f"{above} has a single value for a name, and a name with a dot is written in braces"
            fix = f"{above}={{{below}: {text}}}"
        else:
            what = f"{above} is {_SHAPES[_shape(kind)]}, and has no names below it"
            fix = f"{above}={_EXAMPLES[yaml.SequenceNode] if get_origin(kind) is list else 'value'}"
        raise ConfigError(f"{key}: {what}", where=f"command line, {f'{key}={text}'!r}", fix=f"write '{fix}'")


def in_type(tree: Any, kind: Any = Config) -> Any:
    """Return `tree`, the plain values of a configuration, with a list of one for a single text where the schema has a
    list of texts, and with texts as the names in a mapping."""
    if is_dataclass(kind) and isinstance(tree, dict):
        kinds = _kinds(kind)
        return {key: in_type(value, kinds.get(key)) for key, value in tree.items()}
    if get_origin(kind) is dict and isinstance(tree, dict):
        return {str(key): value for key, value in tree.items()}
    single = isinstance(tree, str | int | float) and not _REFERENCE.fullmatch(str(tree))
    return [tree] if single and kind == list[str] else tree


def keys_of(wanted: Any, section: Any = Config, prefix: str = "") -> list[str]:
    """Return the keys of the schema whose type is made by `wanted`, such as dict, in its order."""
    found = []
    for name, kind in _kinds(section).items():
        if is_dataclass(kind):
            found += keys_of(wanted, kind, f"{prefix}{name}.")
        elif get_origin(kind) is wanted:
            found.append(prefix + name)
    return found


def choices(key: str) -> tuple[str, ...]:
    """Return the values that the schema allows for a key that takes one of a few."""
    return get_args(_without_none(_kind_of(key)))


def _kinds(section: Any) -> dict[str, Any]:
    """Return the type of each key of a section."""
    return _hints(section)


def _look_through(text: str, key: str) -> _Changed:
    loader = _Loader(text)
    try:
        node, kind = loader.get_single_node(), _kind_of(key)
        if node is None:
            return
        yield from _changed(loader, node, kind, key)
        if isinstance(node, yaml.ScalarNode) and node.style is None and key and _is_text(kind) and node.value != text:
            yield node, f"{key}: YAML reads {text!r} as {node.value!r}", f"{_QUOTES}: '{key}=\"...\"'"
    finally:
        loader.dispose()


def _is_text(kind: Any) -> bool:
    return kind in (str, list[str]) or set(get_args(kind)) == {str, type(None)}


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]+", key) if part]


def _kind_of(key: str) -> Any:
    kind: Any = Config
    for part in _parts(key):
        if is_dataclass(kind):
            kind = _kinds(kind).get(part)
        else:
            kind = get_args(kind)[-1] if get_origin(kind) in (list, dict) else None
    return kind


def _changed(loader: _Loader, node: yaml.Node, kind: Any, key: str) -> _Changed:
    given_kind, kind = kind, _without_none(kind)
    optional = kind is not given_kind
    if kind is None:  # no key of the schema: that is told elsewhere
        return
    made_by, wanted = get_origin(kind), _shape(kind)
    referred = isinstance(node, yaml.ScalarNode) and (wanted is yaml.SequenceNode or "${" in node.value)
    if key and not isinstance(node, wanted) and not referred:
        given = "nothing" if node.tag == _TAG + "null" else _SHAPES[type(node)]
        yield node, f"{key}: there is {given} where {_SHAPES[wanted]} belongs", f"write {_EXAMPLES[wanted]}"
    elif isinstance(node, yaml.MappingNode):
        yield from _changed_in_mapping(loader, node, kind, key)
    elif isinstance(node, yaml.SequenceNode):
        for place, child in enumerate(node.value):
            yield from _changed(loader, child, get_args(kind)[0] if made_by is list else None, f"{key}[{place}]")
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in _READ_AS_SOMETHING_ELSE:  # no quotes
        value = loader.construct_object(node)
        if value is None and (optional or kind not in (str, list[str])):
            return
        if kind in (str, list[str]) and str(value) != node.value:
            yield node, f"{key}: {_reading(node, value)}", _quote(node.value)
        elif kind in (int, float) and isinstance(value, bool):
            yield node, f"{key}: {_reading(node, value)}, and a number belongs here", "write a number"
        elif kind in (int, float) and not _means(node.value, value):
            yield node, f"{key}: {_reading(node, value)}", f"write {value}, if that is meant"
        elif kind is bool and not isinstance(value, bool) and value not in (0, 1):
            yield node, f"{key} = {value}, and true or false belongs here", "write true or false"


def _changed_in_mapping(loader: _Loader, node: yaml.MappingNode, kind: Any, key: str) -> _Changed:
    kinds = _kinds(kind) if is_dataclass(kind) else {}
    names: set[Any] = set()
    for name, child in node.value:
        if name.tag == _TAG + "merge":
            for merged in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                yield from _changed(loader, merged, kind, key)
            continue
        text = name.value if isinstance(name, yaml.ScalarNode) else ""
        if get_origin(kind) is dict:
            yield from _changed(loader, name, str, f"a name in {key}")
            value = loader.construct_object(name) if isinstance(name, yaml.ScalarNode) else text
            if text in names or value in names:  # YAML takes 1 and 1.0 for one name
                yield name, f"{key} names {text!r} twice", "leave one of them out"
            names |= {text, value}
        if is_dataclass(kind) and "." in text and _kind_of(inner := f"{key}.{text}".lstrip(".")) is not None:
            nested = functools.reduce(lambda below, part: f"{{{part}: {below}}}", reversed(_parts(inner)), "...")
            yield name, f"{text}: in a file a dot does not part names", f"write {nested[1:-1]}"
        child_kind = get_args(kind)[1] if get_origin(kind) is dict else kinds.get(text)
        yield from _changed(loader, child, child_kind, f"{key}.{text}".lstrip("."))


def _without_none(kind: Any) -> Any:
    """Return X for Optional[X], and any other type as it is."""
    if type(None) in get_args(kind) and get_origin(kind) in (Union, types.UnionType):
        return next(each for each in get_args(kind) if each is not type(None))
    return kind


def _shape(kind: Any) -> type[yaml.Node]:
    """Return the YAML node that a value of this type needs; a list may be written as one value."""
    if is_dataclass(kind) or get_origin(kind) is dict:
        return yaml.MappingNode
    return yaml.SequenceNode if get_origin(kind) is list else yaml.ScalarNode


def _reading(node: yaml.ScalarNode, value: Any) -> str:
    if not node.value:
        return "there is no value"
    return f"YAML reads {node.value} as {'nothing' if value is None else repr(value)}"


def _quote(text: str) -> str:
    return f"{_QUOTES}: '{text}'" if text else "give one; an empty text is ''"


def _means(text: str, number: int | float) -> bool:
    """Return whether `number` is what the digits say; 010 and 12:30 do not say 8 and 750."""
    if not math.isfinite(number):
        return True
    for read in (lambda digits: int(digits, 0), float):
        try:
            return bool(read(text) == number)
        except ValueError:
            continue
    return False
