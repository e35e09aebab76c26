"""From a table of examples to an Arrow file of what a function makes of them, in order, by several processes.

Each process is a fresh one, which inherits neither sockets nor memory of a device: a copy of the rank, made by fork,
would keep the rank's connections open when that dies. It ends when its parent does.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import MemoryMappedTable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deca_ds.data.code import SOURCES
from deca_ds.printing import print_wrapped

Batch = dict[str, list[Any]]

BATCH = 1000  # rows
ROWS_A_PROCESS = 20_000  # a process takes as long to start as it takes to encode about so many
_MANY = 10_000  # rows from which on there is a bar
_LONG = 2**26  # characters of a batch
_AHEAD = 4  # batches a process that are encoded before they are needed


@dataclass(frozen=True)
class Work:
    """How this process prepares data. processes: at most so many at a time. tick: called for every batch of rows.
    shown: whether a terminal gets a bar."""

    processes: int = 1
    tick: Callable[[], None] = lambda: None
    shown: bool = False

    @classmethod
    def here(cls, **options: Any) -> Work:
        """Return work for all cores that this process may use."""
        return cls(processes=len(os.sched_getaffinity(0)), **options)

    @contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar, and give a function that notes so many rows as done. total: None where nobody knows."""
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        shown = self.shown and console.is_terminal and (total is None or total >= _MANY)
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task(what, total=total)

            def advance(rows: int) -> None:
                self.tick()
                bar.advance(task, rows)

            yield advance


