"""What a run that continues may change, and what run.resume finds in the output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from deca_ds.config import load_config, save_config
from deca_ds.config.resume import check_folder, check_new, same_command, save_changes
from deca_ds.errors import CheckpointError, ConfigError

BASE = ["model.path=x", "cluster.clients=3", "data.label_names={a: b}"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(load_config(None, [*BASE, f"run.output={folder}"]), folder / "config.yaml")
    (folder / "starts.json").write_text("[]")
    return folder


def configured(run: Path, *changes: str, resume: str = "require"):
    return load_config(None, [*BASE, f"run.output={run}", f"run.resume={resume}", *changes])


@pytest.mark.parametrize("resume", ["auto", "require"])
def test_the_same_configuration_continues(run: Path, resume: str) -> None:
    check_folder(configured(run, resume=resume))


def test_a_used_folder_is_refused_unless_the_run_is_continued(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"already used[\s\S]*run.resume=require"):
        check_folder(configured(run, resume="never"))


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_new_folder_starts_a_run(tmp_path: Path, resume: str) -> None:
    check_folder(configured(tmp_path / "new", resume=resume))
    check_folder(configured(tmp_path, resume=resume))


def test_there_must_be_a_run_to_continue(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run to continue in .*new"):
        check_folder(configured(tmp_path / "new"))
    (tmp_path / "heartbeats").mkdir()  # a run that ended before it had saved its configuration is none
    (tmp_path / "STOPPED").touch()
    (tmp_path / "STOP").touch()
    check_folder(configured(tmp_path, resume="auto"))
    (tmp_path / "something").touch()
    for resume in ("auto", "require"):
        with pytest.raises(CheckpointError, match="no run to continue"):
            check_folder(configured(tmp_path, resume=resume))


@pytest.mark.parametrize(
    ("resume", "trained", "how"),
    [
        ("never", True, "the same command with run.resume=require"),
        ("never", False, "the same command with run.resume=auto"),
        ("auto", True, "the same command"),
        ("require", True, "the same command"),
    ],
)
def test_how_a_stopped_run_continues_depends_on_how_it_was_started(resume: str, trained: bool, how: str) -> None:
    assert same_command(resume, trained=trained) == how


def test_a_start_that_failed_while_it_loaded_binds_nobody(run: Path) -> None:
    """The mistake may be in what it has written down."""
    (run / "starts.json").unlink()
    (run / "data.json").write_text("[torn")
    (run / "hf").mkdir()
    changed = configured(run, "model.path=y", "algorithm.epochs=2", resume="auto")
    check_folder(changed)
    check_new(changed)
    with pytest.raises(ConfigError, match="already used"):
        check_folder(configured(run, resume="never"))
    with pytest.raises(ConfigError, match=r"model\.path = 'y'"):
        check_folder(configured(run, "model.path=y", resume="require"))
    for name in ("starts.json", "checkpoints", "model"):
        (run / name).mkdir()
        with pytest.raises(ConfigError, match=r"model\.path = 'y'"):
            check_folder(changed)
        (run / name).rmdir()


@pytest.mark.parametrize(
    "change",
    ["logging.every=5", "checkpoint.keep=9", "cluster.transport=torch", "data.micro_batch_size=1", "evaluation.every=3",
     "gossip.chunk_mib=1", "run.threads=1", "algorithm.rounds=9", "algorithm.epochs=2",
     "deepspeed=ds_configs/zero3.json"],
)  # fmt: skip
def test_what_does_not_change_the_training_may_change(run: Path, change: str, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    check_folder(configured(run, change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimizer.lr=1"], r"optimizer.lr = 1.0, but the run was started with 5e-05"),
        (["cluster.clients=4"], r"cluster.clients = 4, but .* with 3"),
        (["data.label_names={a: c}"], "data.label_names = "),
        (["run.seed=1", "gossip.graph=star"], r"run.seed = 1 \(and gossip.graph\)"),
    ],
)
def test_what_changes_the_training_is_refused_by_name(run: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_folder(configured(run, *changes))


def test_after_divergence_the_optimizer_may_be_another_one(run: Path) -> None:
    smaller = configured(run, "optimizer.lr=1e-6", "optimizer.clip_norm=0.5")
    (run / "FAILED").write_text("rank 0 on n1\nout of memory\n")
    (run / "FAILED_client_notes").mkdir()  # somebody's
    with pytest.raises(ConfigError, match=r"optimizer.lr = 1e-06 \(and optimizer.clip_norm\)"):
        check_folder(smaller)
    (run / "FAILED").write_text("rank 0 on n1, gradient, step 5\nclient 0 has diverged: the loss is not finite (nan)\n")
    check_folder(smaller)
    with pytest.raises(ConfigError, match=r"run\.seed = 1"):
        check_folder(configured(run, "run.seed=1"))
    assert save_changes(smaller).startswith("optimizer.lr = 1e-06 instead of 5e-05")
    (run / "FAILED").unlink()
    check_folder(smaller)
    assert save_changes(smaller) == ""
    longer = configured(run, "optimizer.lr=1e-6", "optimizer.clip_norm=0.5", "algorithm.epochs=2")
    assert save_changes(longer) == "algorithm.rounds = None instead of 4, algorithm.epochs = 2.0 instead of None"
    assert load_config(run / "config.yaml").algorithm.epochs == 2


def test_a_file_that_only_says_who_has_the_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "LOCK").touch()
    for resume in ("never", "auto"):
        check_new(configured(tmp_path, resume=resume))
    save_config(configured(tmp_path, resume="auto"), tmp_path / "config.yaml")
    (tmp_path / "starts.json").write_text("[]")
    with pytest.raises(ConfigError, match="another job has begun a run"):
        check_new(configured(tmp_path, resume="auto"))
