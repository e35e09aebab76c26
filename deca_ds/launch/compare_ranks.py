"""Do all ranks run the same thing? What each one runs is compared through the job's store, and the odd ones are named.

Code, configuration, model and tokenizer must be equal, or clients would average what does not belong together. Other
versions of a library may compute other bits or wait for other collectives; cluster.allow_mixed_versions lets them pass.
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deca_ds
from deca_ds.config import Config
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.config.flat import flat
from deca_ds.config.paths import KEYS as PATHS
from deca_ds.errors import LaunchError
from deca_ds.launch.digests import code_digest, digest, version_of
from deca_ds.launch.given import look_at_hosts
from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore
from deca_ds.plural import several
from deca_ds.printing import print_wrapped

_PACKAGES = ("torch", "deepspeed", "transformers")
LIBRARIES = ("Python", *_PACKAGES)  # of these, versions may differ with cluster.allow_mixed_versions
# Keys that may name other places on other hosts, or what only concerns one host. What is found there is compared: the
# models by their values, data by counts and labels, the mixing matrices and DeepSpeed's JSON by their content.
_OF_A_HOST = frozenset({*PATHS, "run.device", "run.threads"})
_WHERE = "comparison of all ranks at the start"


def compare_software(config: Config, launch: Launch, store: JobStore, matrices: Sequence[bytes]) -> None:
    """Raise LaunchError unless all ranks run the same code, libraries and configuration. All ranks call this.

    matrices: the mixing matrices. With cluster.allow_mixed_versions other libraries are a warning on the first rank.
    """
    every = store.gather(launch, "fingerprint", {"host": launch.host, **software(config, matrices)})
    hosts = _each(every, "host")
    _refuse("deca_ds source files", _each(every, "code"), hosts, look_at_hosts("install the same deca_ds everywhere"))
    if len(set(_each(every, "keys").values())) > 1:
        _refuse_keys(store.gather(launch, "fingerprint/keys", _keys(config, matrices)), hosts)
    for name in LIBRARIES:
        odd = odd_ones(_each(every, name), hosts)
        if odd and not config.cluster.allow_mixed_versions:
            fix = "install the same everywhere, or set cluster.allow_mixed_versions=true if you know them to fit"
            raise LaunchError("; ".join(odd).replace("{}", name), where=_WHERE, fix=look_at_hosts(fix))
        if odd and launch.rank == launch.first:
            print_wrapped("WARNING: " + "; ".join(odd).replace("{}", name))


def software(config: Config, matrices: Sequence[bytes]) -> dict[str, str]:
    """Return versions and digests of what this rank runs: libraries, "code" and "keys", the configuration's."""
    versions = {"Python": platform.python_version()} | {name: version_of(name) or "none" for name in _PACKAGES}
    keys = json.dumps(_keys(config, matrices)).encode()
    return {**versions, "code": code_digest(Path(deca_ds.__file__).parent), "keys": digest([keys])}


def compare_start(launch: Launch, store: JobStore, parts: Mapping[str, str], ranks_per_client: int) -> None:
    """Raise LaunchError unless all clients start from the same. All ranks call this.

    parts: name -> digest of what this rank holds of it; ranks of equal shard index hold the same in every client.
    """
    every = store.gather(launch, "fingerprint/start", {"host": launch.host, **parts})
    for name in parts:
        for shard in range(ranks_per_client):
            alike = {rank: of for rank, of in every.items() if rank % ranks_per_client == shard}
            fix = "give all clients the same files in model.path and model.tokenizer"
            _refuse(name, _each(alike, name), _each(alike, "host"), fix)


def odd_ones(values: Mapping[int, str], hosts: Mapping[int, str]) -> list[str]:
    """Return a sentence for each value that the majority does not have, with {} for the name; none if all are equal.

    values, hosts: by rank. Of values that equally many have, the lowest rank's counts as theirs.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    for rank, value in values.items():
        holders[value].append(rank)
    majority = max(holders, key=lambda value: len(holders[value]))
    others = len(holders[majority])
    named = []
    for value, ranks in holders.items():
        if value != majority:
            whose = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks)
            who = f"rank {whose} has" if len(ranks) == 1 else f"ranks {whose} have"
            named.append(f"{who} {{}} {value}, {several(others, 'other')} {majority}")
    return named


def _keys(config: Config, matrices: Sequence[bytes]) -> dict[str, Any]:
    keys = {key: value for key, value in flat(config).items() if key not in _OF_A_HOST}
    keys["content of gossip.matrix or gossip.edges"] = digest(matrices)
    if config.deepspeed is not None:
        keys["content of deepspeed"] = read_deepspeed_json(Path(config.deepspeed))
    plain: dict[str, Any] = json.loads(json.dumps(keys, sort_keys=True))
    return plain


def _refuse_keys(every: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> None:
    for key in sorted({key for keys in every.values() for key in keys}):
        values = {rank: json.dumps(keys.get(key)) for rank, keys in every.items()}
        _refuse(f"{key} =", values, hosts, "start all ranks with the same configuration")


def _refuse(name: str, values: Mapping[int, str], hosts: Mapping[int, str], fix: str) -> None:
    odd = odd_ones(values, hosts)
    if odd:
        raise LaunchError("; ".join(odd).replace("{}", name), where=_WHERE, fix=fix)


def _each(every: Mapping[int, Mapping[str, str]], name: str) -> dict[int, str]:
    return {rank: of[name] for rank, of in every.items()}
