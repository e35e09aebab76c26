"""The configuration among the arguments of a command, the same in every command that takes one.

`RUN.yaml` and `--config RUN.yaml` are the same. What has the form key=value replaces a key of the file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")


def add_config(parser: argparse.ArgumentParser, about: str = "YAML file with the run's configuration") -> None:
    """Let a command take a configuration, which `chosen` finds among its arguments."""
    parser.add_argument("--config", type=path_argument, metavar="RUN.yaml", help=f"{about}; --config may be left out")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys that replace the file's")


def chosen(arguments: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """Return the file, if one is named, and what replaces its keys. Raises ConfigError where two are named."""
    files = [] if arguments.config is None else [arguments.config]
    overrides = []
    for given in arguments.overrides:
        if _is_file(given):
            files.append(path_argument(given))
        else:
            overrides.append(given)
    if len(files) > 1:
        raise ConfigError(
            f"two configurations: {str(files[0])!r} and {str(files[1])!r}",
            where="command line",
            fix="name one file, and replace single keys of it with key=value",
        )
    return (files[0] if files else None), overrides


def _is_file(given: str) -> bool:
    key, assigned, _ = given.partition("=")
    if assigned and "/" not in key:  # no key has one, and folders may be named lr=1e-4
        return False
    return given.lower().endswith(_SUFFIXES) or os.path.isfile(path_argument(given))
