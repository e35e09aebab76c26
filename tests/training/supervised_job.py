"""Stands for a job that `deca supervise` starts: each start does what the next word of the file PLAN says.

run.output=OUTPUT ...; OUTPUT.plan has the words:  saved:CODE (a checkpoint, then the end)  CODE (the end)
trained:CODE (a heartbeat of step 3, then the end)  done:0  stopped:0 (by itself)  lost:0 (because client 1 is gone)
waits:CODE (until SIGUSR1)
"""

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from deca_ds.checkpoint.done import mark_done, mark_stopped  # no torch: it is started often

output = Path(next(word for word in sys.argv if word.startswith("run.output=")).partition("=")[2])
plan = output.with_suffix(".plan")
what, _, code = (words := plan.read_text().split()).pop(0).rpartition(":")
plan.write_text(" ".join(words))
output.mkdir(exist_ok=True)
if what == "saved":
    checkpoints = output / "checkpoints"
    (checkpoints / f"step_{10 * len(list(checkpoints.glob('step_*'))) + 10:08d}").mkdir(parents=True)
elif what == "trained":
    from deca_ds.cluster.heartbeat import FOLDER, Heartbeat

    (output / FOLDER).mkdir(exist_ok=True)
    beat = Heartbeat(0, "n0", 0, "gossip", 3, "layers 0-1", None, 0.0, time.time())
    (output / FOLDER / "rank_0000.json").write_text(json.dumps(asdict(beat)))
elif what == "done":
    mark_done(output, "8 of 8 inner steps")
elif what in ("stopped", "lost"):
    mark_stopped(output, "3 of 8 inner steps", [1] if what == "lost" else [])
elif what == "waits":
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append(True))
    Path(f"{output}.waits").touch()
    while not told:
        time.sleep(0.05)
    mark_stopped(output, "5 of 8 inner steps", [])
sys.exit(int(code))
