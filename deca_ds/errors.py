"""Errors a user can act on.

`UserError` and its kinds carry one message that says what is wrong, where, and what to change. The command line prints
that message alone; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import ClassVar

_ERROR_NUMBER = re.compile(r"\[Errno -?\d+\] ")

USER_ERROR_CODE, FAILURE_CODE = 2, 1
KILLED = "it was killed, or its host is out of reach"  # what it means that the connection to a rank broke off
DIVERGED = "has diverged"  # in the messages of such errors: a run that ended so may continue at another rate
LOOK_AT_THE_KILLED = "look at the end of its output, and on its host for the out-of-memory killer (dmesg)"


class UserError(ValueError):
    """Something the user can fix.

    what: the fact, with the offending value. where: the configuration key, file and line, host or rank.
    fix: what to change. The three make up the message, a line each.
    of_host: whether it is about what this host lacks, and another one may have, as a file.
    code: the exit code that it calls for. USER_ERROR_CODE: the same command fails again until somebody mends something.
    FAILURE_CODE: it may go through, because another process, a host or the network was at fault.
    """

    code: ClassVar[int] = USER_ERROR_CODE
    private = False  # whether the message may quote a client's data, and so stays with that client

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, of_host: bool = False):
        self.what, self.where, self.fix, self.of_host = what, where, fix, of_host
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


def in_words(error: Exception, *, named: bool = False) -> str:
    """Return why the system refused a file, an address or a program, without the numbers and quotes that Python adds.
    named: with the file's name, where the message around it does not give it."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if not isinstance(error, OSError) or not error.strerror:
        return _ERROR_NUMBER.sub("", str(error))
    return f"{error.strerror} ({error.filename})" if named and error.filename else error.strerror


class ConfigError(UserError):
    """A configuration key, value or combination of values is wrong."""


class DataError(UserError):
    """A data file is missing, malformed or leaves a client without examples."""

    private = True


class MissingValueError(DataError):
    """A row has no value where its format needs one."""


class ModelError(UserError):
    """A model or tokenizer cannot be loaded or has no block structure."""


class LaunchError(UserError):
    """The processes were started in a way that does not fit the configuration."""


class AbsentError(LaunchError):
    """Other ranks, or the job, did not come or answer in time."""

    code = FAILURE_CODE


class GossipError(UserError):
    """A graph, mixing matrix or neighbour's message is invalid."""


class CheckpointError(UserError):
    """A saved run is missing, incomplete or does not match."""


class DisconnectedError(GossipError):
    """Clients do not get through to each other, or do not agree, though nobody is known to be gone."""

    code = FAILURE_CODE


class StallError(UserError):
    """A rank waited longer than cluster.timeout_s for ranks that do not move on.

    clients: whose ranks these are. idle_s: seconds since any of them, or the rank itself, moved on.
    """

    code = FAILURE_CODE

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        clients: Iterable[int | None] = (),
        idle_s: float = 0.0,
    ):
        super().__init__(what, where=where, fix=fix)
        self.clients, self.idle_s = frozenset(clients), idle_s


class DivergedError(UserError):
    """A loss, a gradient, a parameter, a moment or a score is not finite. The message has the words DIVERGED, by which
    it is known later, in the marker that a failed run leaves."""


class DivergedMessageError(DivergedError, GossipError):
    """Values that are not finite, or too far away to be averaged, on their way between clients."""


class MessageError(GossipError):
    """A neighbour's message did not come, or came broken."""

    code = FAILURE_CODE


class ConnectionLostError(MessageError):
    """The connection to another rank broke off. rank: that one. seen: what the library says."""

    def __init__(self, what: str, *, where: str, fix: str, rank: int, seen: str):
        super().__init__(what, where=where, fix=f"{fix}\n  seen:  {seen}")
        self.rank, self.seen = rank, seen


class RankLostError(UserError):
    """Another rank of this rank's client is gone, and so the client."""

    code = FAILURE_CODE


class CutOffError(RankLostError):
    """The other clients continue without this one, or are out of its reach."""


class EndedError(BaseException):
    """This rank was told to end where the job cannot save anything yet. No Exception: libraries handle these."""


def exit_code(error: BaseException) -> int:
    """Return the exit code of a rank that fails with `error`."""
    return error.code if isinstance(error, UserError) else FAILURE_CODE


INTERRUPTED = "interrupted (SIGINT); SIGTERM has a job save a checkpoint before it stops"


def public_message(error: BaseException) -> str:
    """Return what other clients may read of `error`: nothing that could quote data."""
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, EndedError):
        return str(error)
    if isinstance(error, UserError):
        return f"{kind}; its message stays with that rank, see its own output" if error.private else str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"{kind}{place}; its message and traceback stay with that rank, see its own output"


def whole_message(error: BaseException) -> str:
    """Return what the rank's own output says of `error`: everything."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return str(error) if isinstance(error, UserError | EndedError) else "".join(traceback.format_exception(error))
