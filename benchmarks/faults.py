"""A fault campaign: runs that are killed, frozen, told to stop, starved of disk or damaged, and resumed to their end.

    python benchmarks/faults.py --faults 200

Every run is a real job of 4 to 8 clients over mpirun, started again with run.resume=auto after every fault that ends
it. It has to end with the bits of a run without faults. Prints a table and writes benchmarks/results/faults.json. The
fault `disk` needs root, for a file system of its own (tmpfs); without root it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.checkpoint.write_shards import MANIFEST
from deca_ds.training.start_log import read_starts

REPOSITORY = Path(__file__).parents[1]
SCRIPT = str(REPOSITORY / "benchmarks" / "faulty_client.py")
TIMEOUT_S = 30  # cluster.timeout_s: how long the job waits for a rank that does not move
DEADLINE_S = 150  # after a fault or a start the job has to do something by then, or it hangs
DISK_MIB = 256


@dataclass
class Fault:
    """One fault and what came of it. ended_s: until the job had ended, where it does. first_step_s: from the fault to
    the first inner step after it, the new start included. steps_lost: inner steps that were done again."""

    kind: str
    clients: int
    rank: int
    step: int
    ended_s: float | None = None
    first_step_s: float | None = None
    steps_lost: int = 0
    message: str = ""


class Failure(Exception):
    """The job did what it must not do."""


class NoRank(Failure):
    """A rank has no process: unexpected, but where the job is about to end."""


def wait(until: Callable[[], bool], what: str, deadline_s: float) -> None:
    """Until it is so; Failure at the deadline."""
    deadline = time.monotonic() + deadline_s
    while not until():
        if time.monotonic() > deadline:
            raise Failure(f"hang: not {what} after {deadline_s} s")
        time.sleep(0.05)


class Job:
    """One launch of a run."""

    def __init__(self, output: Path, clients: int):
        self.output, self.clients = output, clients
        keys = {
            "run.output": output,
            "run.resume": "auto",
            "run.threads": 1,
            "cluster.clients": clients,
            "cluster.timeout_s": TIMEOUT_S,
            "algorithm.rounds": 2,
            "checkpoint.every": 10,
            "data.micro_batch_size": 16,
            "evaluation.max_examples": 16,
            "logging.every": 1,
            "logging.progress": False,
        }
        arguments = ["--config", "examples/demo/demo.yaml", *(f"{key}={value}" for key, value in keys.items())]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }
        self.started = time.time()
        self.log = output.parent / f"{output.name}.log"
        with open(self.log, "w") as sink:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "mpirun", "-n", str(clients), sys.executable, SCRIPT, *arguments],
                cwd=REPOSITORY, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def step(self, since: float = 0.0) -> int:
        """Inner steps that the furthest client has logged. since: leave out files that are older."""
        steps = [0]
        for path in self.output.glob("metrics/client_*.jsonl"):
            if path.stat().st_mtime > since:
                steps += [int(number) for number in re.findall(r'"step": (\d+)', path.read_text()[-2000:])]
        return max(steps)

    def trains(self) -> bool:
        """Whether this launch has done a step. Before it begins, the metrics are those of the launch before, rewound or
        not."""
        begun = self.resumed_at()
        return begun is not None and self.step(self.started) > begun

    def resumed_at(self) -> int | None:
        """The inner step after which this launch continues; None until its first rank has noted that."""
        starts = read_starts(self.output)
        return starts[-1]["step"] if starts and starts[-1]["time"] > self.started else None

    def rank(self, number: int) -> psutil.Process:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if SCRIPT in process.cmdline()[:3] and process.environ()["OMPI_COMM_WORLD_RANK"] == str(number):
                    return process
        raise NoRank(f"no process of rank {number}")

    def wait(self, until: Callable[[], bool], what: str) -> None:
        wait(until, what, DEADLINE_S)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def doing(self) -> str:
        """What the ranks have noted last."""
        notes = sorted((self.output / "heartbeats").glob("*.json"))
        return "\n".join(f"{path.name}: {path.read_text().strip()}" for path in notes)

    def clean_up(self) -> None:
        ranks = psutil.Process(self.process.pid).children(recursive=True) if not self.ended() else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.kill()
        psutil.wait_procs(ranks, timeout=20)
        self.process.wait()


def kill(job: Job, fault: Fault, draw: random.Random) -> None:
    """SIGKILL."""
    job.rank(fault.rank).kill()


def hang(job: Job, fault: Fault, draw: random.Random) -> None:
    """SIGSTOP for good: the others have to notice."""
    job.rank(fault.rank).suspend()


def freeze(job: Job, fault: Fault, draw: random.Random) -> None:
    """SIGSTOP for a while: the job has to continue by itself."""
    process = job.rank(fault.rank)
    process.suspend()
    time.sleep(draw.uniform(1, 5))
    process.resume()


def preempt(job: Job, fault: Fault, draw: random.Random) -> None:
    """SIGUSR1 to mpirun, which hands it on: the job saves a checkpoint and ends with 0."""
    job.process.send_signal(signal.SIGUSR1)


def damage(job: Job, fault: Fault, draw: random.Random) -> None:
    """SIGKILL, then one file of the newest checkpoint is cut, changed or lost; a SIGKILL alone where it is the last one
    that all ranks have, for there is nothing to go back to."""
    kill(job, fault, draw)
    job.wait(job.ended, "ended")
    folders = [step_folder(job.output / "checkpoints", step) for step in steps_in(job.output / "checkpoints")]
    whole = [folder for folder in folders if len(list(folder.rglob(MANIFEST))) == job.clients]
    files = [path for path in folders[-1].rglob("*") if path.is_file()] if folders else []
    if not files or whole == folders[-1:]:
        fault.kind = "kill"
    else:
        path = draw.choice(sorted(files))
        content, how = bytearray(path.read_bytes()), draw.choice(["cut", "changed", "lost"])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if how == "lost":
            path.unlink()
        else:
            path.write_bytes(content[: draw.randrange(len(content))] if how == "cut" else content)


def disk(job: Job, fault: Fault, draw: random.Random) -> None:
    """The disk is full when the next checkpoint is written."""
    ballast = job.output.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    job.wait(job.ended, "ended")
    ballast.unlink()


def message(job: Job, fault: Fault, draw: random.Random) -> None:
    """A bit of a message flips: its receiver has to say so."""
    job.rank(fault.rank).send_signal(signal.SIGUSR2)


FAULTS = {each.__name__: each for each in (kill, hang, freeze, preempt, damage, disk, message)}
GOES_ON, ENDS_WELL = ("freeze",), ("preempt",)


def survive(output: Path, clients: int, kinds: list[str], draw: random.Random, limit: int) -> Iterator[Fault]:
    """Run to the end with at most `limit` faults on the way; yields each when the job has come over it."""
    fault: Fault | None = None
    struck = 0.0
    for _ in range(100):
        job = Job(output, clients)
        try:
            job.wait(lambda job=job: job.ended() or job.trains(), "at its first step")
            if not job.trains() and not (output / "DONE").exists():
                raise Failure(f"the new start ended by itself with {job.process.returncode}")
            while True:
                if fault is not None:
                    fault.first_step_s = time.monotonic() - struck
                    if fault.ended_s is not None:
                        fault.steps_lost = fault.step - (job.resumed_at() or 0)
                    yield fault
                    limit, fault = limit - 1, None
                pause = time.monotonic() + draw.uniform(0.2, 4)
                job.wait(
                    lambda job=job, pause=pause, limit=limit: job.ended() or (limit > 0 and time.monotonic() > pause),
                    "done",
                )
                if job.ended():
                    break
                kind = draw.choice(kinds)
                fault = Fault(kind, clients, draw.randrange(clients), job.step())
                struck = time.monotonic()
                try:
                    FAULTS[kind](job, fault, draw)
                except NoRank:  # its ranks ended before the fault struck
                    job.wait(job.ended, "ended")
                    fault = None
                    break
                if kind not in GOES_ON:
                    job.wait(job.ended, "ended")
                    break
                at = job.step()
                job.wait(lambda job=job, at=at: job.ended() or job.step() > at, "continuing")
            if (output / "DONE").exists():
                return
            code = job.process.returncode
            if fault is None:
                raise Failure(f"ended by itself with {code}")
            fault.ended_s, fault.step = time.monotonic() - struck, job.step()
            errors = re.findall(r"^ERROR: (.*)", job.log.read_text(), re.MULTILINE)
            fault.message = errors[0] if errors else ""
            if (code == 0) != (fault.kind in ENDS_WELL):
                raise Failure(f"{fault.kind} ended the job with {code}")
            if fault.kind in ("hang", "disk", "message") and not errors:
                raise Failure(f"{fault.kind} ended the job without an error")
            if fault.kind == "message" and f"(client {fault.rank}) was damaged" not in " ".join(errors):
                raise Failure(f"a damaged message of client {fault.rank} ended the job with {errors}")
        except Failure as failure:
            raise Failure(f"{failure}; last fault: {fault}\n{job.doing()}") from None
        finally:
            job.clean_up()
    raise Failure("100 starts were not enough")


def equal(one: Path, other: Path) -> bool:
    """Whether two runs have trained the same bits."""
    a, b = ShardedModel(one / "model"), ShardedModel(other / "model")
    return all(torch.equal(a.read(name, client), b.read(name, client)) for client in a.clients for name in a.names)


@contextlib.contextmanager
def own_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """A small file system at `folder`."""
    if wanted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if wanted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the fault campaign.")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument(
        "--clients", type=int, nargs="*", default=[4, 5, 6, 7, 8], help="numbers of clients to draw from"
    )
    parser.add_argument("--faults-per-run", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what cleans up
    draw, console, done, wrong = random.Random(arguments.seed), Console(), [], []
    kinds = [kind for kind in arguments.kinds if kind != "disk" or os.geteuid() == 0]
    target = REPOSITORY / "benchmarks" / "results" / "faults.json"
    with tempfile.TemporaryDirectory() as folder:
        references: dict[int, Path] = {}
        while len(done) + len(wrong) < arguments.faults:
            clients = draw.choice(arguments.clients)
            if clients not in references:
                references[clients] = Path(folder) / f"reference_{clients}"
                assert not list(survive(references[clients], clients, kinds, draw, 0))
            place = Path(folder) / "disk"
            place.mkdir(exist_ok=True)
            with own_disk(place, "disk" in kinds):
                output, in_run = place / "run", []
                limit = min(arguments.faults_per_run, arguments.faults - len(done) - len(wrong))
                try:
                    for fault in survive(output, clients, kinds, draw, limit):
                        in_run.append(fault)
                        console.print(fault, highlight=False)
                    if not equal(output, references[clients]):
                        raise Failure("the run ended with other parameters than without faults")
                except Failure as failure:
                    wrong.append({"clients": clients, "failure": str(failure), "faults": [asdict(f) for f in in_run]})
                    log = (place / "run.log").read_text()[-9000:]
                    console.print(f"WRONG: {failure}\n{log}", highlight=False, markup=False)
                done += in_run
            target.write_text(json.dumps({"faults": [asdict(f) for f in done], "wrong": wrong}, indent=1) + "\n")
    report(done, wrong, console)
    sys.exit(bool(wrong))


def report(done: list[Fault], wrong: list[dict], console: Console) -> None:
    """The table: faults by kind, and what they cost."""
    table = Table(title=f"{len(done)} faults survived, {len(wrong)} runs wrong")
    for column in ("fault", "survived", "steps lost", "job ended after, s", "next step after, s: median", "worst"):
        table.add_column(column, justify="right")
    for kind in FAULTS:
        mine = [fault for fault in done if fault.kind == kind]
        if mine:
            ended = [fault.ended_s for fault in mine if fault.ended_s is not None]
            first = [fault.first_step_s for fault in mine if fault.first_step_s is not None]
            table.add_row(
                kind, str(len(mine)), f"{statistics.fmean(fault.steps_lost for fault in mine):.1f}",
                f"{statistics.median(ended):.1f}" if ended else "-",
                f"{statistics.median(first):.1f}", f"{max(first):.1f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
