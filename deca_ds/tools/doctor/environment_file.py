"""`.deepspeed_env`, with which the deepspeed launcher passes variables to other hosts: what it makes of each line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deca_ds.plural import several
from deca_ds.tools.doctor.facts import EnvironmentFile, Facts
from deca_ds.tools.doctor.findings import HERE, State, Verdict, check, ok

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHELL = re.compile(r"[`$\\]")
_HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_PER_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


def read_environment_files(environ: Mapping[str, str]) -> list[EnvironmentFile]:
    """Return those that the launcher would read, from the home and the working folder."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys(Path(folder, name).absolute() for folder in (os.path.expanduser("~"), "."))
    return [
        EnvironmentFile(str(path), path.read_text(encoding="utf-8", errors="replace").splitlines())
        for path in paths
        if path.is_file() and os.access(path, os.R_OK)
    ]


def hub_variables(files: Sequence[EnvironmentFile]) -> dict[str, str]:
    """Return what they say of the Hugging Face hub and its caches, and no secret."""
    pairs = (line.partition("=") for file in files for line in file.lines)
    return {key.strip(): value for key, _, value in pairs if key.strip() in _HUB}


def lint(line: str) -> tuple[State, str, str] | None:
    """Return what is wrong with a line, and what to do; never its value, which may be a secret."""
    key, equals, value = line.partition("=")
    if not equals:
        text = line.strip()
        kind = "empty" if not text else "a comment" if text.startswith("#") else "not NAME=VALUE"
        return State.FAIL, f"is {kind}, which ends the launcher with a traceback", "take the line out"
    key = key.strip()
    if not _NAME.fullmatch(key):
        return State.FAIL, f"sets {key[:40]!r}, which is no name of a variable", "write NAME=VALUE, without export"
    if key in _PER_RANK:
        return State.FAIL, f"sets {key}, which the launcher sets for each rank", "take the line out"
    if _SECRET.search(key):
        where = "keep it in a file on each host that only you can read, such as ~/.cache/huggingface/token"
        return State.WARN, f"sets {key}: the launcher prints the values, and every host shows them in ps", where
    if value.strip()[:1] in ("'", '"') or value.strip()[-1:] in ("'", '"'):
        return State.WARN, f"puts {key} in quotes, which become part of the value", "leave the quotes out"
    if _SHELL.search(value):
        return State.WARN, f"sets {key} to something that each host's shell expands", "write the value itself"
    return None


@check(".deepspeed_env")
def deepspeed_env(facts: Facts) -> Iterator[Verdict]:
    if not facts.environment_files or not facts.remote:
        return
    bad = False
    for file in facts.environment_files:
        for number, line in enumerate(file.lines, start=1):
            if (found := lint(line)) is not None:
                bad = True
                state, what, fix = found
                yield Verdict(HERE, state, f"{file.path}:{number} {what}", fix)
    if not bad:
        yield ok(HERE, several(sum(len(file.lines) for file in facts.environment_files), "variable"))
