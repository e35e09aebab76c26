"""What a run that continues forgets, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from deca_ds.checkpoint.adapters import save_adapters
from deca_ds.checkpoint.part import Part, rank_folder
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.checkpoint.write_shards import Slice, save_shards
from deca_ds.config import load_config, save_config
from deca_ds.config.schema import Config, GossipConfig
from deca_ds.engine.state import position
from deca_ds.errors import CheckpointError, UserError
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch.launcher import Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.training.checkpoints import mixing_digest
from deca_ds.training.chosen_method import build_schedule
from deca_ds.training.claim import release
from deca_ds.training.restore import compare_with_saved, rewind_lines
from deca_ds.training.resume import choose, keep_model, leave_behind
from deca_ds.training.start import begin_or_resume, start
from deca_ds.training.ways_to_start import NewRun, ResumedRun

ALONE = build_mixing(GossipConfig(graph="isolated"), 1, 0)


def make_checkpoint(
    run: Path,
    step: int,
    earlier: int | None = 0,
    rank: int = 0,
    ranks: int = 1,
    missing: Sequence[int] = (),
    schedule: Mapping[str, int] | None = None,
) -> Path:
    state = {
        "attempt": 1,
        "missing": list(missing),
        "mixing": mixing_digest(ALONE),
        "schedule": schedule or {"done": step, "of": 9},
        "earlier": earlier,
    }
    groups = [("all", [Slice("w", (3,), 0, 3, torch.ones(3))])]
    folder = step_folder(run / "checkpoints", step)
    return save_shards(folder, groups, Part(0, rank, ranks), clients=1, step=step, state=state)


def chosen(run: Path, resume: str = "require", mixing=ALONE, ranks: int = 1, absent: Sequence[int] = ()):
    """What rank 0 chooses, once all ranks have removed what the run will come to again."""
    config = Config()
    config.cluster.absent = list(absent)
    config.run.output, config.run.resume = str(run), resume
    shared = HashStore()

    def choice(rank: int):
        launch, own = Launch("python", rank, ranks, rank, None), Part(0, rank, ranks)
        store = JobStore(shared, None, timedelta(seconds=100))
        found = choose(config, launch, store, own, mixing)
        leave_behind(config, found, launch, store, own)
        return found

    with ThreadPoolExecutor(ranks) as threads:
        return next(iter(threads.map(choice, range(ranks))))


def test_the_newest_whole_checkpoint_is_chosen_and_damaged_ones_are_named(tmp_path: Path, capsys) -> None:
    for step in (2, 4, 6):
        folder = make_checkpoint(tmp_path, step)
    (folder / "000_all.safetensors").write_bytes(b"torn")
    for marker in ("FAILED", "STOPPED"):
        (tmp_path / marker).touch()
    found = chosen(tmp_path)
    assert found.step == 4 and found.same_layout
    told = capsys.readouterr().err
    assert "step 6: rank 0: 000_all.safetensors has 4 bytes" in told and "continuing after inner step 4 of 9" in told
    assert steps_in(tmp_path / "checkpoints") == [2, 4]  # the run will come to step 6 again
    assert not list(tmp_path.glob("*ED"))


def test_without_a_usable_checkpoint_there_is_nothing_to_continue_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint that all ranks can use"):
        chosen(tmp_path)
    assert chosen(tmp_path, "auto").step == 0
    folder = make_checkpoint(tmp_path, 2)
    (folder / "manifest.json").unlink()
    for resume in ("auto", "require"):  # a run that got somewhere is not begun again unasked
        with pytest.raises(CheckpointError, match=r"no checkpoint that all ranks can use\n  step 2: rank 0"):
            chosen(tmp_path, resume)
    assert rank_folder(step_folder(tmp_path / "checkpoints", 2), 0, 0).exists()


def test_a_run_killed_during_its_first_checkpoint_begins_anew(tmp_path: Path, capsys) -> None:
    """Rank 1 of two has not come to write its part of the only one, or of the first two."""
    for steps in ([2], [2, 4]):
        for step in steps:
            make_checkpoint(tmp_path, step, earlier=None, rank=0, ranks=2)
        with pytest.raises(CheckpointError, match="no checkpoint that all ranks can use"):
            chosen(tmp_path, "require", ranks=2)
        assert steps_in(tmp_path / "checkpoints") == steps
        assert chosen(tmp_path, "auto", ranks=2).step == 0
        assert steps_in(tmp_path / "checkpoints") == []
        told = capsys.readouterr().err
        assert "no checkpoint was complete before: starting anew" in told and told.count("is removed, step") == len(
            steps
        )


def test_where_no_rank_could_write_its_first_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    """The disk was full: there is the folder of the step, and nobody's part."""
    step_folder(tmp_path / "checkpoints", 2).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint that all ranks can use"):
        chosen(tmp_path, "require", ranks=2)
    assert chosen(tmp_path, "auto", ranks=2).step == 0


