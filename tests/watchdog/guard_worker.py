"""A rank that fails, hangs or waits in a way of its own, and knows nothing but the job's store.

Usage: guard_worker.py RANK PORT WHAT FOLDER. Who stays, or is stopped, does so until there is a file FOLDER/over.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from deca_ds.errors import ConfigError, DataError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.view import Membership, View
from deca_ds.watchdog import ending
from deca_ds.watchdog.failure import Failure
from deca_ds.watchdog.guard import guarded
from deca_ds.watchdog.patience import Patience
from deca_ds.watchdog.standing import Elasticity, Rejoining
from deca_ds.watchdog.stop import StopByCommit

rank, port, what, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
launch = Launch("deepspeed", rank, 3, rank, ("127.0.0.1", port))


def until_ready(ranks: int) -> None:
    while len(list(output.glob("ready*"))) < ranks:
        time.sleep(0.05)


rejoining = Rejoining(host=0) if what == "rejoins" else None
patience = Patience(others_s=3.0 if what == "rejoins" else 60.0, reacts_s=1.0 if what == "hangs" else 600.0)
with guarded(launch, open_job_store(launch, 300), rejoining, patience) as guard:
    guard.write_to(output)
    if what == "wait":
        time.sleep(600)
    elif what == "ready":
        (output / f"ready{rank}").touch()
        time.sleep(600)
    elif what == "user":
        raise ConfigError("the value is odd", where="some.key", fix="make it even")
    elif what == "slow":  # long after the report is in the store, the message is still being put together
        ending.whole_message = lambda error: time.sleep(3) or "told in full"
        raise RuntimeError("a defect")
    elif what == "data":
        raise DataError("row 3 says 'secret'")
    elif what == "bug":
        raise RuntimeError("a defect")
    elif what == "second bug":
        while Failure.reported(guard.store.store) is None:
            time.sleep(0.01)
        raise RuntimeError("a defect")
    elif what == "vanish":
        until_ready(2)
        os._exit(7)
    elif what == "stopped":
        until_ready(2)
        over = f"until [ -e {output}/over ] || ! kill -0 {os.getpid()}; do sleep 0.1; done"
        subprocess.Popen(["sh", "-c", f"{over}; kill -CONT {os.getpid()}"], stderr=subprocess.DEVNULL)
        (output / "stops").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(7)
    elif what == "out":  # dropped by the others, which the main thread does not come to learn of
        cut_off = threading.Event()
        guard.progress.watch(ClientLayout(3, 1), 3.0)
        membership = Membership(View.of_all(3))
        guard.enter_elastic(Elasticity(membership, ClientLayout(3, 1), StopByCommit(), cut_off=cut_off))
        guard.let_others_go_on()
        cut_off.set()
        time.sleep(600)
    elif what == "rejoins":  # and nobody moves on, nor is anybody dropped
        guard.progress.watch(ClientLayout(3, 1), 3.0)
        guard.progress.wait_for("all")
        time.sleep(600)
    elif what in ("asked", "loads", "hangs"):  # before training
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, guard.hear)
        guard.let_stop_before_training((output / f"stopped{rank}").touch)
        (output / f"ready{rank}").touch()
        if what == "hangs":  # as in a collective: no handler is called
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        if what == "asked":
            until_ready(3)
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    elif what == "stays":
        while not (output / "over").exists():
            time.sleep(0.05)
        os._exit(0)
    elif what == "idle":
        (output / f"ready{rank}").touch()
        while not (output / "stops").exists():
            time.sleep(0.05)
        guard.progress.tick()
        guard.progress.timeout_s = 4.0
        time.sleep(600)
