"""One rule for all paths: ~ and $NAME expand, and what is relative starts at the working directory."""

from __future__ import annotations

import difflib
import errno
import os
import re
import tempfile
from pathlib import Path

from deca_ds.config.hub import hub_fix, why_not_on_hub
from deca_ds.config.schema import Config, ModelConfig
from deca_ds.errors import ConfigError, ModelError, UserError, in_words

KEYS = (
    "run.output",
    "model.path",
    "model.tokenizer",
    "gossip.matrix",
    "gossip.edges",
    "data.train",
    "data.per_client",
    "data.evaluation",
    "data.per_client_evaluation",
    "data.cache",
    "deepspeed",
)
# of the Hugging Face hub: `name` or `owner/name`
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expand(path: str) -> str:
    """Return `path` with ~, ~user and $NAME replaced; those that mean nothing on this host stay."""
    return os.path.expandvars(os.path.expanduser(path))


def argument(path: str) -> Path:
    """Expand a path from the command line; shells leave the ~ of --config=~/run.yaml alone."""
    return Path(expand(path))


def expand_all(config: Config) -> None:
    """Expand every path of the configuration. Raises ConfigError where one of those that are made does not expand."""
    for key in KEYS:
        *sections, name = key.split(".")
        section = getattr(config, sections[0]) if sections else config
        value = getattr(section, name)
        if isinstance(value, list):
            setattr(section, name, [expand(path) for path in value])
        elif value is not None:
            setattr(section, name, expand(value))
    for key, made in (("run.output", config.run.output), ("data.cache", config.data.cache)):
        if made is not None and (why := _meaningless(made)) is not None:
            raise ConfigError(f"{key} = {made!r}: {why}", where=key, fix="write the whole path")


def read_given(path: str | Path, what: str, kind: type[UserError], *, where: str | None = None) -> str:
    """Read a text file that a user has named. what: which one it is, as in "the hostfile". where: the key that names
    it, if one does. Raises `kind` where it cannot be read."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        told, fix = "there is no such file", look_for(str(path))
    except IsADirectoryError:
        told, fix = "it is a folder", "name the file"
    except UnicodeDecodeError as error:
        told, fix = in_words(error), "save it as UTF-8"
    except OSError as error:
        told, fix = in_words(error), "look at its permissions, and whether its disk is there"
    raise kind(f"cannot read {what} {str(path)!r}: {told}", where=where or str(path), fix=fix, of_host=True)


def could_be_hub_name(path: str) -> bool:
    """Return whether the hub could have a model or a data set of this name."""
    return _HUB_NAME.fullmatch(path) is not None


def look_for(path: str) -> str:
    """Advise what to do about `path`, which is not there."""
    for link in (path, *map(str, Path(path).parents)):
        if os.path.islink(link) and not os.path.exists(link):
            return f"{link!r} is a link to {os.readlink(link)!r}, which is not there"
    if (why := _meaningless(path)) is not None:
        return why
    close = _closest(Path(path))
    return f"check the path, from {Path.cwd()}" + (f"; did you mean {str(close)!r}?" if close else "")


def _closest(path: Path) -> Path | None:
    """Return the path that exists and differs from `path` in one name, which is probably misspelt; None if there is
    none."""
    for above in reversed(path.parents):
        missing, *rest = path.relative_to(above).parts
        if os.path.lexists(above / missing):
            continue
        try:
            there = os.listdir(above)
        except OSError:
            return None
        found = (above.joinpath(name, *rest) for name in difflib.get_close_matches(missing, there))
        return next((each for each in found if each.exists()), None)
    return None


def check_model_path(model: ModelConfig) -> None:
    """Raise ModelError for a model or tokenizer that is neither a folder here nor to be had from the hub."""
    for key, path in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
        if path is None or (path and os.path.isdir(path)):
            continue
        if os.path.isfile(path):
            fix = "name the folder that holds config.json"
            raise ModelError(f"{path!r} is a file", where=key, fix=fix, of_host=True)
        if os.path.islink(path) or not could_be_hub_name(path):
            raise ModelError(f"there is no folder {path!r}", where=key, fix=look_for(path), of_host=True)
        check_model_on_hub(path, key)


def check_model_on_hub(name: str, key: str) -> None:
    """Raise ModelError if the hub does not give the model or tokenizer `name`, which is no folder here."""
    if (why := why_not_on_hub(name, "model")) is not None:
        raise ModelError(
            f"there is no folder {name!r} in {Path.cwd()}, and {why}",
            where=key,
            fix=f"{look_for(name)}; {hub_fix(name, 'model')}",
            of_host=True,
        )


def check_writable(folder: Path, key: str) -> None:
    """Raise ConfigError unless this process could make `folder`, or write into it. Leaves nothing behind."""
    there = folder
    try:
        try:
            folder.lstat()
        except (FileNotFoundError, NotADirectoryError):
            while not os.path.lexists(there) and there != there.parent:
                there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:  # ValueError: a character that no path can have
        number, told = getattr(error, "errno", None), in_words(error)
        at = "" if there == folder else f" at {str(there)!r}"
        if number == errno.ENOTDIR:
            told = "it is a file" if there == folder else "there is a file"
        elif number == errno.ENOENT and there.is_symlink():
            told = f"it is a link to {os.readlink(there)!r}, which is not there"
        raise ConfigError(
            f"cannot write to {str(folder)!r}:{at} {told}",
            where=key,
            fix="name a folder that this process may write to",
            of_host=True,
        ) from None


def _meaningless(path: str) -> str | None:
    if (variable := _VARIABLE.search(path)) is not None:
        return f"the environment has no variable {variable.group()}"
    if path.startswith("~"):
        return f"{Path(path).parts[0]!r} is no home folder; a name that begins so is written ./{path}"
    return None
