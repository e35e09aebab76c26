"""What a client that rejoins by itself hands to the process that it becomes."""

import os
import sys

import pytest

from deca_ds.watchdog import restart


class Replaced(Exception):
    """In place of a new process."""


@pytest.mark.parametrize(("launcher", "local_rank"), [({}, "3"), ({"LOCAL_RANK": "1"}, "1")])
def test_a_new_process_has_the_launchers_numbers_and_the_device_of_the_old_one(monkeypatch, launcher, local_rank):
    """Afterwards RANK is that within the client, and LOCAL_RANK the number of the device."""
    started: list = []

    def execve(*arguments):
        started.extend(arguments)
        raise Replaced

    monkeypatch.setattr(restart, "_STARTED_WITH", {"RANK": "5", "WORLD_SIZE": "6", **launcher})
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--join", "key=value"])
    with pytest.raises(Replaced):
        restart.come_back(100.0)
    _, command, environment = started
    assert command[1:] == ["train.py", "key=value", "--join"]
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "6", local_rank]
    monkeypatch.setenv(restart._UNTIL, environment[restart._UNTIL])
    assert restart.tries_until() > 0
