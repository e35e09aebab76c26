"""What many rows take: seconds until a client has its token sequences, and the memory of each of its ranks.

    python benchmarks/data_at_size.py                     # a million rows of about 200 tokens: minutes, 6 GB of disk
    python benchmarks/data_at_size.py --rows 20000        # small
    python benchmarks/data_at_size.py --rows 100000 1000000 --words 20    # does the memory grow with the rows?
    python benchmarks/data_at_size.py --code FOLDER       # of another checkout of this repository

Made-up words and a byte-level BPE of 8,000 tokens trained on them. Each rank is a process of its own without a model.
The first one tokenises, with an empty cache; then the others come, and the first one again, as in a second run. After
that each draws training batches (16 sequences) as a run does, in a random order over all rows. Memory is what Linux
tells of the process: anonymous pages, which nobody shares, and pages of mapped files, which all ranks of a host have in
common and the system takes back when it needs them. Two peaks are taken, by a look every 20 ms: of both kinds, and of
anonymous pages alone, above what there was before. For the processes that the first rank starts it is the peak of the
largest one; CPU seconds count them, too. Prints a line a rank and writes benchmarks/results/data_at_size.json.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "data_at_size.json"
DEADLINE_S = 3600
VOCABULARY, BATCH, SAMPLES, LOOK_S = 8000, 16, 5, 0.02


def make_data(folder: Path, rows: int, length: int) -> None:
    """rows.jsonl and tokenizer/ in `folder`, the same in every run. length: words in a row."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))  # as Zipf has it

    def texts(number: int) -> Iterator[str]:
        return (" ".join(draw.choices(words, cum_weights=weights, k=length)) for _ in range(number))

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts(2000), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / "tokenizer")
    with open(folder / "rows.jsonl", "w") as file:
        for text in texts(rows):
            file.write(json.dumps({"text": text}) + "\n")


def memory() -> dict[str, float]:
    """MiB of this process: anonymous, and of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("anonymous", "RssAnon"), ("files", "RssFile"))}


@contextmanager
def watched() -> Iterator[list[float]]:
    """The most anonymous memory of this process in the body, the last of the list's values."""
    most, ended = [memory()["anonymous"]], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            most.append(max(most[-1], memory()["anonymous"]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def rank(folder: Path, shard: int, ranks: int, steps: int) -> dict[str, Any]:
    """One rank, in this process: load, then draw batches."""
    import datasets
    from transformers import AutoTokenizer

    from deca_ds.config.data import DataConfig
    from deca_ds.config.schema import Config
    from deca_ds.data import load_client_data, training_batches

    datasets.disable_progress_bars()
    config = Config(data=DataConfig(train=[str(folder / "rows.jsonl")], batch_size=BATCH, client_holdout=0.01))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    options: dict[str, Any] = {}
    if "work" in inspect.signature(load_client_data).parameters:
        from deca_ds.data.rows import Work

        options["work"] = Work.here(shown=True)
    before, begun, used = memory(), time.monotonic(), cpu_s()
    entry = next((folder / "cache/deca_ds").glob("tokens-*"), None) if shard else None
    with watched() as most:
        if entry is None:
            data = load_client_data(config, tokenizer, 0, **options)
        else:  # as the other ranks of a host, which are told where it is
            from deca_ds.data import read_client_data

            data = read_client_data(entry)
    loaded = {"seconds": time.monotonic() - begun, "cpu_s": cpu_s() - used}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    after = memory()
    sizes = {"batch_size": BATCH, "micro_batch_size": BATCH // ranks}
    batches = training_batches(data.train, rank=shard, ranks=ranks, seed=0, client=0, pad_id=0, **sizes)
    begun, training = time.monotonic(), []
    for _ in range(SAMPLES):
        for _ in range(steps // SAMPLES):
            next(batches)
        training.append(memory())
    return {
        **loaded,
        "rows": len(data.train),
        "tokens": data.summary["train_tokens"],
        "before": before,
        "loaded": after,
        "peak": peak,
        "anonymous_peak": most[-1] - before["anonymous"],
        "children_peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "training": training,
        "ms_a_step": 1000 * (time.monotonic() - begun) / (steps // SAMPLES * SAMPLES),
    }


def cpu_s() -> float:
    return sum(os.times()[:4])


def start(code: Path, folder: Path, *arguments: int) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": str(code),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--rank", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--words", type=int, default=150, help="in a row")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5000, help="training batches that each rank draws")
    parser.add_argument("--code", type=Path, default=REPOSITORY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        folder, *numbers = given.rank
        print(json.dumps(rank(Path(folder), *map(int, numbers))))
        return
    found = [measure(rows, given) for rows in given.rows]
    for fewer, more in pairwise(found):
        peaks = [one["first rank"]["anonymous_peak"] for one in (fewer, more)]
        times = more["rows"] / fewer["rows"]
        print(f"{times:g} times the rows: {peaks[1] / peaks[0]:.2f} times the anonymous memory of the first rank")
    given.results.parent.mkdir(exist_ok=True)
    given.results.write_text(json.dumps(found[0] if len(found) == 1 else found, indent=2) + "\n")


def measure(rows: int, given: argparse.Namespace) -> dict[str, Any]:
    """What each rank takes with so many rows; prints a line a rank."""
    found: dict[str, Any] = {
        "rows": rows, "words": given.words, "ranks": given.ranks, "steps": given.steps,
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), rows, given.words)
        who = {"first rank": 0} | {
            f"rank {shard}" if shard else "first rank, again": shard for shard in (*range(1, given.ranks), 0)
        }
        for name, shard in who.items():
            found[name] = one = start(given.code.resolve(), Path(folder), shard, given.ranks, given.steps)
            last = one["training"][-1]
            print(
                f"{rows:8} rows, {name:18} {one['seconds']:7.1f} s {one['cpu_s']:7.1f} CPU s; MiB: peak "
                f"{one['peak']:.0f}, children {one['children_peak']:.0f}; anonymous {one['before']['anonymous']:.0f} "
                f"before, {one['anonymous_peak']:.0f} more at most, {one['loaded']['anonymous']:.0f} loaded, "
                f"{one['training'][0]['anonymous']:.0f} to {last['anonymous']:.0f} in training; files "
                f"{last['files']:.0f}; {one['ms_a_step']:.1f} ms a step",
                flush=True,
            )
        cache = Path(folder) / "cache"
        found["cache_mib"] = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 2**20
    return found


if __name__ == "__main__":
    main()
