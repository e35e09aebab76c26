"""The findings as one table with a word in every cell, what to mend below it, and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deca_ds.plural import several
from deca_ds.printing import print_line
from deca_ds.tools.doctor.checks import CHECKS
from deca_ds.tools.doctor.facts import Facts
from deca_ds.tools.doctor.findings import HERE, Finding, State

_STYLES = {State.UNKNOWN: "dim", State.OK: "green", State.WARN: "yellow", State.FAIL: "bold red"}
_SEEN = 24  # least width of the last column
_BORDERS = 7  # of the first column and the last


def worst(findings: Sequence[Finding]) -> State:
    return max((finding.state for finding in findings), default=State.UNKNOWN)


def show(console: Console, facts: Facts, findings: Sequence[Finding]) -> None:
    """Table, then every warning and failure with its fix, then the sum."""
    for hosts in _groups(console.width, _columns(facts, findings)):
        console.print(_table(hosts, findings, console.width))
    _links(console, facts)
    for state in (State.FAIL, State.WARN):
        for finding in (each for each in _merged(findings) if each.state == state):
            told = f"{state.word} {finding.check}, {finding.host}: {finding.what}"
            print_line(console, told, head=(state.word, _STYLES[state]))
            print_line(console, f"     fix: {finding.fix}")
    print_line(console, summary(facts, findings))


def summary(facts: Facts, findings: Sequence[Finding]) -> str:
    bad = sum(finding.state == State.FAIL for finding in _merged(findings))
    doubtful = sum(finding.state == State.WARN for finding in _merged(findings))
    hosts = several(len(facts.hosts), "host")
    if facts.scheduler is not None:
        hosts += f" of this {facts.scheduler} job, {several(sum(of.slots for of in facts.hosts.values()), 'rank')}"
    if not bad and not doubtful:
        return f"{hosts}: all well"
    return f"{hosts}: {several(bad, 'failure')}, {several(doubtful, 'warning')}"


def as_dict(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs."""
    links = [{"from": one, "to": other, **link} for (one, other), link in facts.links.items()]
    return {
        "ok": worst(findings) < State.FAIL,
        "hosts": list(facts.hosts),
        "scheduler": facts.scheduler,
        "findings": [finding.as_dict() for finding in findings],
        "links": links,
    }


def _columns(facts: Facts, findings: Sequence[Finding]) -> list[str]:
    return ([HERE] if any(finding.host == HERE for finding in findings) else []) + list(facts.hosts)


def _groups(width: int, columns: Sequence[str]) -> list[list[str]]:
    """Split the hosts into tables, as many to each as fit."""
    room = width - max(map(len, CHECKS)) - _SEEN - _BORDERS
    groups: list[list[str]] = [[]]
    left = room
    for column in columns:
        if groups[-1] and _wide(column) > left:
            groups.append([])
            left = room
        groups[-1].append(column)
        left -= _wide(column)
    return groups


def _wide(host: str) -> int:
    """Return the width of a host's column, with its border."""
    return max(4, len(host)) + 3


def _table(hosts: Sequence[str], findings: Sequence[Finding], width: int) -> Table:
    table = Table()
    named = max(map(len, CHECKS))
    table.add_column("check", no_wrap=True, min_width=named)
    for host in hosts:
        table.add_column(host, no_wrap=True, min_width=_wide(host) - 3)
    left = width - named - sum(_wide(host) for host in hosts) - _BORDERS
    table.add_column("seen", no_wrap=True, overflow="ellipsis", max_width=max(_SEEN, left))
    for name in CHECKS:
        row = [finding for finding in findings if finding.check == name]
        if not row:
            continue
        states = [worst([finding for finding in row if finding.host == host]) for host in hosts]
        seen = dict.fromkeys(each.what for each in row if each.host in hosts and each.state == State.OK)
        cells = [Text(state.word, _STYLES[state]) for state in states]
        table.add_row(name, *cells, Text("; ".join(seen)))
    return table


def _links(console: Console, facts: Facts) -> None:
    for (one, other), link in facts.links.items():
        if "error" not in link:
            figures = f"{1e3 * link['round_trip_s']:.2f} ms round trip, {link['bytes_per_s'] / 1e6:,.0f} MB/s"
            print_line(console, f"{one} to {other}: {figures}")


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Merge findings that say the same of several hosts."""
    hosts: dict[tuple[str, State, str, str], list[str]] = {}
    for finding in findings:
        hosts.setdefault((finding.check, finding.state, finding.what, finding.fix), []).append(finding.host)
    return [Finding(", ".join(of), state, what, fix, check=name) for (name, state, what, fix), of in hosts.items()]
