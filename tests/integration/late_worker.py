"""The trainer, in which a rank is stopped for a while (SIGSTOP). Started like launchers/train.py.

Environment: LATE=RANK:STEP:UNTIL:FILE. RANK stops before its gradient of inner step STEP, counted from 1, and goes on
when FILE, the metrics of another client, has the line of inner step UNTIL.
"""

import gc
import os
import signal
import subprocess
import sys

gc.disable()  # while importing, as launchers/train.py does

from deca_ds.engine.client import Client
from deca_ds.launch.launcher import read_launch
from deca_ds.tools.train import main

rank, step, until, file = os.environ["LATE"].split(":")
gradient = Client.gradient
steps = 0


def stopping_gradient(self, *arguments):
    global steps
    steps += 1
    if steps == int(step) and read_launched == int(rank):
        wake = f'for i in $(seq 900); do grep -qs \'"step": {until},\' "{file}" && break; sleep 0.1; done'
        subprocess.Popen(["sh", "-c", f"{wake}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    return gradient(self, *arguments)


read_launched = read_launch().rank
Client.gradient = stopping_gradient
sys.exit(main(sys.argv[1:]))
