"""What a checkpoint costs that links the files of blocks that were not trained, compared with one that writes all.

    python benchmarks/checkpoints.py

One rank, on the CPU in float32, has a random Llama of about 110 million parameters whose 32 layers make B blocks. It
saves a checkpoint in the middle of every activation, alternately into two folders on one disk: with hard links, and
without, for which the script makes os.link fail. It does not train: it draws the active block's state anew. Bytes are
those of new files. Seconds: how long training would pause (the copy to the host), and until all is on the disk; beside
them CPU seconds of both. The figures are medians of 5 checkpoints, after `checkpoint.keep` that are written whole. The
script prints a line per case and writes benchmarks/results/checkpoints.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

LAYERS, SAVES = 32, 5
SHAPE = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=LAYERS, num_attention_heads=8,
)  # fmt: skip
CASES = [(1, 2), (1, 1), (4, 2), (16, 2)]  # blocks.layers_per_block, checkpoint.keep
REPOSITORY = Path(__file__).parents[1]


def inodes(folder: Path) -> dict[int, int]:
    return {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def refuse(*_: Any) -> None:
    raise OSError("no hard links")


def timed_save(saver: Any, linked: bool) -> dict[str, float]:
    held = [path.open("rb") for path in saver.folder.rglob("*.safetensors")]  # no inode comes back as another file's
    before = inodes(saver.folder)
    patched = contextlib.nullcontext() if linked else mock.patch.object(os, "link", refuse)
    with patched, contextlib.redirect_stderr(io.StringIO()):
        cpu, started = time.process_time(), time.perf_counter()
        saver.save()
        copied = time.perf_counter()
        saver.wait()
        written = time.perf_counter()
        cpu = time.process_time() - cpu
    new = sum(size for inode, size in inodes(saver.folder).items() if inode not in before)
    for file in held:
        file.close()
    return {"bytes": new, "stall_s": copied - started, "written_s": written - started, "cpu_s": cpu}


def case(cluster: Any, model_folder: str, layers_per_block: int, keep: int) -> dict[str, Any]:
    import numpy as np

    from deca_ds.algorithm.deca import DecaRule
    from deca_ds.algorithm.schedule import Schedule
    from deca_ds.config import load_config
    from deca_ds.config.schema import CheckpointConfig
    from deca_ds.engine.architecture import load_architecture
    from deca_ds.engine.client import Client
    from deca_ds.engine.load import load_model
    from deca_ds.engine.state import TrainingState
    from deca_ds.training.checkpoints import Checkpoints
    from deca_ds.training.completion import CompletionByStore

    keys = [f"model.path={model_folder}", "model.init=random", "run.device=cpu", "run.threads=1"]
    config = load_config(None, [*keys, f"blocks.layers_per_block={layers_per_block}"])
    client = Client(config, load_model(config, load_architecture(config.model)), cluster.device)
    blocks = len(client.plan.blocks)
    schedule = Schedule(rounds=-(-(SAVES + keep) // blocks), blocks=blocks, inner_steps=2)
    gossip = SimpleNamespace(schedule=SimpleNamespace(matrices=(np.eye(1),)), bytes_sent=0, wait_seconds=0.0)
    state = TrainingState(client, DecaRule(), schedule, gossip)
    with tempfile.TemporaryDirectory(dir=os.environ.get("DECA_BENCHMARK_DISK")) as disk:
        savers = {}
        for name in ("written whole", "linked"):
            attempt = f"{layers_per_block}/{keep}/{name}"
            savers[name] = Checkpoints(
                CheckpointConfig(keep=keep), cluster, state, gossip, CompletionByStore(cluster, attempt, 600.0),
                folder=Path(disk) / name, attempt=attempt, timeout_s=600.0,
            )  # fmt: skip
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in savers}
        for step in schedule:
            if step.opens:
                for tensor in client.open_block(step.block, DecaRule.buffers).tensors.values():
                    tensor.normal_()
                client.write_back()
                state.done = step.index + 1
                if step.index // 2 < SAVES + keep:
                    for name, saver in savers.items():
                        measured = timed_save(saver, name == "linked")
                        if step.index // 2 >= keep:
                            taken[name].append(measured)
            else:
                client.close_block()
        room = {name: sum(inodes(saver.folder).values()) for name, saver in savers.items()}
    result: dict[str, Any] = {"blocks": blocks, "layers_per_block": layers_per_block, "keep": keep}
    for name, each in taken.items():
        medians = {key: round(statistics.median(one[key] for one in each), 4) for key in each[0]}
        result[name] = medians | {"kept_bytes": room[name]}
    return result


def main() -> None:
    from transformers import LlamaConfig

    from deca_ds.config import load_config
    from deca_ds.launch import read_launch
    from deca_ds.launch.store import open_job_store
    from deca_ds.launch.world import connect
    from deca_ds.watchdog.guard import guarded

    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store), tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPE).save_pretrained(folder)
        cluster = connect(load_config(None, [f"model.path={folder}", "run.device=cpu", "run.threads=1"]), launch, store)
        results = []
        for layers_per_block, keep in CASES:
            results.append(case(cluster, folder, layers_per_block, keep))
            print(json.dumps(results[-1]), flush=True)
    report = {"command": f"python {Path(__file__).relative_to(REPOSITORY)}", "shape": SHAPE, "cases": results}
    (REPOSITORY / "benchmarks/results/checkpoints.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
