"""The model card and the push: what they say of a run, and what they must not."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from run_folders import write_job

from deca_ds.data.formats import FORMATS
from deca_ds.errors import ConfigError
from deca_ds.tools import export, push
from deca_ds.tools.card import Card
from deca_ds.tools.push import Repository

TOKEN = "hf_" + "x7" * 17
SECRETS = {
    "run__output": "/home/alice/secret-runs/x",
    "model__path": "models/secret-model",
    "model__tokenizer": "models/secret-tokenizer",
    "gossip__matrix": "/etc/secret-matrix.txt",
    "data__train": ["/data/secret-patients.jsonl"],
    "data__label_names": {"a": "secret-diagnosis"},
    "data__prompt": "secret-prompt {text}",
    "data__label_column": "secret-column",
    "deepspeed": "secret.json",
}


def private_run(folder: Path, **keys: Any) -> Path:
    run = write_job(folder, labels=("secret-yes", "secret-no"), **SECRETS, **keys)
    edge = {"clients": [0, 1], "hosts": ["secret-n1", "secret-n2"], "shards": []}
    (run / "edges.json").write_text(json.dumps([edge]))
    return run


def text(card: Card, chat: bool = True) -> str:
    return card.text(parameters=242_240, dtype="float32", chat=chat)


def test_a_card_says_what_was_done_and_how_the_mean_scores(tmp_path):
    said = text(Card(write_job(tmp_path / "run"), base_model="owner/base"))
    front = ModelCard(said).data.to_dict()
    assert front["base_model"] == "owner/base" and front["library_name"] == "transformers"
    assert "fine-tuned with deca_ds by 3 clients" in said and "mean of the models of 3 clients" in said
    assert "`owner/base` of 242,240 parameters (float32)" in said
    assert "| DECA (signal: descent), [arXiv 2606.03209](https://arxiv.org/abs/2606.03209) |" in said
    assert "| graph | ring |" in said and "| inner steps | 16 of 16 |" in said
    assert "150 training examples with 2,700 tokens" in said
    assert "| loss (nats per target token) | 1.5 | 1 |" in said  # of the mean model, from job.jsonl
    chats = Card(write_job(tmp_path / "chats", data__format="messages"))
    assert "apply_chat_template" in text(chats)
    without = text(chats, chat=False)
    assert "apply_chat_template" not in without and "has no chat template" in without
    assert "apply_chat_template" not in said and "in the format `classification`, did not go through" in said


def test_a_run_whose_start_is_not_known_names_its_method_as_the_configuration_does(tmp_path):
    run = write_job(tmp_path / "run")
    (run / "starts.json").unlink()
    assert "| method | `deca` |" in text(Card(run))


def test_a_format_that_is_new_and_no_conversation_is_loaded_as_a_plain_one(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "questions", replace(FORMATS["alpaca"], name="questions"))
    assert "in the format `questions`, did not go through" in text(
        Card(write_job(tmp_path / "run", data__format="questions"))
    )


def test_a_checkpoint_has_the_scores_of_its_own_step_alone(tmp_path):
    run = write_job(tmp_path / "run")
    said = text(Card(run, step=8))
    assert "| inner steps | 8 of 16 |" in said and "had not come to its end" in said
    assert "| loss (nats per target token) | 1.5 | 1.25 |" in said and "after 8 inner steps" in said
    between = text(Card(run, step=11))
    assert "| inner steps | 11 of 16 |" in between and "## Evaluation" not in between
    assert text(Card(run, step=16)) == text(Card(run))


def test_a_client_has_its_own_scores(tmp_path):
    run = write_job(tmp_path / "run")
    said = text(Card(run, client=2))
    assert "those of client 2 of 3" in said and "| loss (nats per target token) | 2.25 | 2 |" in said
    (run / "DONE").rename(run / "STOPPED")
    assert "without 1 client that left before the end" in text(Card(run, missing=[1]))
    assert "had not come to its end" in text(Card(run))


def test_one_client_is_its_own_mean(tmp_path):
    said = text(Card(write_job(tmp_path / "run", clients=1)))
    assert "mean of" not in said and "| loss (nats per target token) | 2 | 1.75 |" in said


@pytest.mark.parametrize("client", [None, 1])
def test_nothing_private_is_in_a_card_and_a_second_one_is_equal(tmp_path, client):
    run = private_run(tmp_path / "secret-folder")
    said = text(Card(run, client=client))
    assert "secret" not in said and "alice" not in said and str(tmp_path) not in said
    shutil.copytree(run, tmp_path / "copy")
    assert text(Card(tmp_path / "copy", client=client)) == said


def test_a_folder_without_the_runs_configuration_has_a_card_all_the_same(tmp_path):
    said = text(Card(tmp_path))
    assert "## Training" not in said and "## How to load" in said
    assert yaml.safe_load(said.split("---")[1])["pipeline_tag"] == "text-generation"


class Hub:
    """What of HfApi is used, with the repository `there`; `fails` on the named call with an error that quotes the
    token."""

    def __init__(self, there: bool | None = None, fails: str = "", error: type[Exception] = OSError):
        self.there, self.fails, self.error = there, fails, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _call(self, name: str, /, **given: Any) -> None:
        self.calls.append((name, given))
        if name == self.fails:
            raise self.error(f"401 for Bearer {TOKEN}")

    def whoami(self) -> None:
        self._call("whoami")

    def repo_info(self, name: str) -> Any:
        self._call("repo_info", repo_id=name)
        if self.there is None:
            raise RepositoryNotFoundError("none", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(private=self.there)

    def create_repo(self, name: str, **given: Any) -> None:
        self._call("create_repo", repo_id=name, **given)

    def upload_folder(self, **given: Any) -> Any:
        self._call("upload_folder", **given, files=sorted(path.name for path in Path(given["folder_path"]).iterdir()))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture(autouse=True)
def with_token(monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: TOKEN)


def exported(tmp_path: Path, monkeypatch, hub: Hub, *more: str) -> int:
    """`deca export` without the export of weights."""

    def export_model(run, output, *, card, **_):
        output.mkdir()
        (output / "README.md").write_text(text(card))
        return SimpleNamespace(
            files=1, parameters=1, bytes=1, source="mean", output=output, seconds=1, stops=None, note=None
        )

    monkeypatch.setattr("deca_ds.checkpoint.export.export_model", export_model)
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    run = tmp_path / "run"
    return export.run(parser.parse_args([str(run), str(tmp_path / "out"), *more]), api=hub)


@pytest.mark.parametrize("public", [False, True])
def test_a_push_is_private_by_default_and_has_the_card(tmp_path, monkeypatch, capsys, public):
    private_run(tmp_path / "run")
    hub = Hub()
    assert exported(tmp_path, monkeypatch, hub, "--push", "me/model", *["--public"] * public) == 0
    calls = dict(hub.calls)
    assert [name for name, _ in hub.calls] == ["whoami", "repo_info", "create_repo", "upload_folder"]
    assert calls["create_repo"] == {"repo_id": "me/model", "private": not public, "exist_ok": True}
    assert calls["upload_folder"]["files"] == ["README.md"] and "secret" not in str(calls["upload_folder"]["files"])
    printed = capsys.readouterr()
    assert "https://hub/commit/1" in printed.out and TOKEN not in printed.out + printed.err


@pytest.mark.parametrize(
    ("hub", "more", "what"),
    [
        (Hub(), ["--push", "model"], "'model' is no repository"),
        (Hub(there=False), ["--push", "me/model"], "the repository me/model is public"),
        (Hub(fails="whoami", error=LocalTokenNotFoundError), ["--push", "me/model"], "no access token"),
        (Hub(fails="whoami"), ["--push", "me/model"], "the hub refuses: 401"),
        (Hub(), ["--public"], "--public says who may read"),
    ],
)
def test_what_cannot_be_pushed_is_not_exported(tmp_path, monkeypatch, hub, more, what):
    private_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=what) as raised:
        exported(tmp_path, monkeypatch, hub, *more)
    assert TOKEN not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_export_and_shows_no_token(tmp_path, monkeypatch):
    private_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="hf upload me/model") as raised:
        exported(tmp_path, monkeypatch, Hub(there=True, fails="upload_folder"), "--push", "me/model")
    assert TOKEN not in str(raised.value) and (tmp_path / "out/README.md").is_file()


def test_a_private_repository_that_is_there_is_filled(tmp_path):
    Repository("me/model", Hub(there=True)).check()
    Repository("me/model", Hub(there=False), public=True).check()
