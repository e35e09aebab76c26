"""The trainer, in which ranks die. Started like launchers/train.py.

DECA_TEST_DYING=RANK:STEP:PLACE[,...] says which. STEP: inner step, counted from 1. PLACE: before (its local step),
error (the same, by an exception), nan (there, a parameter is), sent (its first chunk of the averaging), evaluation
(while the mean model after STEP is averaged), returned (before the local step, STEP steps after a client has come
back). All but error and nan is SIGKILL. And damaged: a bit of its first chunk flips on the way; hangs: its main thread
does, before the local step; stopped: its process is, there, until the others have put it out. A rank that is started
with --join does none of that; with DECA_TEST_LOADS=BEGUN:UNTIL it creates the file BEGUN when it is to load its model,
and loads it as soon as there is an UNTIL; the others train as soon as there is a BEGUN. While a client is missing,
steps take DECA_TEST_AWAY_S seconds, or one.
"""

import gc
import os
import signal
import subprocess
import sys
import time

gc.disable()  # while importing, as launchers/train.py does

import torch

from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.reconnect_ulfm import ReconnectingUlfm
from deca_ds.engine.client import Client
from deca_ds.launch.launcher import read_launch
from deca_ds.tools.train import main
from deca_ds.training import build

dying = os.environ["DECA_TEST_DYING"]
deaths = {int(rank): (int(step), place) for rank, step, place in (death.split(":") for death in dying.split(","))}
last, place = deaths.get(read_launch().rank, (0, "never"))
if "--join" in sys.argv:
    last = 0
job = next(word for word in sys.argv if word.startswith("run.output=")).partition("=")[2] + "/metrics/job.jsonl"
gradient = Client.gradient
loads_begun, _, loads_until = os.environ.get("DECA_TEST_LOADS", "").partition(":")
steps, since_return, membership, damaged = 0, -1, None, []


def await_file(path):
    while path and not os.path.exists(path):
        time.sleep(0.02)


def counting_gradient(self, *arguments):
    global steps, since_return
    steps += 1
    await_file(loads_begun)
    assert gc.isenabled(), "garbage is not collected in training"
    if membership is not None and membership.view.missing:
        since_return = 0
        time.sleep(float(os.environ.get("DECA_TEST_AWAY_S", 1)))
    elif since_return >= 0:
        since_return += 1
    if (steps == last and place == "before") or (since_return == last and place == "returned"):
        os.kill(os.getpid(), signal.SIGKILL)
    if steps == last and place == "stopped":
        out = f'until grep -qs \'"from_step": {steps},\' "{job}" || ! kill -0 {os.getpid()}; do sleep 0.1; done'
        subprocess.Popen(["sh", "-c", f"{out}; kill -CONT {os.getpid()}"], stderr=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)
    if steps == last and place == "hangs":
        time.sleep(600.0)
    if steps == last and place == "nan":
        next(self.shards(self.plan.blocks[0].names))[3].fill_(torch.nan)
    if steps == last and place == "error":
        raise RuntimeError("a defect")
    return gradient(self, *arguments)


def dying(exchange):
    def dying_exchange(self, send, destinations, receives, tag):
        global membership
        membership = self.membership  # kept up to date, also where nobody is left to exchange with
        if steps == last and place == "damaged" and self.progress.phase == "gossip" and destinations and not damaged:
            damaged.append(send.clone())  # MPI reads it later
            send = damaged[0]
            send.view(torch.int32)[0] ^= 1 << 20
        started = exchange(self, send, destinations, receives, tag)
        if steps == last and {"gossip": "sent", "evaluation": "evaluation"}.get(self.progress.phase) == place:
            started.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return started

    return dying_exchange


def loading_late(*arguments):
    open(loads_begun, "w").close()
    await_file(loads_until)
    return load_client(*arguments)


load_client = build.load_client
if "--join" in sys.argv and loads_begun:
    build.load_client = loading_late
Client.gradient = counting_gradient
for transport in (ReconnectingUlfm, ReconnectingGloo):
    transport._exchange = dying(transport._exchange)  # type: ignore[method-assign]
sys.exit(main())
