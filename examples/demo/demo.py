"""The demo: what each client learns alone, what it learns with DECA, and the mean model as a Hugging Face folder.

Starts the trainer twice through the deepspeed launcher (demo.yaml with and without gossip), prints a table, exports the
mean model, loads it with plain transformers and lets it answer. `make demo` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[2]
RANKS = 6
HARDLY = 10  # a client that has fewer examples of a label has hardly seen it
ALONE = ["gossip.graph=isolated", "algorithm.signal=none"]
DEADLINE_S = 900
ASKED = ["billing", "login", "network"]  # labels that some client hardly saw


def train(output: Path, device: str, overrides: list[str]) -> None:
    """Run the main job as a user would: six ranks of three clients through the deepspeed launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(RANKS)),
        *("--master_port", str(port), "--log_level", "error", "--hostfile", os.devnull),
        *("launchers/train.py", "--config", "examples/demo/demo.yaml", f"run.output={output}", f"run.device={device}"),
        *overrides,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["DS_ACCELERATOR"] = device  # the launcher counts GPUs otherwise, where there are any
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=DEADLINE_S, check=False)
    if finished.returncode:
        sys.exit(f"the training run failed with exit code {finished.returncode}; see the message above")


def last_scores(run: Path, name: str) -> dict:
    lines = (run / "metrics" / f"{name}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "evaluation"][-1]


def show(console: Console, alone: Path, together: Path) -> None:
    """The table: accuracy on the common evaluation set, and on the labels that a client has hardly seen."""
    table = Table(title="accuracy on the common evaluation set, and on the labels that a client hardly saw")
    for column in ("client", "hardly saw", "alone", "DECA", "hardly seen: alone", "hardly seen: DECA"):
        table.add_column(column, justify="left" if column == "hardly saw" else "right")
    data = json.loads((together / "data.json").read_text())
    labels = sorted({label for summary in data for label in summary["labels"]})
    for summary in data:
        unseen = [label for label in labels if summary["labels"].get(label, 0) < HARDLY]
        row = [str(summary["client"]), ", ".join(unseen)]
        scores = [last_scores(run, f"client_{summary['client']:03d}")["common"] for run in (alone, together)]
        row += [f"{score['accuracy']:.0%}" for score in scores]
        row += [f"{sum(score['recall'][label] for label in unseen) / len(unseen):.0%}" for score in scores]
        table.add_row(*row)
    table.add_section()
    means = [last_scores(run, "job")["mean"]["accuracy"] for run in (alone, together)]
    table.add_row("mean model", "", *(f"{mean:.0%}" for mean in means), "", "")
    console.print(table)
    console.print(f"hardly saw: fewer than {HARDLY} of the 300 training examples of a label")


def answer(console: Console, model_folder: Path) -> None:
    """Load the exported folder with plain transformers and let it answer messages of the evaluation set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    lines = (REPOSITORY / "examples/demo/data/evaluation.jsonl").read_text().splitlines()
    messages = {row["label"]: row["text"] for row in map(json.loads, reversed(lines))}
    for label in ASKED:
        inputs = tokenizer(f"{messages[label]}\nLabel:", return_tensors="pt")
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[0, inputs["input_ids"].shape[1] :]
        reply = str(tokenizer.decode(generated, skip_special_tokens=True)).strip()
        console.print(f"  {messages[label]}  ->  [bold]{reply}[/bold] (right: {label})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the demo's output (demo/ in it)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    console, started = Console(), time.monotonic()
    output = (arguments.runs / "demo").resolve()
    if output.exists():  # a demo may be seen again; the old one is set aside, not deleted
        shutil.move(output, tempfile.mkdtemp(prefix="demo-before-", dir=output.parent))
    output.mkdir(parents=True)

    console.rule("1 of 3: every client trains alone")
    train(output / "alone", arguments.device, ALONE)
    console.rule("2 of 3: the same clients with DECA: one block at a time, averaged with the neighbours")
    train(output / "deca", arguments.device, [])
    console.rule("3 of 3: export the mean model and load it with transformers")
    export = [sys.executable, "launchers/export.py", str(output / "deca"), str(output / "model")]
    subprocess.run(export, cwd=REPOSITORY, check=True, timeout=DEADLINE_S)
    answer(console, output / "model")
    console.print()
    show(console, output / "alone", output / "deca")
    console.print(f"{time.monotonic() - started:.0f} s; the exported model is in {output / 'model'}")


if __name__ == "__main__":
    main()
