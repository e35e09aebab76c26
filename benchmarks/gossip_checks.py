"""What checksums and clipping cost beside the weighted mean, without any network; gossip_speed.py has messages.

    python benchmarks/gossip_checks.py [gossip.chunk_mib]

One client of a ring of three averages a shard of 64 MiB; messages from its two neighbours are in their buffers at
once. Three variants alternate in one process: the mean, of which every value is checked to be finite; with checksums as
well (what a run does); and without, but with gossip.clip_radius. For scale there are the checksum of the shard, the sum
of its memory as integers (nothing but reading), Adam's arithmetic on as many elements, and what noting a phase costs.
CPU seconds, one thread, medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from gossip_speed import average
from torch import Tensor

from deca_ds.algorithm.deca import DecaRule
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch.launcher import ClientLayout
from deca_ds.launch.progress import Progress
from deca_ds.transport.checksums import checksum
from deca_ds.transport.transport import Endpoint, Transport

NUMEL, REPETITIONS, WARM_UP = 2**24, 15, 2


class ThereAlready(Transport):
    """A transport whose messages are there as soon as they are asked for: whatever is in the buffers, which nobody ever
    changes, so that their checksums are known by where they are."""

    def __init__(self, checksums: bool = False):
        super().__init__(Endpoint(ClientLayout(3, 1), 0, timeout_s=60, checksums=checksums))
        self._values: dict[int, Tensor] = {}  # the last message of each neighbour
        self._known: dict[int, bytes] = {}

    def _exchange(self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int):
        for j, buffer in receives.items():
            if buffer.dtype == torch.float32:
                self._values[j] = buffer
            else:
                where = self._values[j].data_ptr()
                if where not in self._known:
                    self._known[where] = checksum(self._values[j])
                buffer.copy_(torch.frombuffer(bytearray(self._known[where]), dtype=torch.uint8))
        return self

    def test(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    torch.set_num_threads(1)
    chunk_mib = float(sys.argv[1]) if len(sys.argv) > 1 else GossipConfig().chunk_mib
    schedule, x = build_mixing(GossipConfig(graph="ring"), 3, seed=0), torch.randn(NUMEL)
    plain, clipping = (Gossip(ThereAlready(), schedule, chunk_mib, clip=clip) for clip in (None, Clip(1.0)))
    summed = Gossip(ThereAlready(checksums=True), schedule, chunk_mib)
    for gossip in (plain, summed, clipping):
        largest = max(chunk.numel for chunk in gossip.chunks([NUMEL]))
        for _ in range(8):
            gossip.pool.give_back(torch.randn(largest))
    rule = DecaRule()
    state = {name: torch.randn(NUMEL).abs_() for name in ("theta", "grad", *rule.buffers)}

    actions: dict[str, Callable[[], object]] = {
        "mean": lambda: average(plain, 0, x),
        "with checksums": lambda: average(summed, 0, x),
        "clipped": lambda: average(clipping, 0, x),
        "one checksum": lambda: checksum(x),
        "one sum": lambda: x.view(torch.int64).sum(),
        "local step": lambda: rule.local_step(state, inner=0, lr=1e-4, decay=0.0),
    }
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for repetition in range(WARM_UP + REPETITIONS):
        for name, action in actions.items():
            started = time.process_time()
            action()
            if repetition >= WARM_UP:
                taken[name].append(time.process_time() - started)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    progress, notes = Progress(), 100_000
    started = time.process_time()
    for step in range(notes):
        progress.enter("gradient", step=step, block="layers 0-1")
    note = (time.process_time() - started) / notes
    print(
        json.dumps(
            {
                "cpu_seconds": {name: round(value, 4) for name, value in medians.items()},
                "ratio_to_mean": {name: round(value / medians["mean"], 2) for name, value in medians.items()},
                "microseconds_of_a_note": round(1e6 * note, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
