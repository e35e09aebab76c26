"""Slurm on one machine, as a batch script sees it: `sbatch` is `Slurm.start`; `srun` and `scontrol` are in PATH."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from jobs import BIN, Finished, free_port, run_command

NODE = "localhost"

# what srun tells each of its tasks; mpirun asks for the version
SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
if words == ["--version"]:
    sys.exit("slurm 24.05.0")
while words[0].startswith("-"):
    name = words.pop(0).partition("=")[0]
    if name not in ("--kill-on-bad-exit", "--cpus-per-task"):
        sys.exit(f"srun: unrecognized option '{name}'")
ranks = int(os.environ["SLURM_NTASKS"])
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks)}
places = ({**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks))
tasks = [subprocess.Popen(words, env={**os.environ, **place}) for place in places]
with open(os.environ["FAKE_SLURM"] + "/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """
case "$1 $2" in
    "show hostnames") echo "$3" ;;
    "requeue $SLURM_JOB_ID") touch "$FAKE_SLURM/requeued" ;;
    *) exit 1 ;;
esac
"""


def batch_options() -> argparse.ArgumentParser:
    """Those of sbatch's manual that the templates use; any other one is refused."""
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--job-name", required=True)
    parser.add_argument("--time", type=re.compile(r"\d\d:\d\d:\d\d").fullmatch, required=True)
    parser.add_argument("--signal", type=re.compile(r"(B:)?(\w+)@(\d+)").fullmatch, required=True)
    parser.add_argument("--open-mode", choices=["append", "truncate"], required=True)
    parser.add_argument("--requeue", action="store_true", required=True)
    return parser


class Slurm:
    """Runs batch scripts in `folder`, on one node of two tasks. Further programs may be put into `bin`."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        self.program("srun", SRUN, f"{sys.executable} -IS")
        self.program("scontrol", SCONTROL)
        self._number = next(port for _ in count() if (port := free_port()) < 30_000) - 20_000  # see the templates

    def program(self, name: str, text: str, interpreter: str = "/bin/sh") -> None:
        """Put it into the scripts' PATH."""
        (self.bin / name).write_text(f"#!{interpreter}\n{text}")
        (self.bin / name).chmod(0o755)

    def start(
        self,
        script: Path,
        arguments: Sequence[object],
        *,
        warn: Callable[[subprocess.Popen], None] | None = None,
        **env: str,
    ) -> tuple[Finished, bool]:
        """How the script ended, and whether it has put the job back into the queue. warn: returns when the time limit
        of what runs the script comes near."""
        lines = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
        here = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"]  # given to sbatch
        options = batch_options().parse_args([*shlex.split("\n".join(lines)), *here])
        tasks = options.nodes * options.ntasks_per_node
        environment = {
            "SLURM_JOB_ID": self._number, "SLURM_JOBID": self._number, "SLURM_JOB_NAME": options.job_name,
            "SLURM_JOB_NODELIST": NODE, "SLURM_NODELIST": NODE, "SLURM_NNODES": options.nodes,
            "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": options.ntasks_per_node,
            "SLURM_TASKS_PER_NODE": options.ntasks_per_node, "SLURM_CPUS_PER_TASK": options.cpus_per_task,
            "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0,  # the script's own, which all that it starts has
            "FAKE_SLURM": self.folder, "PATH": os.pathsep.join(map(str, (self.bin, BIN, os.environ["PATH"]))), **env,
        }  # fmt: skip
        to_script, name, _ = options.signal.groups()

        def during(process: subprocess.Popen) -> None:
            if warn is None:
                return
            warn(process)
            told = [process.pid] if to_script else map(int, (self.folder / "tasks").read_text().split())
            for pid in told:
                os.kill(pid, signal.Signals[f"SIG{name}"])

        for left in ("tasks", "requeued"):
            (self.folder / left).unlink(missing_ok=True)
        command = ["bash", str(script), *map(str, arguments)]
        strings = {name: str(value) for name, value in environment.items()}
        finished = run_command(command, cwd=self.folder, during=during, **strings)
        return finished, (self.folder / "requeued").exists()
