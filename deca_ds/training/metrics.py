"""What a run reports: a JSON line per step and evaluation, the same for trackers, and what people see of it.

Every client's leader writes its own file, so that nobody waits for anybody to log. Rank 0 also writes what concerns all
clients, to job.jsonl.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deca_ds.algorithm import Schedule, Step
from deca_ds.config.monitoring import LoggingConfig
from deca_ds.errors import CheckpointError, ConfigError, in_words
from deca_ds.launch.world import Cluster
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import client_metrics, job_metrics
from deca_ds.training.display import Display
from deca_ds.training.scores import Evaluation
from deca_ds.training.trackers import CLOSE_S, START_S, Tracker, open_trackers


class JsonLines:
    """Appends one JSON object a line and flushes it, so that a run that dies has logged all it did."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, at once. Raises CheckpointError where it cannot be written, as on a full disk."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write the metrics: {in_words(error)}",
                where=self._file.name,
                fix="make room and continue with run.resume=require, if there is a checkpoint",
            ) from error

    def reopen(self) -> None:
        """Continue in the file that now has this name."""
        self._file.close()
        self._file = open(self._file.name, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def close(self) -> None:
        self._file.close()


class Log:
    """One file of the metrics, whose numbers go to `trackers`, too."""

    def __init__(self, path: Path, trackers: Sequence[Tracker]):
        self._lines, self._trackers = JsonLines(path), trackers

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Append a line. Raises CheckpointError where it cannot be written."""
        self._lines.write({"kind": kind, "step": step, **record})
        if self._trackers:
            numbers = {f"{kind}/{key}": value for key, value in flat_numbers(record)}
            for tracker in self._trackers:
                tracker.add(numbers, step)

    def reopen(self) -> None:
        """Continue in the file that now has this name."""
        self._lines.reopen()

    def close(self) -> None:
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()


class Metrics:
    """This rank's part of the reporting; every method may be called on every rank. display: of the client's leader."""

    def __init__(self, config: LoggingConfig, cluster: Cluster, output: Path, schedule: Schedule, display: Display):
        self._cluster, self._output, self._config = cluster, output, config
        self._own = self._open(client_metrics(output, cluster.client)) if cluster.is_leader else None
        self._job = self._open(job_metrics(output)) if cluster.is_job_leader else None
        self._steps, self._display = len(schedule), display

    def step(self, step: Step, record: dict[str, Any]) -> None:
        """Log one inner step of this client; every logging.every-th is written."""
        done = step.index + 1
        self._display.step(done, step.block, record)
        if done % self._config.every == 0:
            self._write(self._own, "step", done, record)

    def evaluation(self, steps_done: int, own: dict[str, Any], job: dict[str, Any]) -> None:
        """Log an evaluation after `steps_done` steps. own: of this client. job: of all clients together."""
        self._write(self._own, "evaluation", steps_done, own)
        self._display.evaluated(own["seconds"], job.get("consensus_distance"))
        if self._cluster.is_job_leader:
            scores = Evaluation.of(steps_done, self._cluster.client, own, job)
            print_wrapped(scores.line(self._steps, own["seconds"]))
        if job:
            self.job("evaluation", steps_done, job)

    def membership(self, step: int, record: dict[str, Any]) -> None:
        """Log the members after a change, while inner step `step` or what follows it is under way; this rank may have
        become the one that logs for the job."""
        if self._job is None and self._cluster.is_job_leader:
            try:
                self._job = self._open(job_metrics(self._output))
            except ConfigError as error:  # of a tracker: the job continues
                print_wrapped(f"WARNING: {error}")
                self._job = Log(job_metrics(self._output), ())
            self._display.show()
        self.job("membership", step, record)

    def job(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Log what concerns all clients, if this rank is the one that logs for the job."""
        self._write(self._job, kind, step, record)

    def reopen(self) -> None:
        """Continue in this client's file after its lines have been rewound."""
        if self._own is not None:
            self._own.reopen()

    def close(self) -> None:
        self._display.close()
        for log in (self._own, self._job):
            if log is not None:
                with self._cluster.progress.granted(CLOSE_S):
                    log.close()

    def _open(self, path: Path) -> Log:
        with self._cluster.progress.granted(START_S):
            trackers = open_trackers(self._config, self._output, path.stem)
        return Log(path, trackers)

    @staticmethod
    def _write(log: Log | None, kind: str, step: int, record: dict[str, Any]) -> None:
        if log is not None:
            log.write(kind, step, record)


def peak_memory_bytes(device: torch.device) -> list[int]:
    """Return the peak memory of every rank of this client: of its GPU as torch counts it, or resident on the host."""
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    every = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    every[dist.get_rank()] = own
    dist.all_reduce(every)
    return every.tolist()


def flat_numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a record, and of those within it, by names as own/recall/red."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + key, float(value)))
    return found
