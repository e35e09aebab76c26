"""A cluster on one machine, as `deepspeed --hostfile` and mpirun see it: each host has its own name, address, sshd,
processes and disk. Takes root on Linux, sshd and pdsh; changes nothing outside its folder and its namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from hosts import ADDRESS, Hosts, may_make_hosts
from jobs import BIN, REPOSITORY, Finished

TOOLS = ("pdsh", "ssh", "sshd", "ssh-keygen", "unshare", "nsenter")
SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

# process 1 of a host: it ends with `unshare`, and all other processes of the host end with it
HOST = """
set -e
hostname "$NAME"
mount --make-rprivate /
mount --bind "$ROOT/hosts" /etc/hosts
mount --bind "$ROOT/etc" /etc/ssh
mount --bind "$ROOT/disks/$NAME" "$ROOT/disk"
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd "$ROOT/disk/tmp"
[ -z "$HIDDEN" ] || mount -t tmpfs tmpfs "$HIDDEN"
exec "$SSHD" -D -o "AuthorizedKeysFile $KEYS" -E "$ROOT/disk/sshd.log"
"""
SSHD = """HostKey /etc/ssh/host
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv TMPDIR={root}/disk/tmp PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
"""
SSH = """IdentityFile /etc/ssh/id
UserKnownHostsFile /dev/null
GlobalKnownHostsFile /etc/ssh/known_hosts
LogLevel ERROR
"""


def lacking() -> str | None:
    """Why this machine can have no such cluster."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SBIN) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    return None if may_make_hosts() else "takes root and network namespaces"


class Cluster:
    """Hosts by name. Users log in without a password, except where the host is in `strangers`.

    disk: the folder that every host has for itself, under the same path on all of them. without_python: hosts where
    this interpreter's virtual environment is not there. down: hosts whose link is.
    """

    def __init__(self, root: Path, names: Sequence[str], *, strangers=(), without_python=(), down=()):
        self.root, self.names, self.disk = root, list(names), root / "disk"
        self.strangers, self.without_python, self.down = strangers, without_python, down
        self._network = Hosts(len(self.names))
        self._sshd: dict[str, subprocess.Popen] = {}

    def set_up(self) -> None:
        """Raises subprocess.SubprocessError or OSError."""
        etc = self.root / "etc"
        for folder in (etc, self.disk, *(self.of(name) for name in self.names)):
            folder.mkdir(parents=True)
        addresses = {name: ADDRESS.format(i + 1) for i, name in enumerate(self.names)}
        known = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        for key in ("host", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", etc / key], check=True, timeout=100)
        (etc / "known").write_text((etc / "id.pub").read_text())
        public = (etc / "host.pub").read_text()
        (etc / "known_hosts").write_text("".join(f"{name},{address} {public}" for name, address in addresses.items()))
        (etc / "sshd_config").write_text(SSHD.format(root=self.root))
        (etc / "ssh_config").write_text(SSH)
        self._network.set_up()
        for i, name in enumerate(self.names):
            environment = {
                "PATH": SBIN, "NAME": name, "ROOT": str(self.root), "SSHD": str(shutil.which("sshd", path=SBIN)),
                "KEYS": "none" if name in self.strangers else "/etc/ssh/known",
                "HIDDEN": sys.prefix if name in self.without_python else "",
            }  # fmt: skip
            apart = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
            self._sshd[name] = subprocess.Popen(
                self._network.command(i, *apart, "sh", "-c", HOST), env=environment, stdin=subprocess.DEVNULL
            )
        _wait(lambda: all((self.of(name) / "sshd.log").exists() for name in self.names), "no sshd")
        for name in self.down:
            self._network.link(self.names.index(name), "down")

    def of(self, name: str) -> Path:
        """A host's disk, as this process sees it."""
        return self.root / "disks" / name

    def _first(self, name: str) -> int:
        """The host's process 1, as this process sees it."""
        return psutil.Process(self._sshd[name].pid).children()[0].pid

    def start(self, name: str, command: Sequence[object], *, cwd: Path, sink, **env: str) -> subprocess.Popen:
        """Start what a user types on that host; its process group is the terminal's foreground, with its pid."""
        enter = ["nsenter", "--target", str(self._first(name)), "--mount", "--uts", "--ipc", "--net", "--pid"]
        environment = {
            "PATH": f"{BIN}{os.pathsep}{SBIN}", "HOME": str(self.disk), "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": str(self.disk / "tmp"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **env,
        }  # fmt: skip
        return subprocess.Popen(
            [*enter, f"--wd={cwd}", "--", *map(str, command)], env=environment, stdin=subprocess.DEVNULL, stdout=sink,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def interrupt(self, process: subprocess.Popen) -> None:
        """Ctrl-C in that terminal. nsenter, which only passes the exit code on, is no process that a user has there."""
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(child.pid) == process.pid:
                    child.send_signal(signal.SIGINT)

    def run(
        self,
        name: str,
        command: Sequence[object],
        *,
        cwd: Path = REPOSITORY,
        deadline_s: float = 600,
        during: Callable[[subprocess.Popen], None] = lambda process: None,
        **env: str,
    ) -> Finished:
        """Run to its end, or raise AssertionError at the deadline, with the output."""
        log = self.of(name) / "log"
        log.unlink(missing_ok=True)
        with log.open("w") as sink:
            process = self.start(name, command, cwd=cwd, sink=sink, **env)
        try:
            during(process)
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {deadline_s} s\n{log.read_text()[-4000:]}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Finished(process.returncode, log.read_text())

    def processes(self, name: str) -> Mapping[int, str]:
        """Of the host, without its first one: pid, as this process sees it -> command line."""
        first, found = self._first(name), {}
        here = os.readlink(f"/proc/{first}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(folder.name) != first and os.readlink(folder / "ns" / "pid") == here:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def end_all(self) -> None:
        """End all that runs on any host."""
        for pid in (pid for name in self.names for pid in self.processes(name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left(self, seconds: float = 100) -> dict[str, list[str]]:
        """What still runs on any host when nothing has ended for so long; nothing, as soon as that is so."""
        with contextlib.suppress(TimeoutError):
            _wait(lambda: not any(self.processes(name) for name in self.names), "", seconds)
        return {name: list(of.values()) for name in self.names if (of := self.processes(name))}

    def clean_up(self) -> None:
        """End every process of every host, and remove the hosts."""
        for process in self._sshd.values():
            process.kill()  # and with it the host's process 1, and all others
            process.wait()
        self._network.clean_up()


def _wait(until: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)
