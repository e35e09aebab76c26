"""A fault campaign on jobs that continue: it kills, stops and cuts off clients, damages messages, and lets clients
rejoin.

    python benchmarks/survivors.py --faults 150

Every run is a real job of 4 to 8 clients over torch, one rank each, on hosts of their own (network namespaces), with
cluster.on_failure=continue. Faults strike while earlier ones are still being overcome. A client that is killed is
started again with --join, one that is cut off or hangs has to come back by itself. In the end every client has to hold
what the simulator has for the same history: who was out in which inner steps, and whose state who took over. Prints a
table and writes benchmarks/results/survivors.json. Needs root.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from faults import REPOSITORY, Failure, wait
from hosts import Hosts, may_make_hosts
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.gossip import subset
from deca_ds.simulation.setup import build
from deca_ds.watchdog.heartbeats import read_heartbeats

DEADLINE_S = 180  # after a fault the others have to continue by then
TOLERANCE = 1e-5
TRIES = 6  # of a client to come back: whom it has asked may die, too
KINDS = ("kill", "hang", "cut", "blink", "freeze", "damage")
WAITS = "waits of all others for a client that comes back, s"
MAY_LOSE = ("kill", "hang", "cut", "blink")  # on a crowded machine a blink may last until the client is lost


@dataclass
class Fault:
    """One fault and what came of it. kill: SIGKILL. hang: SIGSTOP until the others have dropped it, cluster.timeout_s
    later. cut: the client's host reaches nobody until then. blink: its link is down for a while. freeze: SIGSTOP for a
    while. damage: a bit of a message flips.

    seconds: how long a hang, cut, blink or freeze lasted. next_step_s: from the fault to the next inner step that
    another client has logged. back_s: from the new start of the client, or from when it runs or reaches the others
    again, to its own first step with them. out: inner steps that the others did without it. tries: new starts that were
    lost with the client that they had asked."""

    kind: str
    clients: int
    client: int
    seconds: float = 0.0
    next_step_s: float = 0.0
    back_s: float | None = None
    out: int = 0
    tries: int = 0

    @property
    def loses(self) -> bool:
        return self.kind in ("kill", "hang", "cut")


class Job:
    """The processes of one run, and what they write: every host has a folder of its own."""

    def __init__(self, place: Path, hosts: Hosts, model: Path, seed: int, rounds: int):
        self.place, self.hosts, self.clients = place, hosts, len(hosts.names)
        self.log = place / "log"
        self.keys = [
            *("--config", "examples/demo/demo.yaml", "run.threads=1", f"run.seed={seed}", f"model.path={model}"),
            *("model.init=pretrained", f"cluster.clients={self.clients}", "cluster.timeout_s=30"),
            *("cluster.on_failure=continue", f"cluster.min_clients={self.clients // 2 + 1}", "cluster.return_s=40"),
            "gossip.graph=complete",
            # weights that change when a client is lost, and a step in which rounding does not grow
            *("gossip.weights=lazy_metropolis", "algorithm.eps=0.01", f"algorithm.rounds={rounds}"),
            *("data.batch_size=4", "data.micro_batch_size=4", "evaluation.max_examples=16", "evaluation.every=0"),
            *("logging.every=1", "logging.progress=false"),
        ]
        self.processes = {client: self.start(client) for client in range(self.clients)}

    def folder(self, client: int) -> Path:
        return self.place / f"run{client}"

    def start(self, client: int, *more: str) -> subprocess.Popen:
        script = str(REPOSITORY / "benchmarks" / "faulty_client.py")
        command = [sys.executable, script, *more, *self.keys, f"run.output={self.folder(client)}"]
        with open(self.log, "a") as sink:
            return subprocess.Popen(
                self.hosts.command(client, *command), cwd=REPOSITORY, env=self.hosts.environment(client),
                stdout=sink, stderr=sink,
            )  # fmt: skip

    def step(self, client: int) -> int:
        """Inner steps that the client has logged."""
        path = self.folder(client) / "metrics" / f"client_{client:03d}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith("}")), 0)

    def steps(self) -> int:
        return max(self.step(client) for client in range(self.clients))

    def wait(self, until: Callable[[], bool], what: str) -> None:
        wait(until, what, DEADLINE_S)

    def runs(self, client: int) -> bool:
        return self.processes[client].poll() is None

    @property
    def done(self) -> bool:
        """Whether a client has trained to the end."""
        return any((self.folder(client) / "DONE").exists() for client in range(self.clients))

    def records(self, kind: str) -> list[dict]:
        """Of job.jsonl of all hosts, in the order of time, without those of clients that were cut off."""
        paths = self.place.glob("run*/metrics/job.jsonl")
        lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        most = self.clients // 2  # of a part that does not continue
        chosen = [line for line in lines if line["kind"] == kind and len(line.get("clients", range(99))) > most]
        return sorted(chosen, key=lambda line: line["time"])

    def where(self) -> str:
        """What the processes do: their last heartbeats, and the stacks of those that run."""
        begin = self.log.stat().st_size
        for process in self.processes.values():
            process.send_signal(signal.SIGQUIT)
        time.sleep(2.0)
        with open(self.log, errors="replace") as log:
            log.seek(begin)
            stacks = log.read()
        beats = [str(beat) for client in range(self.clients) for beat in read_heartbeats(self.folder(client))]
        return "\n".join([*beats, stacks])

    def clean_up(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


class Campaign:
    """The faults of one run. limit: how many. kinds: which."""

    def __init__(self, job: Job, draw: random.Random, limit: int, kinds: list[str]):
        self.job, self.draw, self.limit, self.kinds = job, draw, limit, kinds
        self.faults: list[Fault] = []
        self.out: dict[int, tuple[Fault, float]] = {}  # client -> its fault, when it is started again
        # client -> fault, when it was started, its own last step, and that of all: alone it may do one more
        self.starting: dict[int, tuple[Fault, float, int, int]] = {}

    def run(self) -> None:
        """To the end of the job. Raises Failure if it hangs, or ends in another way than it must."""
        job = self.job
        job.wait(lambda: job.step(0) > 0, "training")
        pause = time.monotonic()
        while any(job.runs(client) for client in range(job.clients)):
            self._bring_back()
            whole = [c for c in range(job.clients) if job.runs(c) and c not in self.starting and c not in self.out]
            if len(self.faults) < self.limit and time.monotonic() > pause and not job.done:
                spare = len(whole) - (job.clients // 2 + 1)  # a majority has to stay
                kinds = [kind for kind in self.kinds if spare > 0 or kind not in MAY_LOSE]
                if kinds:
                    self._strike(Fault(self.draw.choice(kinds), job.clients, self.draw.choice(whole)), whole)
                pause = time.monotonic() + self.draw.uniform(0.2, 3)
            time.sleep(0.05)
        if not job.done:
            raise Failure("ended without DONE")

    def _strike(self, fault: Fault, whole: list[int]) -> None:
        job, client = self.job, fault.client
        others = [other for other in whole if other != client]
        struck = time.monotonic()
        if fault.kind == "kill":
            job.processes[client].kill()
            job.processes[client].wait()
        elif fault.kind == "damage":
            job.processes[client].send_signal(signal.SIGUSR2)
        elif fault.kind == "freeze":
            fault.seconds = self.draw.uniform(0.5, 5)
            job.processes[client].send_signal(signal.SIGSTOP)
            time.sleep(fault.seconds)
            job.processes[client].send_signal(signal.SIGCONT)
        elif fault.kind == "hang":
            job.processes[client].send_signal(signal.SIGSTOP)
        elif fault.kind == "cut":
            job.hosts.set_apart(client, True)
        else:
            job.hosts.link(client, "down")
            time.sleep(self.draw.uniform(0.5, 4))  # the system calls a host lost that is silent for 11 s
            job.hosts.link(client, "up")
            fault.seconds = time.monotonic() - struck
            self.starting[client] = fault, time.monotonic(), job.step(client), job.steps()
        at = {other: job.step(other) for other in others}
        job.wait(lambda: job.done or any(job.step(other) > at[other] for other in others), f"continuing after {fault}")
        fault.next_step_s = time.monotonic() - struck
        if fault.kind in ("cut", "hang"):
            if fault.kind == "cut":
                job.hosts.set_apart(client, False)
            else:
                job.processes[client].send_signal(signal.SIGCONT)
            fault.seconds = time.monotonic() - struck
            self.starting[client] = fault, time.monotonic(), job.step(client), job.steps()
        if fault.kind == "kill":
            self.out[client] = fault, time.monotonic() + self.draw.uniform(0, 2)
        self.faults.append(fault)

    def _bring_back(self) -> None:
        job, now = self.job, time.monotonic()
        for client, (fault, since, last, last_of_all) in list(self.starting.items()):
            if job.step(client) > last_of_all:
                fault.back_s, fault.out = now - since, job.step(client) - last
                del self.starting[client]
            elif not job.runs(client) and not job.done:
                fault.tries += 1
                if fault.tries > TRIES:
                    raise Failure(f"client {client} did not come back: exit code {job.processes[client].returncode}")
                job.processes[client] = job.start(client, "--join")
        for client, (fault, when) in list(self.out.items()):
            if now > when and not job.done:
                self.starting[client] = fault, now, job.step(client), job.steps()
                job.processes[client] = job.start(client, "--join")
                del self.out[client]


def differences(job: Job, faults: bool = True) -> list[float]:
    """Largest difference of a parameter to the simulator with the same history, for each client that is there in the
    end. faults: False compares with the history of a run without faults."""
    members, handed = job.records("membership"), job.records("handover")
    simulation = build(load_config(REPOSITORY / job.keys[1], [*job.keys[2:], f"run.output={job.place / 'simulated'}"]))
    original, values = simulation.mixing, simulation.clients.values
    steps, missing = simulation.run(evaluate_first=False), []
    for number in range(1, len(simulation.schedule) + 1):
        for line in handed if faults else ():
            if line["from_step"] == number:
                values[line["to"]] = values[line["by"]]
                for tensor in simulation.state.values():
                    tensor[line["to"]] = tensor[line["by"]]
        missing = next((line["missing"] for line in reversed(members) if line["from_step"] <= number), [])
        simulation.mixing = subset.without(original, missing if faults else [])
        next(steps)
    found = []
    for client in (client for client in range(job.clients) if client not in missing):
        saved = ShardedModel(job.folder(client) / "model", [client])
        expected = simulation.clients.parameters(client)
        found.append(max(float((saved.read(name, client) - values).abs().max()) for name, values in expected))
    return found


def pauses(job: Job) -> list[float]:
    """How long, in s, the others waited between two inner steps for each client that came back."""
    members = job.records("membership")
    return [
        line["time"] - max(m["time"] for m in members if m["time"] <= line["time"] and line["to"] in m["clients"])
        for line in job.records("handover")
    ]


def make_model(folder: Path, seed: int) -> None:
    """The demo's model with weights: random ones are not the same values in the simulator."""
    source = REPOSITORY / "examples" / "demo" / "model"
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def errors(job: Job) -> str:
    """What the log says of failures, without the stacks of torch's warnings about lost stores."""
    return "\n".join(line for line in job.log.read_text().splitlines() if "ERROR" in line or "WARNING:" in line)


