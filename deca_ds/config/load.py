"""Read a YAML file, or what a script has in its place, and a dotlist into the schema; every mistake names the key, the
value and what would do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from deca_ds.config.checks import check
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.config.paths import argument as path_argument
from deca_ds.config.paths import expand_all, look_for
from deca_ds.config.schema import Config
from deca_ds.config.yaml_text import check_argument, check_file, in_type, keys_of
from deca_ds.errors import ConfigError, in_words

_ROUNDS = 4  # of a run of which nobody says how long it is
_SCRIPT = "the configuration that the script gives"

Given = str | os.PathLike[str] | Mapping[str, Any] | Config


def load_config(given: Given | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration, typed and checked: defaults, then what is given, then `a.b=value` overrides.

    given: the path of a YAML file, a mapping of sections like the one in such a file, or a Config. Of algorithm.rounds
    and algorithm.epochs just one is set then. Raises ConfigError with the file or argument, the key and the value for
    anything unknown, of the wrong type, missing or contradictory.
    """
    config, where = deepcopy(_schema()), "command line"
    if given is not None:
        where, read = _read(given)
        _merge(config, read, source=where)
    for argument in overrides:
        override, source = _read_argument(argument), f"command line, {argument!r}"
        key = argument.partition("=")[0]
        for mapping in keys_of(dict):  # a mapping replaces the file's, as lists do; data.label_names.x=y adds to it
            if (key == mapping or mapping.startswith(f"{key}.")) and OmegaConf.select(override, mapping) is not None:
                OmegaConf.update(config, mapping, {}, merge=False)
        _merge(config, override, source)
    try:
        OmegaConf.resolve(config)
        if config.algorithm.rounds is None and config.algorithm.epochs is None:
            config.algorithm.rounds = _ROUNDS
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(
                f"no value for {', '.join(missing)}",
                where=where,
                fix=f"set it there, or as an override: {missing[0]}=VALUE"
                if where == _SCRIPT
                else f"set it in the YAML file or as {missing[0]}=VALUE on the command line"
                + (", or name the file: RUN.yaml" if given is None else ""),
            )
        typed = cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere or to the wrong type
        raise _explain(error, where, config) from error
    expand_all(typed)
    check(typed)
    if typed.deepspeed is not None:
        read_deepspeed_json(Path(typed.deepspeed))
    return typed


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config(path)` gives it back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True), encoding="utf-8")


@cache
def _schema() -> DictConfig:
    """Return the schema with its defaults; callers must not change it."""
    return cast(DictConfig, OmegaConf.structured(Config))


def _read(given: Given) -> tuple[str, DictConfig]:
    """Return where the configuration is from, for messages, and what it says. What a script gives passes the checks of
    a file's text."""
    if isinstance(given, str | os.PathLike):
        path = path_argument(os.fspath(given))
        return str(path), _read_yaml(path)
    try:
        values = OmegaConf.to_container(OmegaConf.structured(given)) if isinstance(given, Config) else dict(given)
        text = yaml.dump(_plain(values), Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    except OmegaConfBaseException as error:
        raise _explain(error, _SCRIPT, OmegaConf.create()) from error
    except yaml.representer.RepresenterError as error:
        what, value = error.args
        raise ConfigError(
            f"{what}: {value!r}", where=_SCRIPT, fix="use numbers, texts, paths, lists and mappings"
        ) from error
    check_file(text, _SCRIPT, lines=False)
    return _SCRIPT, _in_schema(cast(DictConfig, OmegaConf.create(text)))


class _Dumper(yaml.SafeDumper):
    """Quotes all texts, so that none is read as a number."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _plain(value: Any) -> Any:
    """Return `value` with the types that YAML has; numbers may be NumPy's."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(each) for each in value]
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _in_schema(read: DictConfig) -> DictConfig:
    return cast(DictConfig, OmegaConf.create(in_type(OmegaConf.to_container(read))))


def _read_yaml(path: Path) -> DictConfig:
    if os.path.isdir(path):
        within = " in it" * bool(list(path.glob("*.y*ml")))
        raise ConfigError(f"{str(path)!r} is a folder", where="command line", fix=f"name the YAML file{within}")
    if not os.path.isfile(path):
        raise ConfigError(
            f"no configuration file {str(path)!r}", where="command line", fix=look_for(str(path)), of_host=True
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        check_file(text, str(path))
        read = OmegaConf.create(text)
        if not isinstance(read, DictConfig):
            fix = "write sections with keys, like 'model: {path: ...}'"
            raise ConfigError("the file holds no keys and values", where=str(path), fix=fix)
        return _in_schema(read)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'problem', error)}",
            where=f"{path}{line}",
            fix="indent with blanks, never with tabs, and the keys of a section alike; look at the lines before, too",
        ) from error
    except ConfigError:
        raise
    except (OmegaConfBaseException, AssertionError, ValueError, RecursionError, OSError) as error:
        fix = "give a readable file of keys and values, in UTF-8"
        raise ConfigError(f"cannot read the configuration: {in_words(error)}", where=str(path), fix=fix) from error


def _read_argument(argument: str) -> DictConfig:
    key, assigned, value = argument.partition("=")
    if not assigned or not key or argument.startswith("-"):
        raise ConfigError(
            f"cannot read the argument {argument!r}",
            where="command line",
            fix="write overrides as key=value, for example optimizer.lr=1e-4",
        )
    try:
        check_argument(key, value)
        return _in_schema(OmegaConf.from_dotlist([argument]))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"cannot read the argument {argument!r}: {error}",
            where="command line",
            fix=f"put a text that YAML would change in quotes that the shell leaves alone: '{key}=\"...\"'",
        ) from error
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        fix = "write key=value, with the keys of docs/configuration.md"
        raise ConfigError(f"cannot read the argument {argument!r}: {error}", where="command line", fix=fix) from error


def _merge(config: DictConfig, addition: DictConfig, source: str) -> None:
    """Merge `addition` into `config` in place: OmegaConf.merge would copy the whole schema for every argument."""
    try:
        config.merge_with(addition)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise _explain(error, source, addition) from error


def _explain(error: Exception, source: str, addition: DictConfig) -> ConfigError:
    key = getattr(error, "full_key", None)
    first_line = str(error).splitlines()[0]
    if not key:
        return ConfigError(first_line, where=source, fix="write sections with keys, like 'model: {path: ...}'")
    fix = None
    if isinstance(error, ConfigKeyError):
        parent, _, leaf = str(key).rpartition(".")
        section = OmegaConf.select(_schema(), parent) if parent else _schema()
        known = [str(k) for k in section] if isinstance(section, DictConfig) else []
        close = difflib.get_close_matches(leaf, known, n=1)
        dotted = ".".join(filter(None, [parent, close[0]])) if close else None
        fix = f"did you mean {dotted}?" if dotted else f"known here: {', '.join(known)}"
        first_line = "unknown key"
    elif isinstance(error, ValidationError) and (meaning := _meaning(str(key).partition("[")[0])):
        fix = f"change the value; {key}: {meaning}"
    try:
        value = OmegaConf.select(addition, str(key))
    except OmegaConfBaseException:
        value = None
    shown = f" = {value!r}" if value is not None and not isinstance(value, DictConfig) else ""
    return ConfigError(f"{key}{shown}: {first_line}", where=source, fix=fix)


def _meaning(key: str) -> str | None:
    """Return the sentence of the schema that explains `key`."""
    section, _, name = key.rpartition(".")
    known = {f.name: f for f in fields(getattr(Config(), section) if section else Config)}
    return known[name].metadata.get("meaning") if name in known else None
