"""A client that was cut off rejoins by itself: its processes become new ones that join (elastic/rejoin.py)."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

_UNTIL = "DECA_RETURN_UNTIL"  # seconds since 1970 by this host's clock, for the new process
JOIN = "--join"
_STARTED_WITH = dict(os.environ)  # what the launcher set; later a client's ranks are numbered as a world of their own


def tries_until() -> float:
    """Return until when, by time.time(), this process has to try to join; 0.0 unless `come_back` has started it."""
    return float(os.environ.get(_UNTIL, 0.0))


def come_back(seconds: float) -> NoReturn:
    """Become a new process with the same command, number, device and output, that tries for `seconds` to join."""
    # where the launcher sets no LOCAL_RANK, `connect` has, from all ranks of the host; a client alone cannot count them
    counted = {"LOCAL_RANK": os.environ["LOCAL_RANK"]} if "LOCAL_RANK" in os.environ else {}
    environment = counted | _STARTED_WITH | {_UNTIL: str(time.time() + seconds)}
    # neighbours see a connection end when no process has it open any more, and C++ libraries may not close theirs
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:  # the descriptor with which the folder was listed
                continue
    command = [argument for argument in sys.orig_argv[1:] if argument != JOIN]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *command, JOIN], environment)
