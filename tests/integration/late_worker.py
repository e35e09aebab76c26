"""The trainer, in which a rank is stopped for a while (SIGSTOP). Started like launchers/train.py.

Environment: LATE=RANK:STEP:UNTIL:FILE. RANK stops before its gradient of inner step STEP, counted from 1, when its
heartbeat has told of that step, and continues when FILE, another client's metrics, has the line of inner step UNTIL.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

gc.disable()  # while importing, as launchers/train.py does

from deca_ds.engine.client import Client
from deca_ds.launch.launcher import read_launch
from deca_ds.run_folder import HEARTBEATS
from deca_ds.tools.train import main

rank, step, until, file = os.environ["LATE"].split(":")
heartbeat = Path(file).parents[1] / HEARTBEATS / f"rank_{int(rank):04d}.json"
gradient = Client.gradient
steps = 0


def told() -> int:
    """The step of which this rank's heartbeat tells."""
    return json.loads(heartbeat.read_text())["step"] if heartbeat.exists() else 0


def stopping_gradient(self, *arguments):
    global steps
    steps += 1
    if steps == int(step) and read_launched == int(rank):
        while told() < steps:
            time.sleep(0.05)
        wake = f'until grep -qs \'"step": {until},\' "{file}" || ! kill -0 {os.getpid()}; do sleep 0.1; done'
        subprocess.Popen(["sh", "-c", f"{wake}; kill -CONT {os.getpid()}"], stderr=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)
    return gradient(self, *arguments)


read_launched = read_launch().rank
Client.gradient = stopping_gradient
sys.exit(main(sys.argv[1:]))
