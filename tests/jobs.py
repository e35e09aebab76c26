"""Start real jobs as a user would, with a deadline, and leave no process behind."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import preloaded
import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    code: int
    output: str  # stdout and stderr


def run_command(
    command: list[str],
    *,
    deadline_s: float = 600,
    cwd: Path = REPOSITORY,
    during: Callable[[subprocess.Popen], None] = lambda process: None,
    **env: str,
) -> Finished:
    """Run to the end or fail the test at the deadline; all processes that it has started are gone afterwards.

    during: what happens to the process meanwhile.
    """
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_", "SLURM_"))},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        preloaded.ADDRESS: preloaded_server().address,
        **env,
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            environment.pop(name, None)
    # mpirun names its folder by its process id, and does not start where one that was killed has left that name behind
    temporary = tempfile.TemporaryDirectory(prefix="deca", ignore_cleanup_errors=True)
    process = subprocess.Popen(
        command, cwd=cwd, env={**environment, "TMPDIR": temporary.name}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        during(process)
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        pytest.fail(f"not done after {deadline_s} s: {' '.join(command)}\n{output[-4000:]}")
    finally:
        _kill(process)
        temporary.cleanup()
    return Finished(process.returncode, output)


def _kill(process: subprocess.Popen) -> None:
    """With its process group, and what it has started in other sessions, as `deca supervise` does."""
    below = processes_below(process, lambda command: True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()


@cache
def preloaded_server(processor: str | None = None) -> preloaded.Server:
    """This test process's own, for ranks that compute as on that processor."""
    folder = tempfile.TemporaryDirectory(prefix="deca", ignore_cleanup_errors=True)
    server = preloaded.Server(Path(folder.name), **PROCESSORS.get(processor, {}))
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


def wait_until(
    condition: Callable[[], object],
    what: str,
    *,
    seconds: float = 240,
    process: subprocess.Popen | None = None,
    log: Path | None = None,
) -> None:
    """Fail the test where that is not so in time, or not when the process that is to bring it about has ended."""
    deadline = time.monotonic() + seconds
    while True:
        ended = process is not None and process.poll() is not None  # before the look, which sees all that it has done
        if condition():
            return
        if ended or time.monotonic() > deadline:
            why = "before the job ended" if ended else f"within {seconds:g} s"
            pytest.fail(f"not {what} {why}\n{log.read_text()[-5000:] if log else ''}")
        time.sleep(0.02)


def whole_lines(path: Path) -> list[dict]:
    """The records of metrics that a job may be writing: of the lines that have come to their end. No file: none."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_done(metrics: Path) -> int:
    """The last inner step that a client's metrics have."""
    return max((line["step"] for line in whole_lines(metrics) if line["kind"] == "step"), default=0)


def processes_below(job: subprocess.Popen, wanted: Callable[[list[str]], bool]) -> list[psutil.Process]:
    """Those with such a command; others come and go meanwhile."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if wanted(process.cmdline()):
                found.append(process)
    return found


def ranks_of(job: subprocess.Popen, script: str) -> list[psutil.Process]:
    """Those that run the script, or stand for those (preloaded.py); launchers have it among their later arguments."""
    return processes_below(job, lambda command: str(REPOSITORY / script) in command[:3])


def word_job(model: Path, files: Sequence[Path], **keys: object) -> list[str]:
    """Arguments of a short job on a CPU in which every client has a file of words. keys: all else, and what differs."""
    every = {
        "run.device": "cpu",
        "run.threads": 1,  # jobs run side by side: more threads than cores wait for each other at every operation
        "cluster.timeout_s": 60,
        "model.path": model,
        "gossip.graph": "ring",
        "optimizer.lr": 0.003,
        "optimizer.schedule": "constant",  # the first and the last step count alike
        "data.per_client": f"[{','.join(map(str, files))}]",
        "data.max_length": 16,
        "data.batch_size": 4,
        "data.micro_batch_size": 2,
        "logging.progress": False,
        **keys,
    }
    return [f"{key}={value}" for key, value in every.items()]


# What makes libraries compute as they do on other processors: ATen's own kernels, oneDNN's and MKL's.
# They are read when torch is imported, so each has a server of its own.
PROCESSORS = {
    "oldest": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def as_on(processor: str | None) -> dict[str, str]:
    """The environment of a job that computes as on that processor. None, or one that this one cannot be: as it is."""
    import torch

    able = processor == "oldest" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if processor is None or not able:
        return {}
    return {**PROCESSORS[processor], preloaded.ADDRESS: preloaded_server(processor).address}


def free_port() -> int:
    """A port that nobody listens at; below those that the system gives to connections, which could take it next, as
    another worker of pytest could: each has an eighth of them."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    while True:
        port = random.SystemRandom().randrange(20_000 + worker, 32_000, 8)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launch(
    launcher: str,
    ranks: int,
    arguments: list[str],
    *,
    script: str = "launchers/train.py",
    fresh: bool = False,
    **options,
) -> Finished:
    """Start a training job.

    launcher: deepspeed, openmpi (the deepspeed launcher's), mpirun, supervised (mpirun, by deca supervise), python, or
    hand: each rank by itself, over torch as with deepspeed, whose launcher costs as much as a rank.
    fresh: every rank is a new interpreter, as a user's is; it is with openmpi. Else ranks are forks that have imported
    everything (preloaded.py), which costs a third; their parent is not the launcher.
    """
    script = str(REPOSITORY / script)
    rank = [*([sys.executable] if fresh else preloaded.PYTHON), script]
    if launcher == "deepspeed":
        start = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        start += [script] if fresh else ["--no_python", "--no_local_rank", *rank]
    elif launcher == "openmpi":
        hostfile = Path(options.pop("hostfile"))
        hostfile.write_text(f"localhost slots={ranks}\n")
        start = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--launcher", "openmpi", "--force_multi"]
        start += ["--no_ssh_check", "--master_addr", "127.0.0.1", script]
    elif launcher in ("mpirun", "supervised"):
        start = [str(BIN / "deca"), "supervise", "--pause", "0.1"] if launcher == "supervised" else []
        start += [str(BIN / "mpirun"), "-n", str(ranks), *rank]
    elif launcher == "hand":
        assert not fresh
        start = [sys.executable, str(REPOSITORY / "tests/by_hand.py"), str(ranks), str(free_port()), script]
    else:
        assert launcher == "python" and ranks == 1
        start = rank
    return run_command([*start, *arguments], **options)
