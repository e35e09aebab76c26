"""What a plan says of the hosts in a hostfile: what the doctor finds there without writing or starting anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from deca_ds.config import Config
from deca_ds.printing import print_line
from deca_ds.tools.doctor import table
from deca_ds.tools.doctor.checks import BRIEF, judge
from deca_ds.tools.doctor.examine import examine
from deca_ds.tools.doctor.facts import DEADLINE_S
from deca_ds.tools.doctor.needs import files_needed


def look_at_hosts(console: Console, config: Config, slots: Mapping[str, int], file: Path | None) -> dict[str, Any]:
    """Print whether ranks could start on each host, and find their files there; return it for programs. slots: host ->
    ranks. file: of the configuration."""
    facts = examine(slots, DEADLINE_S, files_needed(config, slots, file), briefly=True)
    findings = judge(facts, BRIEF)
    table.show(console, facts, findings)
    report = table.as_dict(facts, findings)
    more = ""
    if report["ok"]:
        more = "`deca doctor` with this hostfile looks at networks, MPI, accelerators, disks and memory there, too"
    elif any(host.sight is None for host in facts.hosts.values()):
        more = "--no-ssh makes the plan without looking at the hosts, where they are not there yet"
    if more:
        print_line(console, more)
    return report
