"""The small recipes: their files are what their script writes, and the plan says of them what their headers say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deca_ds.cli import main
from deca_ds.config import load_config
from deca_ds.data import load_all
from deca_ds.engine.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
ASSISTANT = REPOSITORY / "examples" / "assistant"
RECIPES = ("instructions", "chat")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ASSISTANT / "make.py"), str(tmp_path)], check=True, timeout=120)
    for folder in ("data", "model"):
        committed = sorted(path.name for path in (ASSISTANT / folder).iterdir())
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == committed
        for name in committed:
            written, kept = ((of / folder / name).read_bytes() for of in (tmp_path, ASSISTANT))
            if name == "config.json":  # carries the version of transformers that wrote it
                written, kept = ({**json.loads(data), "transformers_version": None} for data in (written, kept))
            assert written == kept, name
    assert sum(path.stat().st_size for path in (ASSISTANT / "data").iterdir()) < 400_000


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_says_what_the_header_says(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = (ASSISTANT / f"{recipe}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    command = ["plan", "--config", str(ASSISTANT / f"{recipe}.yaml"), f"run.output={tmp_path / 'run'}", "--json"]
    assert main([*command, "cluster.ranks=[1,1]"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory = re.search(r"at most\s(?:# )?([\d.]+) GB", re.sub(r"\n# ", " ", header))
    disk = re.search(r"(\d+) MB of disk", header)
    assert memory is not None and disk is not None, header
    assert 0.8 * float(disk[1]) * 1e6 < plan["disk"]["most"] * 2 <= float(disk[1]) * 1e6
    most = max(max(block["host"].values()) for block in plan["memory"]["blocks"])
    assert 0.8 * float(memory[1]) * 1e9 < most <= float(memory[1]) * 1e9


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_client_lacks_half_of_the_desks_and_nothing_is_cut(recipe: str) -> None:
    config = load_config(ASSISTANT / f"{recipe}.yaml")
    clients = load_all(config, load_tokenizer(config.model))
    desks = [set(client.summary["labels"]) for client in clients]
    assert [len(each) for each in desks] == [4, 4] and not desks[0] & desks[1]
    assert not any(client.summary["cut"] or client.summary["dropped"] for client in clients)
