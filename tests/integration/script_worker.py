"""A researcher's script: one rank trains by `deca_ds.train`, then goes on. Usage: script_worker.py RUN.yaml FOLDER.

What it finds is written to FOLDER/RANK.json.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import deca_ds

config, folder = sys.argv[1], Path(sys.argv[2])
numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
before, environment = [signal.getsignal(number) for number in numbers], dict(os.environ)
result = deca_ds.train(config, [f"run.output={folder / 'run'}"])
found = {
    "output": str(result.output),
    "evaluations": [dataclasses.asdict(each) for each in result.evaluations],
    "handlers are as before": [signal.getsignal(number) for number in numbers] == before,
    "environment is as before": dict(os.environ) == environment,
}
try:
    deca_ds.train(config, [f"run.output={folder / 'again'}"])
except deca_ds.UserError as error:
    found["again"] = str(error)
if os.environ["RANK"] == "0":
    simulated = deca_ds.simulate(config, [f"run.output={folder / 'simulated'}"])
    found["simulated"] = simulated.best.loss
    found["best"] = result.best.loss
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
