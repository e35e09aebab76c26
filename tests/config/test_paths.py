"""One rule for all paths, and places that cannot be written to."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from deca_ds.config import load_config, save_config
from deca_ds.config import paths as rules
from deca_ds.config.paths import KEYS, argument, check_model_path, check_writable, look_for, read_given
from deca_ds.config.resume import check_folder, check_output
from deca_ds.config.schema import Config, ModelConfig
from deca_ds.data.sources import HubName, load_hub
from deca_ds.engine.architecture import load_architecture
from deca_ds.errors import ConfigError, DataError, LaunchError, ModelError


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "x").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("start", ["~", "$HOME", "$PLACE"])
def test_tilde_and_variables_expand_in_every_path(home, start):
    listed = [key for key in KEYS if key.startswith("data.") and key != "data.cache"]
    values = [f"{key}=[{start}/x, a/b]" if key in listed else f"{key}={start}/x" for key in KEYS]
    config = load_config(None, [*values, "gossip.graph=edge_list"])
    for key in KEYS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name) if name else config.deepspeed
        assert value == ([f"{home}/x", "a/b"] if key in listed else f"{home}/x"), key
    save_config(config, home / "saved.yaml")
    assert load_config(home / "saved.yaml") == config
    assert argument(f"{start}/x") == home / "x"


def test_paths_of_the_schema_are_all_in_the_rule():
    """Every text key whose sentence speaks of a file, a folder or a directory."""
    found = set()
    for section in (Config, *(f.default_factory for f in fields(Config) if f.name != "deepspeed")):
        for field in fields(section):
            meaning = field.metadata.get("meaning", "")
            if re.search("file|folder|directory", meaning) and "str" in field.type and "CSV" not in meaning:
                found.add(".".join(filter(None, [section.__name__.removesuffix("Config").lower(), field.name])))
    assert found <= set(KEYS) and len(found) > 5


@pytest.mark.parametrize(
    ("path", "why"), [("$NOWHERE/x", "no variable \\$NOWHERE"), ("~nobody-here/x", "no home folder")]
)
def test_what_does_not_expand_makes_no_folder(home, path, why):
    with pytest.raises(ConfigError, match=rf"data\.cache.*{why}"):
        load_config(None, ["model.path=x", f"data.cache={path}"])
    with pytest.raises(ConfigError, match=rf"run\.output.*{why}"):
        load_config(None, ["model.path=x", f"run.output={path}"])


def test_a_run_is_continued_under_either_name_of_its_folder(home):
    (home / "run").mkdir()
    save_config(load_config(None, ["model.path=~/m", "run.output=~/run"]), home / "run/config.yaml")
    check_folder(load_config(None, [f"model.path={home}/m", f"run.output={home}/run", "run.resume=require"]))


@pytest.mark.parametrize(
    "path", ["", "n" * 300 + "/m/m", "./m", "../m", "/no/m", "a/b/c", "m/", "dangling", "$NOWHERE/m", "~nobody-here/m"]
)
def test_a_missing_model_folder_is_told_as_one(home, monkeypatch, path):
    monkeypatch.chdir(home)
    os.symlink("away", "dangling")
    for model in (ModelConfig(path=path), ModelConfig(path=".", tokenizer=path)):
        with pytest.raises(ModelError, match=r"(?s)there is no folder.*fix: ") as caught:
            check_model_path(model)
        assert "repo" not in str(caught.value)
    with pytest.raises(ModelError, match="is a file"):
        check_model_path(ModelConfig(path="x"))
    (home / "owner/name").mkdir(parents=True)
    monkeypatch.setattr(rules, "why_not_on_hub", lambda *_: None)
    for known in ("owner/name", "Qwen/Qwen2.5-0.5B", "gpt2", str(home)):
        check_model_path(ModelConfig(path=known))


def test_one_misspelt_name_is_found(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "models/llama-8b").mkdir(parents=True)
    (home / "run.yaml").touch()
    for path, meant in (
        ("modles/llama-8b", "models/llama-8b"),
        ("./models/lama-8b", "models/llama-8b"),
        (f"{home}/models/llama_8b", f"{home}/models/llama-8b"),
        ("run.yml", "run.yaml"),
        ("modles/other", None),
        ("run.yaml/below", None),
        ("", None),
        ("n" * 300, None),
    ):
        expected = f"check the path, from {home}" + (f"; did you mean '{meant}'?" if meant else "")
        assert look_for(path) == expected, path
    with pytest.raises(ConfigError, match=r"did you mean 'run.yaml'"):
        load_config(Path("run.yml"))
    with pytest.raises(ConfigError, match=r"'\.' is a folder(?s:.*)name the YAML file in it"):
        load_config(Path("."))


def test_what_could_be_a_name_of_the_hub_may_be_a_misspelt_folder(home, monkeypatch):
    """The tests are offline, so that the hub has nothing."""
    monkeypatch.chdir(home)
    (home / "models/llama").mkdir(parents=True)
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(path="modles/llama"))
    assert f"no folder 'modles/llama' in {home}, and the hub's cache" in caught.value.what
    with pytest.raises(DataError, match=r"no file or folder 'modles/llama' in .*hub") as unread:
        load_hub(HubName("modles/llama"), None, "train")
    for error in (caught.value, unread.value):
        assert "did you mean 'models/llama'?; " in error.fix and "for the hub, unset" in error.fix


def test_a_place_that_cannot_be_written_to_is_refused_with_the_reason(home, monkeypatch):
    (home / "away").symlink_to("gone/folder")
    (home / "loop").symlink_to("loop")
    for place, why in [
        ("x", "it is a file"),
        ("x/below/it", "there is a file"),
        ("away", "is a link to 'gone/folder', which is not there"),
        ("away/below", "is a link to 'gone/folder', which is not there"),
        ("loop", "symbolic links"),
        ("n" * 300, "name too long"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(ConfigError, match=rf"(?is)cannot write to.*{why}.*where: some key"):
            check_writable(home / place, "some key")
    before = sorted(home.rglob("*"))
    check_writable(home / "new/deep", "some key")
    check_writable(home, "some key")
    assert sorted(home.rglob("*")) == before

    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(rules.tempfile, "TemporaryFile", refuse)
    for resume in ("never", "auto", "require"):
        config = load_config(None, ["model.path=x", f"run.output={home}/new", f"run.resume={resume}"])
        with pytest.raises(ConfigError, match=r"(?s)cannot write to.*Read-only file system.*run\.output"):
            check_folder(config)
    with pytest.raises(ConfigError, match="Read-only"):
        check_output(config)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("hosst", "a", "there is no such file[\\s\\S]*did you mean '.*/hosts'"),
        ("hosts/below", "a", "there is no such file[\\s\\S]*check the path"),
        ("", "a", "it is a folder[\\s\\S]*name the file"),
        ("hosts", b"\xff", "it is no text in UTF-8[\\s\\S]*save it as UTF-8"),
        ("hosts", PermissionError(13, "Permission denied", "x"), "Permission denied\n[\\s\\S]*look at its permissions"),
    ],
)
def test_a_named_file_that_cannot_be_read_is_told_in_words(tmp_path, monkeypatch, name, content, told):
    if isinstance(content, OSError):

        def refuse(*_, **__):
            raise content

        monkeypatch.setattr(Path, "read_text", refuse)
    else:
        (tmp_path / "hosts").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LaunchError, match=told) as caught:
        read_given(tmp_path / name, "the hostfile", LaunchError)
    assert str(caught.value).startswith(f"cannot read the hostfile '{tmp_path / name}': ")
    assert "Errno" not in str(caught.value)