def write_rows(path: Path, features: Features, batches: Iterable[pa.RecordBatch]) -> Dataset:
    """Write a new Arrow file as the datasets library writes them; returns its rows, memory-mapped."""
    with path.open("xb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return Dataset.from_file(str(path))


def batches_of(rows: Iterable[dict[str, Any]], features: Features) -> Iterator[pa.RecordBatch]:
    """Yield the rows, BATCH at a time or fewer: Arrow counts the bytes of a batch's texts in 31 bits."""
    part: list[dict[str, Any]] = []
    length = 0
    for row in rows:
        part.append(row)
        length += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(part) == BATCH or length > _LONG:
            yield pa.RecordBatch.from_pylist(part, features.arrow_schema)
            part, length = [], 0
    if part:
        yield pa.RecordBatch.from_pylist(part, features.arrow_schema)


def select_rows(dataset: Dataset, indices: npt.NDArray[np.int64], path: Path) -> Dataset:
    """Select these rows; which ones they are lies in `path`, a new file: rows of others may be mapped from one that is
    there.

    The datasets library's own `select` makes an object of Python's of each number, 40 bytes large.
    """
    if np.array_equal(indices, np.arange(len(dataset))):
        return dataset
    kept = pa.chunked_array([pa.array(indices, pa.uint64())])
    if dataset._indices is not None:
        kept = dataset._indices.column(0).take(kept)
    table = pa.table({"indices": kept})
    with path.open("xb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, BATCH)
    mapped = MemoryMappedTable.from_file(str(path))
    return Dataset(dataset.data, dataset.info, dataset.split, mapped, fingerprint=generate_random_fingerprint())


def column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Return the values of a column, BATCH rows to a chunk: of rows that were selected the datasets library makes each
    a table of its own, 600 bytes large, for as long as they are used together."""
    if dataset._indices is None:  # all rows, as they lie in the file
        return dataset.with_format("arrow")[name][:]
    parts = dataset.select_columns([name]).with_format("arrow").iter(BATCH)
    return pa.chunked_array(
        [part[name].combine_chunks() for part in parts], type=dataset.features.arrow_schema.field(name).type
    )


def encode_rows(
    path: Path,
    dataset: Dataset,
    encode: Callable[..., Batch],
    features: Features,
    what: str,
    work: Work,
    *,
    with_indices: bool = False,
) -> Dataset:
    """Write what `encode` makes of the rows, BATCH at a time, and if `with_indices` of their numbers. what: is done.

    Raises what it raises for the first row that it refuses. With several processes `encode` is pickled.
    """
    job = Encoding(dataset, encode, features, with_indices)
    with work.bar(what, len(dataset)) as advance:

        def counted() -> Iterator[pa.RecordBatch]:
            for batch in encoded(job, min(work.processes, len(dataset) // ROWS_A_PROCESS)):
                advance(BATCH)
                yield batch

        return write_rows(path, features, counted())


class Scratch:
    """Writes rows that nobody needs any more when the entry is made. folder: has no such files yet, and has to be there
    as long as the rows are."""

    def __init__(self, folder: Path, work: Work):
        self._folder, self._work, self._files = folder, work, 0

    def select(self, dataset: Dataset, indices: npt.NDArray[np.int64]) -> Dataset:
        """See `select_rows`."""
        return select_rows(dataset, indices, self._next("indices.arrow"))

    def encode(self, dataset: Dataset, encode: Callable[..., Batch], features: Features, what: str) -> Dataset:
        """See `encode_rows`."""
        return encode_rows(self._next("arrow"), dataset, encode, features, what, self._work)

    def _next(self, ending: str) -> Path:
        self._files += 1
        return self._folder / f"{self._files}.{ending}"


@dataclass(frozen=True)
class Encoding:
    """What is made of the rows of a dataset, batch by batch. encode: see `encode_rows`."""

    dataset: Dataset
    encode: Callable[..., Batch]
    features: Features
    with_indices: bool

    def batch(self, start: int, end: int) -> pa.RecordBatch:
        rows = self.dataset[start:end]
        made = self.encode(rows, list(range(start, end))) if self.with_indices else self.encode(rows)
        return pa.RecordBatch.from_pydict(made, self.features.arrow_schema)


def encoded(job: Encoding, processes: int) -> Iterator[pa.RecordBatch]:
    """Yield all batches in order, from other processes if `processes` > 1 and as far as these can do it."""
    count, done = len(job.dataset), 0
    ranges = [(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    if processes > 1:
        try:
            for batch in by_processes(job, ranges, processes):
                yield batch
                done += 1
        except (BrokenProcessPool, pickle.PicklingError) as error:
            told = f"other processes cannot prepare data ({error}); this one continues alone"
            print_wrapped(f"WARNING: {told}")
    yield from starmap(job.batch, ranges[done:])


def by_processes(job: Encoding, ranges: list[tuple[int, int]], processes: int) -> Iterator[pa.RecordBatch]:
    """Yield the batches of these ranges of rows in order, made by other processes.

    Raises what `encode` raises, PicklingError where it cannot be handed over, and BrokenProcessPool where one died.
    """
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=begin, initargs=(SOURCES, _pickled(job))
    )
    waiting: deque[Future[pa.RecordBatch]] = deque()
    try:
        for start, end in ranges:
            waiting.append(executor.submit(_batch, start, end))
            if len(waiting) > _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _pickled(job: Encoding) -> bytes:
    try:
        return pickle.dumps(job)
    except (TypeError, AttributeError) as error:  # so does pickle say that it knows no way, of some objects
        raise pickle.PicklingError(str(error)) from error


_job: Encoding  # of a process that encodes


def begin(sources: str, pickled: bytes) -> None:
    """Begin a process that encodes. sources: digest of the code that asks. Raises RuntimeError where this code is
    another."""
    global _job
    if sources != SOURCES:
        raise RuntimeError("the code of deca_ds/data has changed since the process started that asks for this")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.enable()  # the script that has started the parent may have disabled it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the parent, too
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers.dynamic_module_utils import init_hf_modules

    init_hf_modules()  # where the code of tokenizers lies that bring their own
    _job = pickle.loads(pickled)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _batch(start: int, end: int) -> pa.RecordBatch:
    return _job.batch(start, end)
