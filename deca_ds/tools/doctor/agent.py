"""What runs on a host: it answers a line of JSON with a line of JSON, until its input closes or its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deca_ds.config import hub
from deca_ds.tools.doctor import links, sights

ANSWER = "deca-doctor: "  # before each; a shell's start-up files may print other things


def _clock() -> float:
    return time.time()


def _not_on_hub(names: Sequence[tuple[hub.Kind, str]], environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Name -> why the hub does not give it to this host, and what to do; nothing of those that it gives, and where
    nobody could ask. environment: what the ranks get there, and this process does not."""
    os.environ.update(environment)
    try:
        found = {name: (hub.why_not_on_hub(name, kind), hub.hub_fix(name, kind)) for kind, name in names}
    except ImportError:  # told of the packages
        return {}
    return {name: [why, fix] for name, (why, fix) in found.items() if why is not None}


QUESTIONS: dict[str, Callable[..., Any]] = {
    "look": sights.look,
    "clock": _clock,
    "there": sights.there,
    "not_on_hub": _not_on_hub,
    "write": sights.write,
    "see": sights.see,
    "forget": sights.forget,
    "listen": links.listen,
    "measure": links.measure,
}


def serve(lives_s: int) -> None:
    """Answer what comes on stdin. Whatever happens, files that were written are removed and the process ends."""
    signal.alarm(lives_s)
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    written: set[tuple[str, str]] = set()
    try:
        for line in sys.stdin:
            asked, given = json.loads(line)
            try:
                answer = {"is": QUESTIONS[asked](**given)}
            except (OSError, ValueError) as error:
                answer = {"error": str(error)}
            if asked == "write" and not answer.get("is", {"error": "-"})["error"]:
                written.add((answer["is"]["at"], given["name"]))
            print(ANSWER + json.dumps(answer), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for folder, name in written:
            with contextlib.suppress(OSError):
                sights.forget(folder, name)
