"""An agent on each host, over ssh or srun as the launchers use them, or in a process of this machine; asked with a
deadline."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import queue
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deca_ds.config import hub
from deca_ds.errors import LaunchError
from deca_ds.launch import digests
from deca_ds.tools.doctor import agent, links, sights

_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_SRUN = ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--mpi=none")  # beside other steps
_MODULES = (hub, digests, links, sights, agent)  # the agent, in the order of their imports
_BOOTSTRAP = """
import sys, types
for name, source in {modules!r}:
    module = sys.modules[name] = types.ModuleType(name)
    parent, _, child = name.rpartition(".")
    setattr(sys.modules.setdefault(parent, types.ModuleType(parent)), child, module)
    exec(source, module.__dict__)
module.serve({lives_s!r})
"""
_LOADER = "import sys; exec(eval(sys.stdin.readline()))"
_LAST_LINES = 5  # of stderr
_LIVES_S = 3600  # of an agent at most, should its connection not close
_END_S = 2.0  # for an agent whose input has closed

Result = TypeVar("Result")


class Unreachable(Exception):
    """No answer came. said: what ssh, or the host's python, wrote last."""

    def __init__(self, what: str, said: str = ""):
        super().__init__(what)
        self.what, self.said = what, said


class Host:
    """One host with its agent. command: starts python. within_s: for each answer. Raises LaunchError without ssh."""

    def __init__(self, command: Sequence[str], within_s: float):
        self._within_s = within_s
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            fix = "install it (openssh-client), or leave --hostfile out"
            raise LaunchError(f"cannot start {command[0]}: {error.strerror}", where="hostfile", fix=fix) from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._listen)]
        for reader in self._readers:
            reader.start()
        self._send(ascii(_agent(_LIVES_S)))

    def ask(self, question: str, **given: Any) -> Any:
        """Return the agent's answer. Raises Unreachable if none comes in time, after which the agent is gone, and
        OSError if it says what went wrong."""
        self._send(json.dumps([question, given]))
        try:
            line = self._answers.get(timeout=self._within_s)
        except queue.Empty:
            self.close()
            raise Unreachable(f"no answer within {self._within_s:g} s", self._last_said()) from None
        if line is None:
            self._answers.put(None)  # to later questions, too
            raise Unreachable(f"ended with {self._process.wait()}", self._last_said())
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["is"]

    def close(self) -> None:
        """End the agent and the connection."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended: the answer tells
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(agent.ANSWER):
                self._answers.put(line[len(agent.ANSWER) :])
        self._answers.put(None)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._said = [*self._said, line.strip()][-_LAST_LINES:]

    def _last_said(self) -> str:
        self._readers[1].join(_END_S)
        return "\n".join(self._said)


def _agent(lives_s: int) -> str:
    modules = [(module.__name__, inspect.getsource(module)) for module in _MODULES]
    return _BOOTSTRAP.format(modules=modules, lives_s=lives_s)


def by_srun(scheduler: str | None) -> bool:
    """Return whether hosts are reached as a job of Slurm starts its ranks, which needs no ssh. scheduler: in whose job
    this process is."""
    return scheduler == "Slurm" and shutil.which(_SRUN[0]) is not None


def command(name: str | None, scheduler: str | None = None) -> list[str]:
    """Return what starts python as launchers do on a host: this one's path, working folder and PYTHONPATH. Where this
    path is no python, any python 3, which still tells the rest. name: None for this machine, without ssh. scheduler:
    see `by_srun`."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    loader = f"-u -c {shlex.quote(_LOADER)}"
    own = shlex.quote(sys.executable)
    script = (
        f"export PYTHONPATH={shlex.quote(path)}; if test -x {own}; then exec {own} {loader}; fi; exec python3 {loader}"
    )
    if name is None:
        return ["sh", "-c", script]
    if by_srun(scheduler):
        return [*_SRUN, f"--nodelist={name}", "sh", "-c", script]
    return [*_SSH, name, f"sh -c {shlex.quote(script)}"]


def is_this_machine(name: str, within_s: float) -> bool:
    """Return whether a name is this machine's, so that no launcher needs ssh to reach it. within_s: for the name
    server."""
    if name in ("localhost", socket.gethostname()):
        return True
    found = resolve([name], within_s)[name]
    return bool(found) and all(map(_is_own, found))


def _is_own(address: str) -> bool:
    """Return whether an address belongs to one of this machine's interfaces: only then sockets can be bound to it."""
    try:
        family, kind, _, _, at = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as tried:
            tried.bind(at)
    except OSError:
        return False
    return True


def at_once(does: Callable[[str], Result], hosts: Sequence[str]) -> dict[str, Result]:
    """does(host) for all hosts, at the same time."""
    with ThreadPoolExecutor(max(1, len(hosts))) as threads:
        return dict(zip(hosts, threads.map(does, hosts), strict=True))


def resolve(names: Sequence[str], within_s: float) -> dict[str, list[str]]:
    """Return what names stand for on this machine; [] also for one that does not come in time. A thread each: a name
    server that does not answer cannot be interrupted."""
    found: dict[str, list[str]] = {name: [] for name in names}

    def look_up(name: str) -> None:
        found[name] = sights.addresses(name)

    threads = [threading.Thread(target=look_up, args=(name,), daemon=True) for name in names]
    deadline = time.monotonic() + within_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)
