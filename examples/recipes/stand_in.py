"""What the recipes print: runs them on this machine's CPUs with a small stand-in for model and data, and writes
README.md beside this file.

    python examples/recipes/stand_in.py                 # all of them, which takes minutes each
    python examples/recipes/stand_in.py llama_8b_two_nodes

A stand-in keeps the recipe's clients, graph, blocks and method. It has as many layers as the model, but narrow ones of
random weights; data that the repository ships; short sequences, one rank a client, few steps and a large learning rate.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from deca_ds.printing import wrapped

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PAGE = HERE / "README.md"
WIDTH = 100
_BLOCK = r"(<!-- output of {}, by stand_in.py -->\n```text\n)(.*?)(\n```\n)"

_NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
_SHORT = ["model.init=random", "optimizer.lr=3e-3", "algorithm.epochs=null", "algorithm.rounds=1", "data.max_length=96"]
_SMALL = ["data.batch_size=4", "data.micro_batch_size=4", "evaluation.max_examples=32", "evaluation.batch_size=16"]
_HERE = ["run.device=cpu", "run.threads=1", "cluster.ranks=null", "logging.progress=false", "checkpoint.every=0"]
_EXAMPLES = "examples/assistant/data"
_INSTRUCTIONS = [f"data.train=[{_EXAMPLES}/instructions.jsonl]", "data.common_holdout=0.05"]


@dataclass(frozen=True)
class Recipe:
    """file: beside this one, or above. shape: the folder of the model's shape. changes: further keys for the
    stand-in."""

    file: str
    shape: str
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        return Path(self.file).stem


RECIPES = (
    Recipe(
        "qwen_1.5b_continued_pretraining.yaml",
        "qwen_1.5b",
        (
            "data.train=[examples/demo/data/train.jsonl]",
            "data.evaluation=[examples/demo/data/evaluation.jsonl]",
            "data.subset=null",
            "algorithm.inner_steps=6",
            "evaluation.every=27",
            "optimizer.warmup_steps=4",
        ),
    ),
    Recipe("../llama_7b_multinode.yaml", "llama_7b", (*_INSTRUCTIONS, "algorithm.inner_steps=2", "evaluation.every=0")),
    Recipe("llama_8b_eight_gpus.yaml", "llama_8b", (*_INSTRUCTIONS, "algorithm.inner_steps=1")),
    Recipe(
        "llama_8b_two_nodes.yaml",
        "llama_8b",
        (f"data.train=[{_EXAMPLES}/chats.jsonl]", "data.split=train", "data.common_holdout=0.05",
         "algorithm.inner_steps=4", "evaluation.every=20"),
    ),
    Recipe(
        "../per_client_files.yaml",
        "qwen_0.5b",
        ("data.per_client=[FOLDER/north,FOLDER/east,FOLDER/south]", "algorithm.inner_steps=3", "evaluation.every=0"),
    ),
    Recipe("llama_70b_clients_of_eight.yaml", "llama_70b", (*_INSTRUCTIONS, "algorithm.inner_steps=1")),
)  # fmt: skip


def make_model(recipe: Recipe, folder: Path) -> None:
    """Write the stand-in's configuration and tokenizer: the recipe's layers, narrow ones."""
    given = REPOSITORY / "examples" / "assistant" / "model"
    config = json.loads((HERE / "shapes" / recipe.shape / "config.json").read_text(encoding="utf-8"))
    own = json.loads((given / "config.json").read_text(encoding="utf-8"))
    tokens = {key: own[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in own}
    (folder / "config.json").write_text(json.dumps(config | _NARROW | tokens), encoding="utf-8")
    for path in given.iterdir():
        if path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())


def make_data(folder: Path) -> None:
    """Deal the instructions out to three clients' folders, as examples/README.md does with a data set of the hub."""
    rows = (REPOSITORY / _EXAMPLES / "instructions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for place, name in enumerate(("north", "east", "south")):
        (folder / name).mkdir()
        (folder / name / "alpaca.jsonl").write_text("".join(rows[place::3]), encoding="utf-8")


def keys(recipe: Recipe, folder: Path) -> list[str]:
    """Return what the stand-in changes of its recipe. folder: with its model, its data and its output."""
    of_folder = [f"model.path={folder}/model", f"run.output={folder}/run"]
    return [*of_folder, *_SHORT, *_SMALL, *_HERE, *(change.replace("FOLDER", str(folder)) for change in recipe.changes)]


def run(recipe: Recipe) -> str:
    """Run the stand-in, one rank a client; returns what it has printed, as a terminal of WIDTH columns shows it."""
    file = os.path.relpath(HERE / recipe.file, REPOSITORY)
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    clients, output = (re.search(rf"^  {key}: (\S+)", text, re.MULTILINE) for key in ("clients", "output"))
    assert clients is not None and output is not None
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "model").mkdir()
        make_model(recipe, folder / "model")
        make_data(folder)
        launcher = ["deepspeed", "--quiet", "--num_accelerators", clients[1], "--hostfile", os.devnull]
        launcher += ["--master_port", free_port()]
        command = [*launcher, "launchers/train.py", "--config", file, *keys(recipe, folder)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    if ended.returncode:
        raise SystemExit(f"{recipe.name} ended with {ended.returncode}:\n{ended.stdout}")
    told = ended.stdout.replace(f"{folder}/run", output[1]).replace(str(folder), "~/deca")
    told = told.replace(f" on {socket.gethostname()}", " on n0")
    return on_terminal(told)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(text: str) -> str:
    """Break the lines as a terminal of WIDTH columns shows them."""
    with mock.patch.dict(os.environ, COLUMNS=str(WIDTH)):
        lines = (wrapped(line.rstrip(), _Terminal()) for line in text.strip("\n").splitlines())
        return "\n".join(line for line in lines if line)


def shown(page: str, name: str) -> str:
    """Return what the page shows of a recipe."""
    found = re.search(_BLOCK.format(re.escape(name)), page, re.DOTALL)
    assert found is not None, f"the page has no output of {name}"
    return found[2]


def write(name: str, text: str) -> None:
    """Put what a recipe prints into the page."""
    page = re.sub(
        _BLOCK.format(re.escape(name)),
        lambda found: found[1] + text + found[3],
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for each in RECIPES:
        if not sys.argv[1:] or each.name in sys.argv[1:]:
            write(each.name, run(each))