def test_a_run_that_got_further_is_not_begun_again_unasked(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4, earlier=2, rank=0, ranks=2)
    with pytest.raises(CheckpointError, match=r"no checkpoint that all ranks can use\n  step 4: rank 1"):
        chosen(tmp_path, "auto", ranks=2)
    assert steps_in(tmp_path / "checkpoints") == [4]


def test_what_was_saved_without_a_client_is_for_those_who_name_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4, missing=[7])
    assert chosen(tmp_path, absent=[6, 7]).step == 4
    assert chosen(tmp_path).step == 2
    assert steps_in(tmp_path / "checkpoints") == [2]


def test_another_mixing_matrix_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="mixing matrices are not those"):
        chosen(tmp_path, mixing=SimpleNamespace(matrices=(ALONE.matrices[0] / 2,)))


def diverged(run: Path, done: int = 5) -> Config:
    """Make a run that has diverged after its only checkpoint; returns what goes on with it at another learning rate.
    It has two rounds of two blocks and 2 inner steps."""
    model = run.parent / "model"
    model.mkdir()
    keys = [f"model.path={model}", f"run.output={run}", "algorithm.rounds=2", "algorithm.inner_steps=2"]
    run.mkdir()
    save_config(load_config(None, keys), run / "config.yaml")
    (run / "starts.json").write_text(
        json.dumps([{"rounds": 2, "epochs": None, "model": {"blocks": [["a", 3], ["b", 3]]}}])
    )
    (run / "FAILED").write_text("rank 0\nclient 0 has diverged")
    config = load_config(None, [*keys, "run.resume=require", "optimizer.lr=1e-7"])
    if done:
        make_checkpoint(run, done, schedule=position(build_schedule(config, 2, 2), done))
    return config


def resumed(config: Config, mixing=ALONE):
    store = JobStore(HashStore(), None, timedelta(seconds=100))
    shown: list[Path] = []
    guard = SimpleNamespace(progress=Progress(), write_to=lambda output: None, show_life=shown.append)
    try:
        return begin_or_resume(config, Launch("python", 0, 1, 0, None), store, guard, mixing)
    finally:
        assert shown == [Path(config.run.output)], "once it has taken the folder, others can see that it lives"
        release(Path(config.run.output))  # as the end of the process would


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def finish(run: Path) -> None:
    """Make its only checkpoint the trained model of a run that is done."""
    (step,) = steps_in(run / "checkpoints")
    step_folder(run / "checkpoints", step).rename(run / "model")
    (run / "checkpoints").rmdir()
    (run / "DONE").write_text("inner steps: 8 of 8\n")


def test_a_run_that_goes_on_notes_what_is_new(tmp_path: Path, capsys) -> None:
    config = diverged(tmp_path / "run")
    before, way = content(tmp_path / "run"), resumed(config)
    assert isinstance(way, ResumedRun) and content(tmp_path / "run") == before, "data and model may still refuse it"
    assert not capsys.readouterr().err
    store = JobStore(HashStore(), None, timedelta(seconds=100))
    leave_behind(config, way.resumption, Launch("python", 0, 1, 0, None), store, Part(0, 0, 1))
    assert load_config(tmp_path / "run/config.yaml").optimizer.lr == 1e-7 and not (tmp_path / "run/FAILED").exists()
    assert "continuing with optimizer.lr = 1e-07 instead of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no checkpoint", "no checkpoint that all ranks can use"),
        ("damaged", "no checkpoint that all ranks can use"),
        ("other matrices", "mixing matrices are not those"),
        ("too short", "has done 5 inner steps, more than the 4"),
        ("finished, other matrices", "mixing matrices are not those"),
        ("finished, damaged", "no checkpoint that all ranks can use"),
        ("finished, without a model", "trained model is not there"),
    ],
)
def test_a_refused_resume_changes_nothing(tmp_path: Path, capsys, fault: str, message: str) -> None:
    run, mixing = tmp_path / "run", ALONE
    config = diverged(run, done=0 if fault == "no checkpoint" else 8 if "finished" in fault else 5)
    if "matrices" in fault:
        mixing = SimpleNamespace(matrices=(ALONE.matrices[0] / 2,))
    if fault == "damaged":
        next(run.rglob("*.safetensors")).write_bytes(b"torn")
    if fault == "too short":
        config.algorithm.rounds = 1
    if "finished" in fault:
        finish(run)
        config.algorithm.rounds = 3
    if fault == "finished, damaged":
        next((run / "model").rglob("*.safetensors")).write_bytes(b"torn")
    if fault == "finished, without a model":
        shutil.rmtree(run / "model")
        config.run.resume = "auto"
    before = content(run)
    with pytest.raises(UserError, match=message):
        resumed(config, mixing)
    assert content(run) == before
    assert "continuing" not in capsys.readouterr().err


