"""Run a script in a fork of a process that has imported everything: python tests SCRIPT ARGUMENTS...

Importing takes each rank more than four CPU seconds, which is most of what a job of a test costs. So a test process
keeps one server that has imported all that ranks need (`Server`), and `main`, in place of a rank, has it fork. It
stands for the fork: it passes on its environment, streams and network, hands on signals, and ends as the fork ends;
when it is killed, so is the fork. Without a server it runs the script itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path

ADDRESS = "DECA_TEST_SERVER"  # names the server's socket in the environment
PYTHON = [sys.executable, str(Path(__file__).parent)]  # stands for an interpreter: scripts run preloaded
READY = b"ready\n"
_CHECKOUT = Path(__file__).resolve().parent.parent
_MOST_BYTES = 2**18
_NETWORK, _CLONE_NEWNET = "/proc/self/ns/net", 0x40000000
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str | None, command: list[str]) -> None:
    """Stand for a rank."""
    if not address:
        os.execv(sys.executable, [sys.executable, *command])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        asked = {"command": command, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2, os.open(_NETWORK, os.O_RDONLY)])

        def hand_on(number: int, frame: object) -> None:
            with contextlib.suppress(OSError):  # the fork has just ended
                server.send(str(number).encode())

        for number in _HANDED_ON:
            signal.signal(number, hand_on)
        code = int(server.recv(_MOST_BYTES) or -signal.SIGKILL)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


class Server:
    """Of one test process, which it does not outlive. env: what its imports are to see."""

    def __init__(self, folder: Path, **env: str):
        self.address = str(folder / "preloaded")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", **env}
        command = [sys.executable, __file__, self.address]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        assert told == READY, told.decode() or "the server did not start"

    def close(self) -> None:
        """End it, and all that it has forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def import_once() -> None:
    """All but what takes hold of MPI, and what is found out once. DeepSpeed chooses its accelerator here, so forks are
    for runs on a CPU."""
    gc.disable()
    import deca_ds

    found = Path(deca_ds.__file__).resolve().parent.parent
    if found != _CHECKOUT:
        print(f"ranks would run deca_ds of {found}: set PYTHONPATH={_CHECKOUT}, whose tests these are", flush=True)
        sys.exit(1)
    import datasets
    import deepspeed
    import torch
    import transformers.models.llama.modeling_llama
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import deca_ds.tools.train
    import deca_ds.training.start
    from deca_ds.config import load_config

    load_config(None, ["model.path=x", "data.train=[x]"])  # reads the schema
    assert deepspeed.ops.__compatible_ops__ and get_checkpoint_conversion_mapping("mixtral")
    assert not torch.distributed.is_initialized() and "mpi4py.MPI" not in sys.modules
    del datasets, deepspeed, transformers
    gc.freeze()
    gc.enable()


def serve(address: str) -> None:
    """Fork for everybody who asks, until standard input ends. Returns in a fork as well, when it has run its script."""
    ended, woken = socket.socketpair()
    for end in (ended, woken):
        end.setblocking(False)
    forks: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server, selectors.DefaultSelector() as ready:
        server.bind(address)
        server.listen(64)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken.fileno())
        for what in (server, ended, sys.stdin):
            ready.register(what, selectors.EVENT_READ)
        os.write(1, READY)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    for process in forks:
                        os.kill(process, signal.SIGKILL)
                    return
                if key.fileobj is server:
                    asking, _ = server.accept()
                    message, received, _, _ = socket.recv_fds(asking, _MOST_BYTES, 4)
                    if not message:  # who asked was killed before it could
                        asking.close()
                        continue
                    if process := os.fork():
                        forks[process] = asking
                        ready.register(asking, selectors.EVENT_READ, process)
                        for descriptor in received:
                            os.close(descriptor)
                        continue
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (server, ended, woken, asking, ready, *forks.values()):
                        other.close()
                    *streams, network = received
                    move_to(network)
                    run(json.loads(message), streams)
                    return
                if key.fileobj is ended:
                    ended.recv(_MOST_BYTES)
                    collect(forks, ready)
                elif key.data in forks:
                    number = key.fileobj.recv(_MOST_BYTES)
                    os.kill(key.data, int(number or signal.SIGKILL))
                    if not number:
                        ready.unregister(key.fileobj)


def collect(forks: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    """Tell of all forks that have ended how they did."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            asking = forks.pop(found[0])
            with contextlib.suppress(KeyError):
                ready.unregister(asking)
            with contextlib.suppress(OSError):
                asking.send(str(os.waitstatus_to_exitcode(found[1])).encode())
            asking.close()


def move_to(network: int) -> None:
    """Of a host that is a network namespace, see benchmarks/hosts.py."""
    if os.fstat(network).st_ino != os.stat(_NETWORK).st_ino:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.close(network)


def run(asked: dict, streams: list[int]) -> None:
    """In a fork: what `python SCRIPT ARGUMENTS...` would do."""
    from deca_ds.watchdog import restart

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environment"])
    restart._STARTED_WITH = dict(os.environ)  # of when it is imported
    os.chdir(asked["folder"])
    sys.argv = asked["command"]
    sys.orig_argv = [*PYTHON, *sys.argv]  # a rank that becomes a new process is forked once more
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import_once()
    serve(sys.argv[1])
