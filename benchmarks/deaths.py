"""A campaign of deaths: clients are killed amid training, the others go on, and they come back.

    python benchmarks/deaths.py --faults 20

Every run is a real job of 4 to 6 clients over torch, one rank each, with cluster.on_failure=continue. Clients are
killed at random moments and started again with --join after a while, up to two at a time. In the end every client has
to hold what the simulator has for the same history: who was out in which inner steps, and whose state who took over.
Prints a table and writes benchmarks/results/deaths.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from faults import REPOSITORY, SCRIPT, Failure
from rich.console import Console

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.gossip import survive
from deca_ds.simulation.setup import build

DEADLINE_S = 180  # after a fault the others have to go on by then, or the job hangs
TOLERANCE = 1e-5


@dataclass
class Death:
    """first_step_s: from the kill to the next inner step that a survivor has logged. back_s: from the new start of its
    process to its own first step. out: inner steps that the others did without it."""

    clients: int
    client: int
    first_step_s: float = 0.0
    back_s: float | None = None
    out: int = 0


class Job:
    """The processes of one run."""

    def __init__(self, folder: Path, clients: int, seed: int):
        self.folder, self.clients = folder / "run", clients
        self.log = folder / "log"
        self.keys = [
            *("--config", "examples/demo/demo.yaml", f"run.output={self.folder}", f"run.seed={seed}"),
            *(f"cluster.clients={clients}", "cluster.timeout_s=100", "cluster.on_failure=continue"),
            *("algorithm.rounds=4", "algorithm.eps=1e-4", "data.batch_size=4", "data.micro_batch_size=4"),
            *("evaluation.max_examples=16", "evaluation.every=40", "logging.every=1", "logging.progress=false"),
        ]
        self.port = random.SystemRandom().randrange(20_000, 32_000)
        self.processes = {client: self.start(client) for client in range(clients)}

    def start(self, client: int, *more: str) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(client), "WORLD_SIZE": str(self.clients)}
        environment |= {"LOCAL_RANK": str(client), "LOCAL_SIZE": str(self.clients)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        with open(self.log, "a") as sink:
            return subprocess.Popen(
                [sys.executable, SCRIPT, *more, *self.keys], cwd=REPOSITORY, env=environment, stdout=sink, stderr=sink
            )

    def step(self, client: int) -> int:
        """Inner steps that the client has logged."""
        path = self.folder / "metrics" / f"client_{client:03d}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith("}")), 0)

    def wait(self, until: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not until():
            if time.monotonic() > deadline:
                raise Failure(f"hang: not {what} after {DEADLINE_S} s")
            time.sleep(0.05)

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes.values())

    def clean_up(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def run(job: Job, draw: random.Random, limit: int) -> list[Death]:
    """To the end, with at most `limit` deaths, of which the last ones may not come back."""
    deaths: list[Death] = []
    out: dict[int, tuple[Death, float, int]] = {}  # client -> its death, when it is started again, its last step
    starting: dict[int, tuple[Death, float, int]] = {}
    job.wait(lambda: job.step(0) > 0, "training")
    pause = time.monotonic()
    while not job.ended:
        now, living = time.monotonic(), [c for c, process in job.processes.items() if process.poll() is None]
        for client, (death, since, last) in list(starting.items()):
            if job.step(client) > last:
                death.back_s, death.out = now - since, job.step(client) - last
                del starting[client]
            elif job.processes[client].poll() not in (None, 0) and not (job.folder / "DONE").exists():
                raise Failure(f"client {client} did not come back: exit code {job.processes[client].returncode}")
        for client, (death, when, last) in list(out.items()):
            if now > when:
                job.processes[client] = job.start(client, "--join")
                starting[client] = death, now, last
                del out[client]
        whole = [client for client in living if client not in starting]
        if len(deaths) < limit and now > pause and len(out) + len(starting) < 2 and len(whole) > 2:
            victim = draw.choice(whole)
            others = [client for client in whole if client != victim]
            death = Death(job.clients, victim)
            job.processes[victim].kill()
            job.processes[victim].wait()
            at = {client: job.step(client) for client in others}
            job.wait(lambda at=at: job.ended or any(job.step(c) > at[c] for c in at), "going on")
            death.first_step_s = time.monotonic() - now
            deaths.append(death)
            out[victim] = death, time.monotonic() + draw.uniform(0, 3), job.step(victim)
            pause = time.monotonic() + draw.uniform(0.5, 6)
        if (job.folder / "DONE").exists():
            out.clear()  # nobody is left to come back to
        time.sleep(0.05)
    if not (job.folder / "DONE").exists():
        raise Failure("ended without DONE")
    return deaths


def difference(job: Job) -> float:
    """Largest difference of a parameter to the simulator with the same history, over the clients at the end."""
    lines = [json.loads(line) for line in (job.folder / "metrics" / "job.jsonl").read_text().splitlines()]
    simulation = build(load_config(REPOSITORY / job.keys[1], job.keys[2:]))
    original, values = simulation.mixing, simulation.clients.values
    steps = simulation.run(evaluate_first=False)
    members = [line for line in lines if line["kind"] == "membership"]
    missing: list[int] = []
    for number in range(1, len(simulation.schedule) + 1):
        for line in lines:
            if line["kind"] == "handover" and line["from_step"] == number:
                values[line["to"]] = values[line["by"]]
                frame = steps.gi_frame.f_locals.get("state", {})
                for tensor in frame.values():
                    tensor[line["to"]] = tensor[line["by"]]
        for line in members:
            if line["from_step"] == number:
                missing = line["missing"]
        simulation.mixing = survive.without(original, missing)
        next(steps)
    saved = ShardedModel(job.folder / "model", [c for c in range(job.clients) if c not in missing])
    return max(
        float((saved.read(name, client) - expected).abs().max())
        for client in saved.clients
        for name, expected in simulation.clients.parameters(client)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the campaign of deaths.")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 5, 6], help="numbers of clients to draw from")
    parser.add_argument("--faults-per-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, console = random.Random(arguments.seed), Console()
    done: list[Death] = []
    wrong: list[dict] = []
    worst = 0.0
    while len(done) < arguments.faults and len(wrong) < 5:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder), draw.choice(arguments.clients), draw.randrange(1000))
            try:
                deaths = run(job, draw, min(arguments.faults_per_run, arguments.faults - len(done)))
                off = difference(job)
                worst = max(worst, off)
                if off > TOLERANCE:
                    raise Failure(f"parameters differ from the simulator's by {off:g}")
                done += deaths
                console.print(deaths, f"difference {off:.1e}", highlight=False)
            except Failure as failure:
                wrong.append({"clients": job.clients, "failure": str(failure)})
                console.print(f"[bold]WRONG[/bold]: {failure}\n{job.log.read_text()[-3000:]}", markup=True)
            finally:
                job.clean_up()
        record = {"deaths": [asdict(each) for each in done], "wrong": wrong, "largest difference": worst}
        target = REPOSITORY / "benchmarks" / "results" / "deaths.json"
        target.write_text(json.dumps(record, indent=1) + "\n")
    first = [death.first_step_s for death in done]
    back = [death.back_s for death in done if death.back_s is not None]
    console.print(
        f"{len(done)} deaths survived, {len(back)} came back, {len(wrong)} runs wrong; next step of a survivor after "
        f"{statistics.median(first):.2f} s (median), {max(first):.2f} s (worst); own first step "
        f"{statistics.median(back):.1f} s after the new start (median), {max(back):.1f} s (worst); "
        f"largest difference to the simulator {worst:.1e}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
