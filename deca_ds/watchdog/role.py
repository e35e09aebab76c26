"""What a rank is to the job that it fails in, and what an event leads to then: a table without threads and clocks.

standing.py holds this rank's role; guard.py and watcher.py do what the table says.
"""

from __future__ import annotations

from enum import Enum, auto


class Role(Enum):
    """MEMBER: of a job whose ranks all end when one of them fails. REJOINING: of a client that comes back and has not
    been let in yet, so that its failure is its own. OUTLIVED: the others continue without its client when it fails."""

    MEMBER = auto()
    REJOINING = auto()
    OUTLIVED = auto()

    def may_become(self, role: Role) -> bool:
        """Who trains with others that may continue without it stays so."""
        return self is not Role.OUTLIVED and role is Role.OUTLIVED


class Event(Enum):
    """What happens to a rank. ERROR: of its own, other than the next two. CUT_OFF: its client is out, or the others are
    out of its reach. HANGS: its client has stood still for too long. OTHERS_HANG: ranks that it waits for have.
    STILL_HANG: they, or its client, still do, though the others have had the time to drop them. STORE_GONE: the job's
    store has ended. STORE_SILENT: it has given no answer for too long."""

    ERROR = auto()
    CUT_OFF = auto()
    HANGS = auto()
    OTHERS_HANG = auto()
    STILL_HANG = auto()
    STORE_GONE = auto()
    STORE_SILENT = auto()


class Outcome(Enum):
    """What a rank does. END_THE_JOB: it tells all ranks, which end with it. END_THE_CLIENT: it dies as the MPI library
    expects it of the dead, and its client with it. END: it ends, and those who notice do as they must. COME_BACK: it
    becomes a new process that tries to join; COME_BACK_UNNOTICED: so that the others take it for dead. WAIT: for the
    survivors."""

    END_THE_JOB = auto()
    END_THE_CLIENT = auto()
    END = auto()
    COME_BACK = auto()
    COME_BACK_UNNOTICED = auto()
    WAIT = auto()


def on_event(role: Role, event: Event, returns: bool) -> Outcome:
    """returns: whether cluster.return_s has a rank that was cut off try to come back."""
    match role, event:
        case Role.MEMBER, Event.STORE_GONE | Event.STORE_SILENT:
            return Outcome.END
        case Role.MEMBER, _:
            return Outcome.END_THE_JOB
        case Role.REJOINING, Event.CUT_OFF | Event.STORE_GONE | Event.STORE_SILENT if returns:
            return Outcome.COME_BACK
        case Role.REJOINING, Event.HANGS | Event.OTHERS_HANG:
            return Outcome.WAIT
        case Role.REJOINING, _:
            return Outcome.END
        case Role.OUTLIVED, Event.CUT_OFF if returns:
            return Outcome.COME_BACK
        case Role.OUTLIVED, Event.HANGS if returns:
            return Outcome.COME_BACK_UNNOTICED
        case Role.OUTLIVED, Event.OTHERS_HANG | Event.STORE_GONE:
            return Outcome.WAIT
        case Role.OUTLIVED, Event.STILL_HANG:
            return Outcome.END_THE_JOB
        case Role.OUTLIVED, Event.STORE_SILENT:
            return Outcome.END
        case _:
            return Outcome.END_THE_CLIENT
