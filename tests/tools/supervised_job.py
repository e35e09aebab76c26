"""Stands for a job that `deca supervise` starts: each start does what the next word in run.output.plan says.

CODE            ends with it
saved:CODE      the same after a new checkpoint
trained:CODE    the same after an inner step
outlived:CODE   the same before its first step, when the others go on without it
invited:CODE    the same before the others have let it in
done:CODE       the same with a DONE marker
both:CODE       the same with a FAILED marker, too, of a rank that was killed before it had removed that
stopped:CODE    the same with a STOPPED marker
lost:CODE       the same, because client 1 is gone
diverged:CODE   the same after a new checkpoint, with a FAILED marker of a client that diverged
failed:CODE     the same with a FAILED marker
other:CODE      the same, with that of client 0, which is not the rank's own
waits:CODE      the same with a STOPPED marker, after SIGUSR1
asked:CODE      the same after a request in the run's folder
deaf:CODE       hears SIGUSR1, and never ends by itself
told:CODE       the same below a launcher that makes CODE of exit code 2
join:...        any of these, with --join on the command line
"""

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from deca_ds.checkpoint.done import mark_done, mark_stopped  # no torch: it is started often
from deca_ds.watchdog.failure import tell_exit_code
from deca_ds.watchdog.stop import is_requested

output = Path(next(word for word in sys.argv if word.startswith("run.output=")).partition("=")[2])
plan = output.with_suffix(".plan")
word, *words = plan.read_text().split()
plan.write_text(" ".join(words))
assert word.startswith("join:") == ("--join" in sys.argv), word
what, _, code = word.removeprefix("join:").rpartition(":")
output.mkdir(exist_ok=True)
if what in ("saved", "diverged"):
    checkpoints = output / "checkpoints"
    (checkpoints / f"step_{10 * len(list(checkpoints.glob('step_*'))) + 10:08d}").mkdir(parents=True)
if what in ("diverged", "other"):
    whose = 1 if what == "diverged" else 0
    (output / f"FAILED_client_{whose:03d}").write_text(
        f"rank {whose} on n0, gradient, step 3\nclient {whose} has diverged: the loss is not finite (nan)\n"
    )
    if code == "0":
        mark_stopped(output, "", [whose], steps=(3, 8))
elif what in ("trained", "outlived", "invited"):
    from deca_ds.run_folder import HEARTBEATS
    from deca_ds.watchdog.heartbeats import Heartbeat, read_heartbeats

    (output / HEARTBEATS).mkdir(exist_ok=True)
    beats = {beat.rank: beat.step for beat in read_heartbeats(output)}
    steps = {0: max([3, *beats.values()]) + 1}  # client 0, whose folder is the same, trains on
    steps[1] = steps[0] if what == "trained" else 0
    for rank, step in steps.items():
        outlived = rank == 0 or what == "outlived"
        beat = Heartbeat(rank, "n0", rank, "gossip", step, "layers 0-1", None, 0.0, time.time(), outlived)
        (output / HEARTBEATS / f"rank_{rank:04d}.json").write_text(json.dumps(asdict(beat)))
elif what == "told":
    tell_exit_code(2)
elif what in ("done", "both"):
    mark_done(output, 8)
elif what in ("stopped", "lost"):
    mark_stopped(output, "", [1] if what == "lost" else [], steps=(3, 8))
elif what in ("waits", "asked", "deaf"):
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append(output.with_suffix(".heard").touch()))
    output.with_suffix(".waits").touch()
    while what == "deaf" or not (told if what == "waits" else is_requested(output)):
        time.sleep(0.05)
    mark_stopped(output, "", steps=(5, 8))
if what in ("failed", "both"):
    (output / "FAILED").write_text("rank 0 on n0, gradient, step 3\nkilled\n")
sys.exit(int(code))
