"""A name that may be the hub's is asked for once, before anything waits for the hub, which is a local server here."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from deca_ds.config.hub import why_not_on_hub
from deca_ds.config.load import load_config
from deca_ds.config.paths import check_model_path
from deca_ds.config.schema import ModelConfig
from deca_ds.data import validate_data_config
from deca_ds.data.sources import HubName, load_hub
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.tokenizer import load_tokenizer
from deca_ds.engine.weight_files import given_weights
from deca_ds.errors import DataError, ModelError
from deca_ds.tools.chat.command import check_model

ANSWERS = {  # of the hub: status, and the code that it sends along
    "known": (200, ""),
    "no-readme": (404, "EntryNotFound"),
    "gated": (403, "GatedRepo"),
    "busy": (503, ""),
    "unknown": (404, "RepoNotFound"),
    "private": (401, "RepoNotFound"),
}


def is_at(monkeypatch, port: int) -> None:
    host = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", host)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", host + "/{repo_id}/resolve/{revision}/{filename}")


def silence(monkeypatch) -> None:
    is_at(monkeypatch, 1)  # where nobody listens


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A hub that is online, with an empty cache here; gives the paths that it is asked for."""
    paths = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            paths.append(self.path)
            status, code = next(answer for name, answer in ANSWERS.items() if f"/{name}/" in self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    is_at(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    yield paths
    server.shutdown()
    server.server_close()


def data(*entries: str, evaluation: str = "owner/known"):
    return load_config(None, ["model.path=x", f"data.train=[{','.join(entries)}]", f"data.evaluation=[{evaluation}]"])


@pytest.mark.parametrize("name", ANSWERS)
def test_the_hub_is_asked_once(asked, name):
    refused = name in ("unknown", "private")
    for kind, folder in (("model", ""), ("dataset", "/datasets")):
        asked.clear()
        why = why_not_on_hub(f"owner/{name}", kind)
        assert why == (f"the hub has no {kind} of this name, or it is private" if refused else None)
        assert asked == [f"{folder}/owner/{name}/resolve/main/README.md"]


def test_what_the_hub_does_not_have_is_told_as_both(asked, tmp_path):
    (tmp_path / "owner/unknowm").mkdir(parents=True)
    message = rf"(?s)there is no folder 'owner/unknown' in {tmp_path}, and the hub has no model of this name"
    for model, key in (
        (ModelConfig(path="owner/unknown"), "model.path"),
        (ModelConfig(path="owner/known", tokenizer="owner/unknown"), "model.tokenizer"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            check_model_path(model)
        assert caught.value.where == key and "did you mean 'owner/unknowm'?; for the hub" in caught.value.fix
    with pytest.raises(ModelError, match=message):
        check_model("owner/unknown")
    check_model_path(ModelConfig(path="owner/known", tokenizer="owner/gated"))
    check_model("owner/known")
    validate_data_config(data("owner/known", "owner/busy:test"))
    for config in (data("owner/known", "owner/unknown:test"), data("owner/known", evaluation="owner/unknown")):
        with pytest.raises(DataError, match=r"no file or folder 'owner/unknown' in .*the hub has no dataset of this"):
            validate_data_config(config)


def test_a_hub_out_of_reach_is_told_at_once_and_not_tried_again(asked, monkeypatch, caplog):
    silence(monkeypatch)
    with pytest.raises(
        ModelError, match=r"no folder 'owner/known' in .*the hub \(http://127.0.0.1:1\) does not answer"
    ):
        check_model_path(ModelConfig(path="owner/known"))
    with pytest.raises(DataError, match=r"no file or folder 'owner/known' in .* does not answer"):
        validate_data_config(data("owner/known"))
    assert not asked and "Retry" not in caplog.text


def test_a_name_that_the_hub_cannot_have_is_told_too(asked):
    with pytest.raises(ModelError, match=r"no folder 'owner/a--b' in .*, and "):
        check_model_path(ModelConfig(path="owner/a--b"))
    assert not asked


def test_what_is_in_a_cache_is_taken_without_a_question(asked, tmp_path, monkeypatch):
    silence(monkeypatch)
    (tmp_path / "hub/models--owner--kept/snapshots").mkdir(parents=True)
    (tmp_path / "hub/datasets--owner--kept/snapshots").mkdir(parents=True)
    (tmp_path / "datasets/owner___my_prepared-set").mkdir(parents=True)
    check_model_path(ModelConfig(path="owner/kept"))
    validate_data_config(data("owner/kept:test", "owner/MyPrepared-set", evaluation="owner/kept"))
    with pytest.raises(DataError, match="owner/other"):
        validate_data_config(data("owner/kept", "owner/other"))


@pytest.fixture
def offline(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    assert not asked


def test_offline_what_the_cache_lacks_is_told_at_once(offline, tmp_path):
    told = (
        r"no folder 'owner/x' in .*, and the hub's cache \(.*/home\) has no model of this name; HF_HUB_OFFLINE forbids"
    )
    for load in (check_model_path, load_architecture, load_tokenizer):
        with pytest.raises(ModelError, match=told) as caught:
            load(ModelConfig(path="owner/x"))
        assert caught.value.where == "model.path"
        assert "unset HF_HUB_OFFLINE, or run `hf download owner/x --local-dir FOLDER`" in caught.value.fix
    with pytest.raises(ModelError, match=told):
        check_model("owner/x")
    with pytest.raises(DataError, match=r"no file or folder 'owner/x' in .* has no dataset of this name") as caught:
        validate_data_config(data("owner/x:test", evaluation="owner/x"))
    assert "hf download owner/x --repo-type dataset --local-dir FOLDER" in caught.value.fix
    (tmp_path / "datasets/owner___x").mkdir(parents=True)
    validate_data_config(data("owner/x:test", evaluation="owner/x"))


def test_offline_what_the_cache_has_in_part_is_told_without_the_libraries_words(offline, tmp_path, tiny_model):
    for kind in ("models", "datasets"):
        (tmp_path / f"hub/{kind}--owner--x/snapshots/1").mkdir(parents=True)
        (tmp_path / f"hub/{kind}--owner--x/refs").mkdir()
        (tmp_path / f"hub/{kind}--owner--x/refs/main").write_text("1")
    model = ModelConfig(path="owner/x")

    def has_only_a_part(load):
        told = r"the hub's cache \(.*/home\) has only a part of this model; HF_H"
        with pytest.raises(ModelError, match=told) as caught:
            load()
        assert "hf download owner/x --local-dir" in caught.value.fix and "https" not in str(caught.value)

    for load in (load_architecture, load_tokenizer):
        has_only_a_part(partial(load, model))
    for name in ("config.json", "tokenizer_config.json"):  # with these alone transformers asks for sentencepiece
        shutil.copy(tiny_model / name, tmp_path / "hub/models--owner--x/snapshots/1")
        has_only_a_part(partial(load_tokenizer, model))
    has_only_a_part(partial(given_weights, model, load_architecture(model)))
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "hub/models--owner--x/snapshots/1")
    assert load_tokenizer(model).vocab_size
    (tmp_path / "hub/models--owner--x/snapshots/1/tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"(?s)no end-of-text token.*\(.*/home\) has only a part of this model; HF_H"):
        load_tokenizer(model)
    with pytest.raises(DataError, match=r"the hub's cache \(.*/home\) has only a part of this dataset; HF_H") as caught:
        load_hub(HubName("owner/x"), None, "train")
    assert "hf download owner/x --repo-type dataset" in caught.value.fix


def test_a_folder_without_the_names_of_special_tokens_is_refused_where_it_then_has_none(tiny_model, tmp_path):
    """transformers loads it without a word: no answer would have an end."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_model / name, tmp_path)
    model = ModelConfig(path=str(tmp_path))
    for key, given in (
        ("model.path", model),
        ("model.tokenizer", ModelConfig(path=str(tiny_model), tokenizer=str(tmp_path))),
    ):
        with pytest.raises(ModelError, match=r"no end-of-text token and no chat template: it comes without") as caught:
            load_tokenizer(given)
        assert caught.value.where == key and "copy the file" in caught.value.fix
    (tmp_path / "chat_template.jinja").write_text("x")
    with pytest.raises(ModelError, match=r"no end-of-text token: it comes without tokenizer_config.json"):
        load_tokenizer(model)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(model).eos_token is None, "as it says"
    shutil.copy(tiny_model / "tokenizer_config.json", tmp_path)
    assert load_tokenizer(model).eos_token == "</s>"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", b'{\n"eos_token": "</', "tokenizer_config.json, line 2: not valid JSON: Untermin"),
        ("tokenizer.json", b'{"version": "1.0",', "tokenizer.json, line 1: not valid JSON: Expecting"),
        ("config.json", b"\xff{}", "config.json is no UTF-8 text"),
        ("tokenizer.json", b'{"a": 1}', "it lacks 'added_tokens'"),
    ],
)
def test_of_a_damaged_folder_the_file_is_named(tiny_model, tmp_path, name, content, said):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(content)
    model = ModelConfig(path=str(folder))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(model) if name.startswith("tokenizer") else load_architecture(model)
    assert said in caught.value.what and caught.value.where == "model.path"


def test_a_folder_without_a_tokenizer_is_told_so(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"cannot load '.*': there is no tokenizer.json, tokenizer.model") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert "model.tokenizer" in caught.value.fix and "sentencepiece" not in str(caught.value)
