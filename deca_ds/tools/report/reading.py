"""Reads a run's folder into a `Run`, also while the run continues, or if it was killed while it wrote a line, or if an
older version wrote the files.

A line or file that cannot be read is left out and named in `Run.notes`; values of another type count as missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deca_ds.checkpoint.done import ended
from deca_ds.config.flat import flatten
from deca_ds.errors import CheckpointError, in_words
from deca_ds.plural import first_few, named
from deca_ds.run_folder import (
    BEAT,
    CLIENT_FAILED,
    CLIENT_METRICS,
    DATA,
    EDGES,
    HEARTBEATS,
    METRICS,
    SAVED_CONFIG,
    SIMULATION,
    STARTS,
    job_metrics,
    numbered,
)
from deca_ds.tools.report import parsing
from deca_ds.tools.report.parsing import number
from deca_ds.tools.report.records import Run

_MOST_CLIENTS = 100_000
_LARGEST_MESSAGE = 20_000  # characters of a marker that are shown


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read one run a folder, with names that tell them apart. Raises CheckpointError for what is no run's folder."""
    for folder in folders:
        _check(folder)
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_Folder(path).read(name) for path, name in zip(paths, _names(paths), strict=True)]


def _check(folder: Path) -> None:
    if (folder / SAVED_CONFIG).is_file():
        return
    what = f"{str(folder)!r} is no run's folder: it has no {SAVED_CONFIG}"
    fix = "name the run.output of a run that has started"
    if not folder.exists():
        what = f"there is no folder {str(folder)!r}"
    elif not folder.is_dir():
        what = f"{str(folder)!r} is a file"
    elif within := sorted(path.parent.name for path in folder.glob(f"*/{SAVED_CONFIG}")):
        fix = f"name the runs in it: {first_few(within, 5)}"
    raise CheckpointError(what, where="deca report", fix=fix)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return for each path the shortest end that distinguishes it from the others."""
    names = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        length = 1
        while any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names


class _Folder:
    """One run's files; collects what could not be read."""

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []

    def read(self, name: str) -> Run:
        config = self._config()
        clients = self._clients(config)
        simulated = (self.path / SIMULATION).is_file()
        job = list(self._lines(self.path / SIMULATION if simulated else job_metrics(self.path)))
        if simulated:
            by_client = {client: [parsing.of_client(line, client) for line in job] for client in range(clients)}
        else:
            by_client = self._lines_by_client()
        self._note_missing([client for client in range(clients) if client not in by_client])
        return Run(
            path=self.path,
            name=name,
            config=config,
            simulated=simulated,
            steps={client: parsing.steps(own) for client, own in by_client.items()},
            evaluations={client: parsing.evaluations(own) for client, own in by_client.items()},
            together=parsing.together(job),
            memberships=[parsing.membership(line) for line in job if line.get("kind") == "membership"],
            handovers=[parsing.handover(line) for line in job if line.get("kind") == "handover"],
            starts=[parsing.start(entry) for entry in self._entries(STARTS)],
            edges=[edge for entry in self._entries(EDGES) if (edge := parsing.edge(entry)) is not None],
            data=[parsing.share(place, entry) for place, entry in enumerate(self._entries(DATA))],
            end=self._end(),
            lost=self._lost(),
            last_sign=self._last_sign(),
            notes=self.notes,
        )

    def _config(self) -> dict[str, Any]:
        try:
            read = yaml.safe_load((self.path / SAVED_CONFIG).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"cannot read {SAVED_CONFIG}: {in_words(error)}",
                where=str(self.path / SAVED_CONFIG),
                fix="copy it again from where the run was",
            ) from error
        if not isinstance(read, dict):
            raise CheckpointError(
                f"{SAVED_CONFIG} holds no configuration",
                where=str(self.path / SAVED_CONFIG),
                fix="name the run.output of a run that has started",
            )
        return flatten(read)

    def _clients(self, config: Mapping[str, Any]) -> int:
        value = config.get("cluster.clients", 1)
        if not isinstance(value, int) or not 0 < value <= _MOST_CLIENTS:
            raise CheckpointError(
                f"cluster.clients = {value!r} is no number of clients",
                where=str(self.path / SAVED_CONFIG),
                fix="name the run.output of a run that has started",
            )
        return value

    def _lines_by_client(self) -> dict[int, list[dict[str, Any]]]:
        """Return the metrics of each client whose file is in this folder."""
        return {
            client: list(self._lines(path)) for client, path in numbered(self.path / METRICS, CLIENT_METRICS).items()
        }

    def _note_missing(self, clients: Sequence[int]) -> None:
        if not clients:
            return
        missing = named("client", clients, 8)
        self.notes.append(f"no metrics of {missing} in this folder: not begun, or written on another host")

    def _lost(self) -> dict[int, str]:
        """Return why clients ended without the others, as far as they could still write that."""
        return {client: self._message(path) for client, path in numbered(self.path, CLIENT_FAILED).items()}

    def _end(self) -> tuple[str, str] | None:
        marker = ended(self.path)
        return None if marker is None else (marker, self._message(self.path / marker))

    def _text(self, path: Path) -> str:
        """Return the text of a file; "" if it is gone by now."""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.notes.append(f"{path.name} cannot be read: {in_words(error)}")
            return ""

    def _message(self, path: Path) -> str:
        return self._text(path).strip()[:_LARGEST_MESSAGE]

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the objects of a JSON Lines file; the last line of a run that was killed may be incomplete."""
        bad = 0
        for line in filter(None, self._text(path).split("\n")):
            record = _json(line)
            if isinstance(record, dict) and number(record.get("step")) is not None:
                yield record
            else:
                bad += 1
        if bad:
            lines = "1 line cannot be read and is" if bad == 1 else f"{bad} lines cannot be read and are"
            self.notes.append(f"{path.relative_to(self.path)}: {lines} left out")

    def _entries(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a JSON list."""
        text = self._text(self.path / name)
        read = _json(text)
        if text and not isinstance(read, list):
            self.notes.append(f"{name} cannot be read and is left out")
        return [entry for entry in read if isinstance(entry, dict)] if isinstance(read, list) else []

    def _last_sign(self) -> tuple[float, str] | None:
        beats = [_json(self._text(path)) for path in numbered(self.path / HEARTBEATS, BEAT).values()]
        signs = [
            (time, f"rank {beat.get('rank')}, {beat.get('phase')}")
            for beat in beats
            if isinstance(beat, dict) and (time := number(beat.get("time"))) is not None
        ]
        return max(signs, default=None)


def _json(text: str) -> Any:
    """Parse JSON; None if `text` is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
