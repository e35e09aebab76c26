"""A rank's role in its job, and what the rank does at each event: a table without threads and clocks.

standing.py holds this rank's role; guard.py, look.py and watcher.py do what the table says.
"""

from __future__ import annotations

from enum import Enum, auto


class Role(Enum):
    """What a rank is to its job.

    MEMBER: the rank belongs to a job whose ranks all end when one of them fails. REJOINING: the rank's client comes
    back and has not been let in yet, so that a failure ends nobody else. OUTLIVED: when the rank fails, the other
    clients continue without its client.
    """

    MEMBER = auto()
    REJOINING = auto()
    OUTLIVED = auto()

    def may_become(self, role: Role) -> bool:
        """Return whether this role can turn into `role`: any other role can become OUTLIVED, and OUTLIVED is for
        good."""
        return self is not Role.OUTLIVED and role is Role.OUTLIVED


class Event(Enum):
    """What happens to a rank.

    ERROR: the rank raises an error that is neither of the next two. CUT_OFF: its client is out of the job, or cannot
    reach the other clients. HANGS: its client has made no progress for too long. OTHERS_HANG: ranks that it waits for
    have made none. STILL_HANG: its client, or ranks that it waits for, hang although the survivors have had the time
    to drop them. STORE_GONE: the job's store has ended. STORE_SILENT: the store has not answered for too long.
    """

    ERROR = auto()
    CUT_OFF = auto()
    HANGS = auto()
    OTHERS_HANG = auto()
    STILL_HANG = auto()
    STORE_GONE = auto()
    STORE_SILENT = auto()


class Outcome(Enum):
    """What a rank does at an event.

    END_THE_JOB: it reports the failure to all ranks, which end with it. END_THE_CLIENT: it kills itself, as the MPI
    library expects of dead ranks, and its client ends with it. END: it ends without a report to the job's store.
    COME_BACK: it becomes a new process that tries to join. COME_BACK_UNNOTICED: it does the same without a goodbye, so
    that the others take it for dead. WAIT: it continues, and the survivors drop the ranks that hang or open another
    store.
    """

    END_THE_JOB = auto()
    END_THE_CLIENT = auto()
    END = auto()
    COME_BACK = auto()
    COME_BACK_UNNOTICED = auto()
    WAIT = auto()


def on_event(role: Role, event: Event, returns: bool) -> Outcome:
    """Return what a rank of this role does at the event. returns: whether cluster.return_s lets it come back."""
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
