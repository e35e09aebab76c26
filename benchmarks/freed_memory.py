"""What glibc keeps of freed memory over a block's first steps, and what other settings of glibc cost.

    python benchmarks/freed_memory.py

Each row is a client of two ranks in processes of their own, on the CPU in float32 with zero3_lean.json, which trains
the embeddings of the random Llama of benchmarks/memory.py for eight steps. Prints a line a row, of the rank that took
most, and writes benchmarks/results/freed_memory.json: the peak resident memory of the first and of the last step, above
that of a process that has trained a tiny model; what glibc gives back when it is asked for freed memory afterwards; and
the CPU seconds of the quickest step. The rows are interleaved, twice over; the figures are the least of both.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from apart import REPOSITORY, RETURN, run_apart

DEADLINE_S = 400
STEPS, TURNS = 8, 2
KEEP_64_MIB = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20)}  # else it follows the other threshold
SETTINGS: dict[str, dict[str, str]] = {
    "glibc's own": {},
    "32 MiB": {"MALLOC_MMAP_THRESHOLD_": str(32 << 20)} | KEEP_64_MIB,
    "16 MiB": {"MALLOC_MMAP_THRESHOLD_": str(16 << 20)} | KEEP_64_MIB,
    "2 MiB": {"MALLOC_MMAP_THRESHOLD_": str(2 << 20)} | KEEP_64_MIB,
    "64 KiB": RETURN,
    "glibc's own, one arena": {"MALLOC_ARENA_MAX": "1"},
    "glibc's own, no cache of threads": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
}
LENGTHS = (64, 256)


def train(length: int) -> dict[str, float]:
    """Eight steps on the embeddings, as a rank."""
    import gc

    from memory import LEAN, SHAPE, TINY, settled
    from one_client import lonely_step, one_client, random_batch
    from resident import peak_of, resident

    from deca_ds.algorithm.deca import DecaRule
    from deca_ds.engine.heap import return_freed_memory

    keys = ["data.micro_batch_size=1", LEAN]
    with one_client() as make:
        config, client = make(TINY, keys)
        lonely_step(config, client, DecaRule(), random_batch(TINY, 1, length))(client.open_block(0, DecaRule.buffers))
        client.close_block()
        del client
        before = settled()
        config, client = make(SHAPE, keys)
        step = lonely_step(config, client, DecaRule(), random_batch(SHAPE, 1, length))
        state = client.open_block(0, DecaRule.buffers)
        peaks, seconds = [], []
        for _ in range(STEPS):
            started = time.process_time()
            peaks.append(peak_of(lambda: step(state)) - before)
            seconds.append(time.process_time() - started)
        gc.collect()
        freed = resident()
        return_freed_memory()
        return {"first": peaks[0], "last": peaks[-1], "freed": freed - resident(), "seconds": min(seconds)}


def run(length: int, setting: dict[str, str]) -> dict[str, float]:
    """One row, of the rank that took most."""
    with tempfile.TemporaryDirectory() as folder:
        more = setting | {"DECA_BENCHMARK_OUTPUT": folder}
        run_apart(__file__, 2, [str(length)], more, DEADLINE_S)
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return max(ranks, key=lambda rank: rank["last"])


def main() -> None:
    rows: dict[str, dict[str, float]] = {}
    for _ in range(TURNS):
        for length in LENGTHS:
            for name, setting in SETTINGS.items():
                now, key = run(length, setting), f"{length} tokens, {name}"
                rows[key] = {what: min(value, rows.get(key, now)[what]) for what, value in now.items()}
                print(key, rows[key], flush=True)
    target = REPOSITORY / "benchmarks" / "results" / "freed_memory.json"
    target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]  # the launcher adds --local_rank
    if words:
        rank = os.environ.get("RANK", "0")
        (Path(os.environ["DECA_BENCHMARK_OUTPUT"]) / f"{rank}.json").write_text(json.dumps(train(int(words[0]))))
    else:
        main()
