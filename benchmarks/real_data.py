"""Real runs on a real pretrained model: how the loss falls, how far clients are apart, whether transports agree.

    python benchmarks/real_data.py stories|long|news|tasks [key=value ...]

Four clients of two ranks each on the CPU, stories260k as the model, started with mpirun (MPI transport) and with the
deepspeed launcher (torch transport); "long" also runs a control whose clients never gossip. Prints a line per
evaluation, compares both transports' losses and final parameters bit for bit and writes the figures to
benchmarks/results/. The data is not part of the project: DECA_TEST_DATA names its folder (stories260k/,
tinyshakespeare/, ag_news/, natural_instructions_64/).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from deca_ds.checkpoint.shards import ShardedModel

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("DECA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
BIN = Path(sys.executable).parent
CLIENTS, RANKS, DEADLINE_S = 4, 8, 3600
TASKS = (1231, 68, 1272, 563)  # English and short: nouns and verbs counted, number of the object, events, dialogue acts
COMMON = [
    f"model.path={DATA / 'stories260k'}",
    *("run.device=cpu", "run.threads=1", f"cluster.clients={CLIENTS}", "gossip.graph=ring", "logging.progress=false"),
    *("optimizer.lr=3e-3", "optimizer.schedule=constant", "algorithm.inner_steps=8", "blocks.layers_per_block=1"),
    *("data.batch_size=8", "data.micro_batch_size=4", "evaluation.max_examples=48", "evaluation.batch_size=16"),
]


def runs() -> dict[str, list[str]]:
    """Overrides of each kind of run."""
    tasks = {kind: [DATA / f"natural_instructions_64/local_{kind}_{task}.json" for task in TASKS] for kind in
             ("training", "eval")}  # fmt: skip
    listed = {kind: f"[{','.join(map(str, paths))}]" for kind, paths in tasks.items()}
    return {
        "stories": [
            *(f"data.train=[{DATA / 'tinyshakespeare/input.txt'}]", "data.format=text", "data.max_length=256"),
            *("data.common_holdout=0.02", "algorithm.rounds=2", "evaluation.every=24"),
        ],
        "long": [
            *(f"data.train=[{DATA / 'tinyshakespeare/input.txt'}]", "data.format=text", "data.max_length=128"),
            *("data.common_holdout=0.02", "algorithm.rounds=10", "evaluation.every=24", "data.batch_size=4"),
            "data.micro_batch_size=2",
        ],
        "news": [
            *(f"data.train=[{DATA / 'ag_news/test.csv'}]", "data.format=classification", "data.partition=dirichlet"),
            "data.column_names=[label,title,description]",
            *("data.text_columns=[title,description]", "data.max_length=192", "data.common_holdout=0.05"),
            *("data.label_names={1: World, 2: Sports, 3: Business, 4: Science}", "data.max_examples=3000"),
            *("data.answers_only=false", "algorithm.rounds=2", "evaluation.every=24"),
        ],
        "tasks": [
            *(f"data.per_client={listed['training']}", f"data.per_client_evaluation={listed['eval']}"),
            *(f"data.evaluation={listed['eval']}", "data.format=alpaca", "data.max_length=320"),
            *("algorithm.rounds=2", "evaluation.every=24"),
        ],
    }


def start(transport: str, overrides: list[str], output: Path) -> float:
    """Run the job to its end; returns the seconds it took, start-up included."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {
        "mpi": [str(BIN / "mpirun"), "-n", str(RANKS), "--oversubscribe", sys.executable],
        "torch": [
            *(str(BIN / "deepspeed"), "--num_accelerators", str(RANKS), "--master_port", str(port)),
            *("--log_level", "error", "--hostfile", os.devnull),
        ],
    }[transport]
    command = [*launcher, "launchers/train.py", *COMMON, *overrides, f"run.output={output}"]
    environment = {
        **os.environ,
        **{"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **{"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    }
    started = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=DEADLINE_S, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def evaluations(run: Path) -> list[dict]:
    """One record per evaluation: loss of the clients on the common set and on their own, of the mean model on the
    common set, and the consensus distance."""
    read = lambda name: [json.loads(line) for line in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]  # noqa: E731
    clients = [[r for r in read(f"client_{i:03d}") if r["kind"] == "evaluation"] for i in range(CLIENTS)]
    return [
        {
            "step": job["step"],
            "clients_loss": [client[place]["common"]["loss"] for client in clients],
            "clients_own_loss": [client[place].get("own", {}).get("loss") for client in clients],
            "mean_model_loss": job["mean"]["loss"],
            "mean_model_accuracy": job["mean"].get("accuracy"),
            "consensus_distance": job["consensus_distance"],
        }
        for place, job in enumerate(read("job"))
    ]


def step_seconds(run: Path) -> float:
    lines = (run / "metrics" / "client_000.jsonl").read_text().splitlines()
    seconds = sorted(r["seconds"] for r in map(json.loads, lines) if r["kind"] == "step")
    return seconds[len(seconds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Real runs over both transports.")
    parser.add_argument("kind", choices=sorted(runs()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace the run's configuration keys")
    arguments = parser.parse_args()
    kind, overrides = arguments.kind, arguments.overrides
    if not DATA.is_dir():
        sys.exit(f"no data at {DATA}: set DECA_TEST_DATA to the folder that holds it")
    with tempfile.TemporaryDirectory() as folder:
        outputs = {transport: Path(folder) / transport for transport in ("mpi", "torch")}
        seconds = {transport: start(transport, runs()[kind] + overrides, out) for transport, out in outputs.items()}
        curves = {transport: evaluations(out) for transport, out in outputs.items()}
        models = {transport: ShardedModel(out / "model") for transport, out in outputs.items()}
        same_bits = all(
            torch.equal(models["mpi"].read(name, client), models["torch"].read(name, client))
            for name in models["mpi"].names
            for client in range(CLIENTS)
        )
        control = []
        if kind == "long":
            alone = Path(folder) / "isolated"
            seconds["isolated"] = start("torch", [*runs()[kind], *overrides, "gossip.graph=isolated"], alone)
            control = evaluations(alone)
        result = {
            "run": kind,
            "overrides": overrides,
            "evaluations": curves["mpi"],
            "evaluations_without_gossip": control,
            "transports_give_the_same_losses": curves["mpi"] == curves["torch"],
            "transports_give_the_same_parameters": same_bits,
            "seconds_with_start_up": seconds,
            "median_step_seconds": {transport: step_seconds(out) for transport, out in outputs.items()},
        }
    target = Path(__file__).parent / "results" / f"{kind}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    for record in result["evaluations"] + control:
        print(record)
    print({key: value for key, value in result.items() if not key.startswith(("evaluations", "overrides"))})


if __name__ == "__main__":
    main()
