"""Hold every number while code is moved: the digests of some short runs, of every method, over MPI and over torch.

    python tests/golden.py record before.json      # ten minutes on two cores
    python tests/golden.py compare before.json     # after the change, on the same machine with the same packages

A digest covers the tensors of all trained models and all metrics but times and memory. It depends on the processor and
on the versions of the libraries, so none is kept in the repository: see tests/integration/test_numbers.py for the
comparison with what is right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from jobs import BIN, launch, run_command, word_job
from safetensors import safe_open
from words import make_tiny_model, make_word_files

WHOLE = {"blocks.layers_per_block": "null"}
KEYS = {
    **{"cluster.clients": 3, "algorithm.rounds": 2, "algorithm.inner_steps": 2, "algorithm.b1": 0.8},
    **{"evaluation.every": 3, "evaluation.max_examples": 4, "blocks.layers_per_block": 2},
}
# name: (launcher, ranks, what differs)
RUNS = {
    "deca, alone": ("python", 1, {"cluster.clients": 1, "data.per_client": "[]"}),
    "deca over torch": ("deepspeed", 3, {}),
    "deca over MPI, two ranks": ("mpirun", 6, {"gossip.graph": "star", "optimizer.weight_decay": 0.1}),
    "different sizes": ("mpirun", 4, {"cluster.ranks": "[2,1,1]", "gossip.graph": "complete"}),
    "one peer, chunks": ("hand", 3, {"gossip.graph": "one_peer_exponential", "gossip.chunk_mib": 0.001}),
    "clipped": ("hand", 3, {"gossip.clip_radius": 0.03, "gossip.graph": "star"}),
    "bfloat16": ("hand", 6, {"model.dtype": "bfloat16"}),
    "quasi_global_norm": ("hand", 3, {"algorithm.signal": "quasi_global_norm", "gossip.every": 2}),
    "deca-ed": ("hand", 3, {"algorithm.method": "deca-ed", "gossip.graph": "star"}),
    "gossip-adam": ("hand", 3, {"algorithm.method": "gossip-adam", **WHOLE}),
    "qg-adam": ("hand", 3, {"algorithm.method": "qg-adam", "gossip.graph": "star"}),
    "gt-adam": ("hand", 3, {"algorithm.method": "gt-adam", "gossip.graph": "star"}),
    "local-adam": ("hand", 3, {"algorithm.method": "local-adam", "gossip.every": 4, **WHOLE}),
    "diloco": ("hand", 3, {"algorithm.method": "diloco", "gossip.graph": "complete", "gossip.every": 4, **WHOLE}),
    "noloco": ("hand", 3, {"algorithm.method": "noloco", "gossip.graph": "random_pairs", "gossip.every": 4, **WHOLE}),
    "gasloc": ("hand", 3, {"algorithm.method": "gasloc", "gossip.graph": "complete", "gossip.every": 4, **WHOLE}),
    "badam": ("hand", 3, {"algorithm.method": "badam", "gossip.graph": "isolated"}),
    "adamw": ("hand", 3, {"algorithm.method": "adamw", "gossip.graph": "isolated", **WHOLE}),
    "dec-lora": ("hand", 6, {"algorithm.method": "dec-lora", "gossip.graph": "star", **WHOLE}),
    "resumed amid a block": ("mpirun", 3, {"checkpoint.every": 3, "checkpoint.keep": 9}),
    "simulated": ("simulate", 1, {"gossip.graph": "erdos_renyi"}),
}
NOT_NUMBERS = ("seconds", "memory", "tokens_per")


def digest(run: Path) -> str:
    found = hashlib.sha256()
    for path in sorted((run / "model").rglob("*.safetensors")):
        found.update(path.relative_to(run).as_posix().encode())
        with safe_open(path, "pt") as saved:
            for name in sorted(saved.keys()):
                found.update(name.encode() + saved.get_tensor(name).view(torch.uint8).numpy().tobytes())
    for path in sorted(run.rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            found.update(json.dumps(numbers(json.loads(line)), sort_keys=True).encode())
    assert found.digest() != hashlib.sha256().digest(), f"nothing to compare in {run}"
    return found.hexdigest()[:16]


def numbers(value: object) -> object:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {key: numbers(of) for key, of in value.items() if not any(part in key for part in NOT_NUMBERS)}
    return value


def go_back(run: Path, step: int) -> None:
    """As if the run had died after that step's checkpoint."""
    (run / "DONE").unlink()
    shutil.rmtree(run / "model")
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def run_once(name: str, run: Path, model: Path, files: list[Path]) -> str:
    launcher, ranks, changes = RUNS[name]
    keys = {"run.output": run, **KEYS, **changes}
    if launcher == "python":
        keys["data.train"] = f"[{files[0]}]"
    arguments = word_job(model, files, **keys)

    def start(*more: str) -> None:
        if launcher == "simulate":
            (run.parent / "empty.yaml").write_text("{}")
            command = [str(BIN / "deca"), "simulate", "--config", str(run.parent / "empty.yaml")]
            finished = run_command([*command, *arguments, *more])
        else:
            finished = launch(launcher, ranks, [*arguments, *more])
        if finished.code:
            sys.exit(f"{name}: exit code {finished.code}\n{finished.output[-4000:]}")

    start()
    if name.startswith("resumed"):
        whole = digest(run)
        go_back(run, 3)
        start("run.resume=require")
        assert digest(run) == whole, "a resumed run differs from one that was not interrupted"
    return digest(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    arguments = parser.parse_args()
    known = json.loads(arguments.file.read_text()) if arguments.what == "compare" else {}
    found, differing = {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, files = make_tiny_model(folder), make_word_files(folder)
        for number, name in enumerate(name for name in RUNS if arguments.only in name):
            found[name] = run_once(name, folder / f"run{number}", model, files)
            same = arguments.what == "record" or found[name] == known.get(name)
            differing += not same
            print(f"{name:28} {found[name]}" + ("" if same else f"  before: {known.get(name)}"), flush=True)
    if arguments.what == "record":
        arguments.file.write_text(json.dumps(found, indent=1))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
