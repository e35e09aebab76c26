"""All checks, in the order of the table: what comes first breaks what follows."""

from __future__ import annotations

from collections.abc import Collection

from deca_ds.tools.doctor import environment_file, network, reach, resources, software
from deca_ds.tools.doctor.facts import Facts
from deca_ds.tools.doctor.findings import ADDED, Finding

_GROUPS = (reach, software, network, resources, environment_file)
CHECKS = {name: rule for group in _GROUPS for name, rule in ADDED.items() if rule.__module__ == group.__name__}


# Those for which an agent only looks around.
BRIEF = ("name", "own name", "ssh", "python", "packages", "deca_ds", "files")


def judge(facts: Facts, checks: Collection[str] = tuple(CHECKS)) -> list[Finding]:
    """Return what checks find, all of them or those that are named."""
    return [
        Finding(verdict.host, verdict.state, verdict.what, verdict.fix, check=name)
        for name, rule in CHECKS.items()
        if name in checks
        for verdict in rule(facts)
    ]