def report(done: list[Fault], summary: dict, console: Console) -> None:
    """The table: faults by kind, and what they cost."""
    table = Table(title=f"{len(done)} faults survived, {len(summary['wrong'])} runs wrong")
    for column in ("fault", "times", "next step after, s: median", "worst", "came back", "own step after, s", "worst"):
        table.add_column(column, justify="right")
    for kind in KINDS:
        mine = [fault for fault in done if fault.kind == kind]
        if mine:
            after = [fault.next_step_s for fault in mine]
            back = [fault.back_s for fault in mine if fault.back_s is not None]
            table.add_row(
                kind, str(len(mine)), f"{statistics.median(after):.1f}", f"{max(after):.1f}",
                *((str(len(back)), f"{statistics.median(back):.1f}", f"{max(back):.1f}") if back else ("-", "-", "-")),
            )  # fmt: skip
    console.print(table)
    console.print({key: value for key, value in summary.items() if key not in ("faults", "wrong", WAITS)})
    if summary[WAITS]:
        console.print(f"{WAITS}: median {statistics.median(summary[WAITS]):.2f}, worst {max(summary[WAITS]):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the fault campaign on jobs that continue.")
    parser.add_argument("--faults", type=int, default=150)
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 5, 6, 7, 8], help="numbers to draw from")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--faults-per-run", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=12, help="of a run, 60 inner steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="survivors.json", help="name of the file in benchmarks/results")
    arguments = parser.parse_args()
    if not may_make_hosts():
        sys.exit("the hosts are network namespaces: start it as root on Linux")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what cleans up
    draw, console, done = random.Random(arguments.seed), Console(), []
    summary: dict = {"wrong": [], "runs": 0, "largest difference": 0.0, "smallest difference without its faults": None}
    summary[WAITS] = waits = list[float]()
    target = REPOSITORY / "benchmarks" / "results" / arguments.results
    while len(done) < arguments.faults and len(summary["wrong"]) < 10:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            make_model(place / "model", arguments.seed)
            hosts, job, faults = Hosts(draw.choice(arguments.clients)), None, list[Fault]()
            try:
                hosts.set_up()
                job = Job(place, hosts, place / "model", draw.randrange(1000), arguments.rounds)
                limit = min(arguments.faults_per_run, arguments.faults - len(done))
                campaign = Campaign(job, draw, limit, arguments.kinds)
                faults = campaign.faults
                campaign.run()
                off = max(differences(job))
                console.print(faults, f"difference {off:.1e}", highlight=False)
                if off > TOLERANCE:
                    raise Failure(f"parameters differ from the simulator's by {off:g}")
                if any(fault.loses for fault in faults):  # the check has to be able to fail
                    control = max(differences(job, faults=False))
                    smallest = summary["smallest difference without its faults"]
                    key = "smallest difference without its faults"
                    summary[key] = control if smallest is None else min(control, smallest)
                summary["largest difference"] = max(summary["largest difference"], off)
                waits += [round(seconds, 3) for seconds in pauses(job)]
                summary["runs"] += 1
                done += faults
            except Failure as failure:
                wrong = {"clients": len(hosts.names), "failure": str(failure), "faults": [asdict(f) for f in faults]}
                summary["wrong"].append(wrong)
                shown = [errors(job), job.where()] if job else []
                console.print(f"WRONG: {failure}", faults, *shown, highlight=False, markup=False)
            finally:
                if job is not None:
                    job.clean_up()
                hosts.clean_up()
        target.write_text(json.dumps({"faults": [asdict(fault) for fault in done], **summary}, indent=1) + "\n")
    report(done, summary, console)
    sys.exit(bool(summary["wrong"]))


if __name__ == "__main__":
    main()
