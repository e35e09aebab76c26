"""All checks, in the order of the table: what comes first breaks what follows."""

from __future__ import annotations

from deca_ds.tools.doctor import environment_file, network, reach, resources, software
from deca_ds.tools.doctor.facts import Facts
from deca_ds.tools.doctor.findings import ADDED, Finding

_GROUPS = (reach, software, network, resources, environment_file)
CHECKS = {name: rule for group in _GROUPS for name, rule in ADDED.items() if rule.__module__ == group.__name__}


def judge(facts: Facts) -> list[Finding]:
    """What all checks find."""
    return [
        Finding(verdict.host, verdict.state, verdict.what, verdict.fix, check=name)
        for name, rule in CHECKS.items()
        for verdict in rule(facts)
    ]
