"""launchers/train.py, of which SIGUSR2 damages the next message: one of its bits flips on the way. SIGQUIT shows where
its threads are."""

from __future__ import annotations

import faulthandler
import gc
import signal
import sys
from collections import deque

gc.disable()  # as launchers/train.py does

import torch  # noqa: E402

from deca_ds.elastic.reconnect_gloo import ReconnectingGloo  # noqa: E402
from deca_ds.tools.train import main  # noqa: E402
from deca_ds.transport.mpi import MpiTransport  # noqa: E402

_KEPT = 100  # damaged messages whose memory the network may still read
armed = False
damaged: deque[torch.Tensor] = deque(maxlen=_KEPT)


def arm(*_: object) -> None:
    global armed
    armed = True


def damaging(exchange):
    def damaging_exchange(self, send, destinations, receives, tag):
        global armed
        if armed and destinations and send.numel() and self.progress.phase == "gossip":
            armed = False
            damaged.append(send.detach().clone())
            send = damaged[-1]
            values = send.view(-1).view(torch.uint8)
            place = int(torch.randint(8 * len(values), (1,), generator=torch.Generator().manual_seed(len(values))))
            values[place // 8] ^= 1 << place % 8
        return exchange(self, send, destinations, receives, tag)

    return damaging_exchange


signal.signal(signal.SIGUSR2, arm)
faulthandler.register(signal.SIGQUIT)
for transport in (MpiTransport, ReconnectingGloo):
    transport._exchange = damaging(transport._exchange)  # type: ignore[method-assign]
sys.exit(main())
