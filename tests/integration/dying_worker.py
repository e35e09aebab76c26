"""The trainer, in which one rank kills itself without a word. Started by mpirun like launchers/train.py.

Usage: dying_worker.py RANK STEP PLACE key=value ...; STEP: inner step, counted from 1. PLACE: before (its local step),
sent (its first chunk of the averaging), evaluation (while the mean model after STEP is averaged), never.
"""

import os
import signal
import sys

from deca_ds.cluster.launch import read_launch
from deca_ds.engine.client import Client
from deca_ds.gossip.ulfm import SurvivingTransport
from deca_ds.training.main import main

rank, last, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if read_launch().rank == rank:
    gradient, exchange = Client.gradient, SurvivingTransport.exchange
    steps = 0

    def counting_gradient(self, *arguments):
        global steps
        steps += 1
        if steps == last and place == "before":
            die()
        return gradient(self, *arguments)

    def dying_exchange(self, *arguments):
        started = exchange(self, *arguments)
        if steps == last and self.progress.phase == {"sent": "gossip", "evaluation": "evaluation"}.get(place):
            started.wait()
            die()
        return started

    Client.gradient, SurvivingTransport.exchange = counting_gradient, dying_exchange

sys.exit(main(sys.argv[4:]))
