"""Does it all hold on a GPU? One command, one GPU, under nine minutes.

    python benchmarks/gpu_acceptance.py                   prints a line a check, writes results/gpu_acceptance.json
    python benchmarks/gpu_acceptance.py --small           what a CPU can do of it, with tiny models, in a minute
    python benchmarks/gpu_acceptance.py --only placement,transports

Two clients of one rank each share the GPU, because NCCL refuses two ranks of one client on one GPU: collectives over
several GPUs are not covered. Every line is PASS, FAIL or NOT COVERED with the reason. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PYTHON = [sys.executable]
RESULTS = REPOSITORY / "benchmarks" / "results"
DEMO = REPOSITORY / "examples" / "demo"
ALL_S = 520.0  # what has not ended by then is not covered
JOB_S = 240.0
PASS, FAIL, NOT_COVERED = "PASS", "FAIL", "NOT COVERED"
SHARE_OF_PRODUCT = 0.4  # of the speed of a large matrix product that a step of the 7B model reaches
AT_REST, PEAK = 1.03, 1.05  # of what the equations in docs/algorithm.md say
LARGE = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True, model_type="llama", architectures=["LlamaForCausalLM"],
)  # fmt: skip


class NotCovered(Exception):
    """Why a check has not been done."""


@dataclass(frozen=True)
class Outcome:
    """One line of the report. figures: what was measured, for the JSON."""

    check: str
    status: str
    text: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What all checks share. folder: for jobs' outputs. ends: when to stop, by time.monotonic. job_s: of a job."""

    small: bool
    folder: Path
    ends: float
    job_s: float = JOB_S
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    _failed: dict[str, Exception] = field(default_factory=dict)  # workers

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    def worker(self, name: str) -> dict[str, Any]:
        """What acceptance_worker.py measures; once, also if it fails."""
        if name in self._failed:
            raise self._failed[name]
        if name not in self.figures:
            command = [*PYTHON, str(Path(__file__).with_name("acceptance_worker.py")), name]
            try:
                output = self._end(self._start(command + ["--small"] * self.small, {}), name)
                # libraries may print more when the process ends
                told = [line for line in output.splitlines() if line.startswith("{")]
                assert told, f"{name} measured nothing: {output[-900:]}"
                self.figures[name] = json.loads(told[-1])
            except Exception as error:
                self._failed[name] = error
                raise
        return self.figures[name]

    def job(self, name: str, launcher: str, *overrides: str, stop_after: int | None = None, code: int = 0) -> Path:
        """A training job of two clients on the one device; its output folder. What has the name of an earlier one goes
        on from that. stop_after: SIGTERM after so many inner steps."""
        output = self.folder / name
        every = {
            "run.output": output, "run.device": self.device, "run.threads": 1, "cluster.clients": 2,
            "cluster.timeout_s": 100, "model.path": DEMO / "model", "model.init": "random", "model.attention": "eager",
            "blocks.layers_per_block": 2, "algorithm.rounds": 1, "algorithm.inner_steps": 4, "optimizer.lr": 0.005,
            "data.train": f"[{DEMO / 'data' / 'train.jsonl'}]", "data.format": "classification",
            "data.max_length": 64, "data.batch_size": 8, "data.micro_batch_size": 8, "data.max_examples": 200,
            "data.client_holdout": 0.1, "evaluation.max_examples": 16, "logging.progress": False,
        }  # fmt: skip
        arguments = ["launchers/train.py", *(f"{key}={value}" for key, value in every.items()), *overrides]
        if launcher == "mpi":
            started = [self._start([_program("mpirun"), "-n", "2", *PYTHON, *arguments], _MPI)]
        else:  # each rank by itself, and each sees one GPU, whatever its number on the host
            port = _free_port()
            started = [
                self._start([*PYTHON, *arguments], _rank(rank, port) | {"CUDA_VISIBLE_DEVICES": _gpu()})
                for rank in range(2)
            ]
        try:
            if stop_after is not None:
                self._await(output / "metrics" / "client_000.jsonl", f'"step": {stop_after},', started)
                for process in started:
                    process.send_signal(signal.SIGUSR1 if launcher == "mpi" else signal.SIGTERM)
            for process in started:
                self._end(process, name, code)
        finally:  # where one fails, the others do not keep the GPU
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
        return output

    def _start(self, command: list[str], more: Mapping[str, str]) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not _of_a_job(key)}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **more}
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _end(self, process: subprocess.Popen, name: str, code: int = 0) -> str:
        try:
            output, _ = process.communicate(timeout=max(1.0, min(self.job_s, self.ends - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            self._refuse_if_time_is_over(name)
            raise AssertionError(f"{name} did not end in time: {output[-600:]}") from None
        assert process.returncode == code, f"{name} ended with code {process.returncode}: {output[-900:]}"
        return output

    def _await(self, file: Path, text: str, started: list[subprocess.Popen]) -> None:
        ends = min(time.monotonic() + self.job_s, self.ends)
        while not (file.exists() and text in file.read_text()):
            assert all(process.poll() is None for process in started), "the job ended before it could be stopped"
            if time.monotonic() > ends:
                self._refuse_if_time_is_over(file.name)
                raise AssertionError(f"{file.name} did not come to {text}")
            time.sleep(0.05)

    def _refuse_if_time_is_over(self, name: str) -> None:
        """Raise NotCovered where it is the time of all checks that is over, not that of a job."""
        if time.monotonic() > self.ends:
            raise NotCovered(f"the time of all checks was over before {name} had ended")


def hardware(run: Run) -> str:
    """What the machine can do at most."""
    found = run.worker("hardware")
    assert all(value > 0 for value in found.values() if isinstance(value, float)), found
    copies = f", copies {found['to_host_gb_s']:.1f} and {found['to_gpu_gb_s']:.1f} GB/s" if not run.small else ""
    speeds = f"product {found['product_tflops']:.2f} TFLOP/s{copies}, checksum {found['checksum_gb_s']:.1f} GB/s"
    return f"{found.get('gpu', platform.processor() or 'CPU')}: {speeds}"


def placement(run: Run) -> str:
    """Two clients find their device: under mpirun, and each with one visible GPU."""
    for launcher in ("mpi", "hand"):
        output = run.job(f"bits-{launcher}", launcher)
        peaks = [_last(output, client)["peak_memory_bytes_by_rank"][0] for client in (0, 1)]
        assert all(peak > 0 for peak in peaks), f"nothing was allocated on {run.device}: {peaks}"
        run.figures[f"placement-{launcher}"] = {"peak_bytes": peaks}
    if run.small:
        raise NotCovered("no GPU; the same jobs ran on the CPU")
    return "mpirun with all GPUs visible, and one GPU visible a process"


def transports(run: Run) -> str:
    """The same parameters, bit for bit, over MPI and over torch, and once more."""
    digests = [_digest(run.folder / f"bits-{launcher}") for launcher in ("mpi", "hand")]
    assert digests[0] == digests[1], "MPI and torch gave other parameters"
    if not run.small:
        assert _digest(run.job("bits-again", "hand")) == digests[0], "a second run gave other parameters"
    return "MPI and torch" + ("" if run.small else ", and two runs") + ": the same bits"


def simulator(run: Run) -> str:
    """Float32 on the device against the simulator on the CPU: losses before and after."""
    real = run.folder / "bits-mpi"
    target = run.folder / "simulated"
    command = [_program("deca"), "simulate", "--config", str(real / "config.yaml"), f"run.output={target}"]
    run._end(run._start([*command, "run.device=cpu"], {}), "deca simulate")
    simulated = [json.loads(line) for line in (target / "simulation.jsonl").read_text().splitlines()]
    finals = [record for record in simulated if record["kind"] == "evaluation"][-1]
    run.figures["simulator"] = difference = {}
    for client in (0, 1):
        difference[str(client)] = abs(_last(real, client)["own"]["loss"] - finals["clients"][client]["own"]["loss"])
    assert max(difference.values()) < 1e-3, f"losses differ by {difference}"
    return f"losses differ by {max(difference.values()):.1e}"


def write_order(run: Run) -> str:
    """What `write_back` writes late is what the next forward pass reads."""
    found = run.worker("engine")
    assert found["late_write_is_read"], "the forward pass read parameters from before the write"
    if run.small:
        raise NotCovered("no GPU, hence no streams; on the CPU what was written was read")
    if found["late_write_is_read_without_waiting"]:
        raise NotCovered("what is written late was read even where gathers do not wait for it")
    return "a write that waits for 0.2 s is what ZeRO-3's next gather copies on its own stream"


def exact_masters(run: Run) -> str:
    """In bf16 a block opens with the float32 masters that it closed with."""
    found = run.worker("engine")
    assert found["masters_that_rounding_would_change"] > 0.5, found
    assert found["masters_come_back"], "masters changed between two activations of a block"
    return f"{100 * found['masters_that_rounding_would_change']:.0f} % of them would have been rounded"


def resume(run: Run) -> str:
    """Stopped and gone on with: the bits of the run that was not stopped."""
    long = ("checkpoint.every=4", "algorithm.rounds=16")  # so long that no machine is done before it is stopped
    whole, stopped = run.job("whole", "hand", *long), run.job("stopped", "hand", *long, stop_after=5)
    assert not (stopped / "DONE").exists(), "the job ended before it was stopped"
    run.job("stopped", "hand", *long, "run.resume=require")
    assert _digest(stopped) == _digest(whole), "a resumed run has other parameters"
    return "stopped by SIGTERM, resumed: the bits of an uninterrupted run"


def offload(run: Run) -> str:
    """Parameters in host memory: the same losses."""
    output = run.job("offload", "mpi", f"deepspeed={REPOSITORY / 'ds_configs' / 'zero3_offload.json'}")
    gap = abs(_last(output, 0)["own"]["loss"] - _last(run.folder / "bits-mpi", 0)["own"]["loss"])
    run.figures["offload"] = {"loss_difference": gap}
    assert gap < 1e-4, f"losses differ by {gap}"
    if run.small:
        raise NotCovered("no GPU to offload from; the same job ran on the CPU")
    return f"losses differ by {gap:.1e}"


def memory(run: Run) -> str:
    """One client of 7B in bf16: M + 8 M_b at rest, and less than M + 10 M_b at the peak beside the activations."""
    found = run.worker("memory")
    if run.small:
        raise NotCovered("no GPU, whose allocator counts; a tiny model ran on the CPU")
    rest = found["at_rest_bytes"] / (found["model_bytes"] + 8 * found["block_bytes"])
    (short, low), *_, (long, high) = [(int(key), value) for key, value in found["peak_bytes_by_length"].items()]
    without_tokens = low - (high - low) / (long - short) * short
    peak = without_tokens / (found["model_bytes"] + 10 * found["block_bytes"])
    text = f"at rest {rest:.3f} of M + 8 M_b, peak without activations {peak:.3f} of M + 10 M_b"
    assert rest <= AT_REST and peak <= PEAK, text
    return text


def speed(run: Run) -> str:
    """A step of that client against the machine's matrix product."""
    found = run.worker("memory")
    share = found["tflops"] / run.worker("hardware")["product_tflops"]
    text = (
        f"{found['tokens_per_second']:.0f} tokens/s, {found['tflops']:.2f} TFLOP/s, {100 * share:.0f} % of the product"
    )
    if run.small:
        raise NotCovered(f"no GPU; a tiny model on the CPU: {text}")
    assert share >= SHARE_OF_PRODUCT, text
    return text


def gossip(run: Run) -> str:
    """A bf16 model of 1.2B parameters and a vocabulary of 128k: seconds a step, and how many of them gossip waits."""
    if run.small:
        raise NotCovered("no GPU")
    folder = run.folder / "large"
    shutil.copytree(DEMO / "model", folder)
    (folder / "config.json").write_text(json.dumps(LARGE))
    told = []
    for launcher in ("mpi", "hand"):
        for checksums in (True, False):
            name = f"{launcher}{'' if checksums else ' without checksums'}"
            try:
                output = run.job(
                    name.replace(" ", "-"), launcher, f"model.path={folder}", "model.dtype=bfloat16",
                    "model.attention=sdpa", "blocks.layers_per_block=4", "algorithm.inner_steps=3",
                    f"gossip.checksums={str(checksums).lower()}", "evaluation.mean_model=false", "data.max_length=512",
                    "logging.every=1",
                )  # fmt: skip
            except NotCovered as reason:
                raise NotCovered("; ".join([*told, str(reason)])) from None
            steps = [record for record in _metrics(output, 0) if record["kind"] == "step" and record["inner"] > 0]
            seconds = sum(record["seconds"] for record in steps) / len(steps)
            waited = sum(record["gossip_wait_seconds"] for record in steps) / len(steps)
            run.figures[name] = {"seconds_per_step": seconds, "gossip_wait_seconds": waited}
            told.append(f"{name} {seconds:.2f} ({waited:.2f}) s")
            shutil.rmtree(output)
    return ", ".join(told)


def several_gpus(run: Run) -> str:
    """Collectives of a client over several GPUs."""
    raise NotCovered("NCCL takes one GPU a rank; start examples/llama_7b_multinode.yaml where there are more")


CHECKS: dict[str, Callable[[Run], str]] = {
    check.__name__: check
    for check in (
        hardware, write_order, exact_masters, memory, speed, placement, transports, simulator, resume, offload, gossip,
        several_gpus,
    )
}  # fmt: skip
_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip


def check(run: Run, name: str) -> Outcome:
    started = time.monotonic()
    try:
        if started > run.ends:
            raise NotCovered("no time was left")
        status, text = PASS, CHECKS[name](run)
    except NotCovered as reason:
        status, text = NOT_COVERED, str(reason)
    except Exception as error:  # a check that breaks has failed; the others continue
        status, text = FAIL, f"{type(error).__name__}: {error}"
    return Outcome(name, status, text, round(time.monotonic() - started, 1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, separated by commas")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: results/gpu_acceptance.json beside this script"
    )
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
    target = arguments.output or RESULTS / "gpu_acceptance.json"
    with tempfile.TemporaryDirectory(prefix="acceptance-", ignore_cleanup_errors=True) as folder:
        run = Run(arguments.small, Path(folder), time.monotonic() + ALL_S)
        outcomes = []
        for name in names:
            outcomes.append(check(run, name))
            print(f"{outcomes[-1].status:<11}  {name:<14} {outcomes[-1].text}", flush=True)
            report = {
                "command": " ".join(["python", "benchmarks/gpu_acceptance.py", *sys.argv[1:]]),
                "versions": _versions(), "outcomes": [asdict(outcome) for outcome in outcomes], "figures": run.figures,
            }  # fmt: skip
            target.write_text(json.dumps(report, indent=1, default=str) + "\n")  # whatever comes next
    counts = {status: sum(each.status == status for each in outcomes) for status in (PASS, FAIL, NOT_COVERED)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; figures: {target}")
    return 1 if counts[FAIL] else 0


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers", "mpi4py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _program(name: str) -> str:
    """Where a command is: beside this interpreter, or in PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(BIN), os.environ.get("PATH", "")]))
    assert found is not None, f"there is no {name} in {BIN} or PATH"
    return found


def _of_a_job(key: str) -> bool:
    """Whether an MPI job has set this variable, and not who started this script."""
    return key.startswith(("OMPI_", "PMIX_")) and not key.startswith(("OMPI_MCA_", "PMIX_MCA_"))


def _rank(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _gpu() -> str:
    """The first of the GPUs that this process may see."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _metrics(output: Path, client: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics" / f"client_{client:03d}.jsonl").read_text().splitlines()]


def _last(output: Path, client: int) -> dict[str, Any]:
    return [record for record in _metrics(output, client) if record["kind"] == "evaluation"][-1]


def _digest(output: Path) -> str:
    """Of all of the trained parameters."""
    files = sorted((output / "model").rglob("*.safetensors"))
    assert files, f"no parameters in {output}"
    return hashlib.blake2b(b"".join(hashlib.blake2b(file.read_bytes()).digest() for file in files)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
