"""What a check finds: values, from facts alone. A check is one function that `check` adds to the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum

from deca_ds.tools.doctor.facts import Facts

HERE = "here"  # the machine that launches, as far as it is none of the hosts


class State(IntEnum):
    """From what nobody could look at to what will break the job."""

    UNKNOWN = 0
    OK = 1
    WARN = 2
    FAIL = 3

    @property
    def word(self) -> str:
        return {State.UNKNOWN: "-", State.OK: "ok", State.WARN: "warn", State.FAIL: "FAIL"}[self]


@dataclass(frozen=True)
class Verdict:
    """About one host. fix: what to do about a warning or a failure."""

    host: str
    state: State
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Finding(Verdict):
    check: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"check": self.check, **asdict(self), "state": self.state.word.lower()}


Check = Callable[[Facts], Iterator[Verdict]]
ADDED: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Add a check. Of hosts that it says nothing about nothing is known."""

    def add(rule: Check) -> Check:
        ADDED[name] = rule
        return rule

    return add


def ok(host: str, what: str) -> Verdict:
    return Verdict(host, State.OK, what)


def warn(host: str, what: str, fix: str) -> Verdict:
    return Verdict(host, State.WARN, what, fix)


def fail(host: str, what: str, fix: str) -> Verdict:
    return Verdict(host, State.FAIL, what, fix)