def test_lines_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "client_000.jsonl"
    lines = [{"kind": "evaluation", "step": 0}, *({"kind": "step", "step": s} for s in (1, 2))]
    lines += [{"kind": "evaluation", "step": 2}, {"kind": "step", "step": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"kind": "st')  # killed while it wrote
    rewind_lines(path, 3)
    assert path.read_text() == text
    rewind_lines(path, 2)  # the evaluation after step 2 is repeated
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    rewind_lines(path, 0)
    assert path.read_text() == ""
    rewind_lines(tmp_path / "none.jsonl", 0)


def test_other_data_are_refused(tmp_path: Path) -> None:
    before = [{"client": 0, "train": 5, "own_evaluation": 2}, {"client": 1, "train": 6, "own_evaluation": 2}]
    (tmp_path / "data.json").write_text(json.dumps(before))
    compare_with_saved(tmp_path, [before[0], {**before[1], "own_evaluation": 1}])
    with pytest.raises(CheckpointError, match="client 1 has other data than before: train was 6, is 7"):
        compare_with_saved(tmp_path, [before[0], {**before[1], "train": 7}])


def test_data_of_a_client_that_was_not_there_before_are_noted(tmp_path: Path) -> None:
    summaries = [{"client": client, "train": 5 + client} for client in range(3)]
    (tmp_path / "data.json").write_text(json.dumps([summaries[0], summaries[2]]))
    assert compare_with_saved(tmp_path, summaries[:2]) == summaries
    (tmp_path / "data.json").write_text(json.dumps(summaries))
    with pytest.raises(CheckpointError, match="client 1 has other data than before"):
        compare_with_saved(tmp_path, [{"client": 1, "train": 7}])


def test_what_cannot_continue_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = Config()
    for name in ("model", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    config.model.path, config.data.train = str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")]
    config.run.output, config.run.resume = str(tmp_path / "run"), "require"
    guard = SimpleNamespace(progress=Progress())
    with pytest.raises(CheckpointError, match="no run to continue"):
        start(config, Launch("python", 0, 1, 0, None), JobStore(HashStore(), None, timedelta(seconds=100)), guard)
    assert not list((tmp_path / "run").iterdir())


def test_a_new_run_keeps_nothing_of_a_start_that_failed_while_it_loaded(tmp_path: Path) -> None:
    """That may have had another tokenizer, and adapters."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "chat_template.jinja").touch()
    save_adapters(tmp_path, [])
    numbers = ("client", "train", "dropped", "cut", "own_evaluation", "common_evaluation", "target_tokens")
    config = load_config(None, ["model.path=x", f"run.output={tmp_path}"])
    job = SimpleNamespace(output=tmp_path, config=config, mixing=ALONE)
    NewRun()._describe(job, [dict.fromkeys(numbers, 0) | {"labels": {}}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "data.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[7]", '[{"train": 5}]', "7"])
def test_data_that_nothing_tells_are_refused_with_the_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "data.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot tell which data the run was started with") as told:
        compare_with_saved(tmp_path, [{"client": 0, "train": 5}])
    assert told.value.where == str(tmp_path / "data.json")


def test_copies_beside_a_trained_model_are_not_continued_from(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4)
    step_folder(tmp_path / "checkpoints", 4).rename(tmp_path / "model")
    part = rank_folder(tmp_path / "model", 0, 0)
    for copy in ("rank_000.bak", "rank_notes", "rank_001.partial"):
        shutil.copytree(part, part.with_name(copy))
    keep_model(tmp_path, Part(0, 0, 1))
    kept = step_folder(tmp_path / "checkpoints", 4) / "client_000"
    assert [path.name for path in kept.iterdir()] == ["rank_000"]


def test_only_markers_of_the_run_are_removed_when_it_continues(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4)
    for name in ("FAILED", "FAILED_client_001", "FAILED_client_001.bak", "FAILED_client_notes"):
        (tmp_path / name).touch()
    chosen(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("FAILED*")) == ["FAILED_client_001.bak", "FAILED_client_notes"]
