"""Checkpoints in folders of their step: whole or not there, found again by as many ranks or by others."""

from __future__ import annotations

import shutil
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_states import zero3_slices

from deca_ds.checkpoint import files, write_shards
from deca_ds.checkpoint.open_steps import find_checkpoint, open_checkpoint
from deca_ds.checkpoint.part import Part, rank_folder
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import remove_part, step_folder, steps_in
from deca_ds.checkpoint.write_shards import MANIFEST, save_shards
from deca_ds.errors import CheckpointError

STATE = {"w": torch.arange(21.0).view(7, 3), "m/w": torch.arange(21.0, 42.0).view(7, 3), "b": torch.ones(1)}


def save(folder: Path, step: int, *, ranks: int = 2, rank: int | None = None, attempt: int = 1) -> None:
    for r in range(ranks) if rank is None else [rank]:
        groups = [(name, zero3_slices({name: tensor}, r, ranks)) for name, tensor in STATE.items()]
        state = {"attempt": attempt}
        save_shards(step_folder(folder, step), groups, Part(0, r, ranks), clients=1, step=step, state=state)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_rank_of_the_same_layout_needs_its_own_part_only(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.rmtree(rank_folder(step_folder(tmp_path, 5), 0, 0))
    saved = open_checkpoint(tmp_path, 5, Part(0, 1, 2))
    assert saved.states == {(0, 1): {"attempt": 1}} and saved.ranks == {0: 2}
    assert torch.equal(saved.read_range("w", 0, 11, 21), STATE["w"].flatten()[11:])
    with pytest.raises(CheckpointError, match=r"w: elements \[10, 11\) of 21 are missing"):
        saved.read_range("w", 0, 10, 21)
    with pytest.raises(CheckpointError, match="missing: client 0 rank 0"):
        open_checkpoint(tmp_path, 5, Part(0, 0, 1))


@settings(max_examples=40)
@given(numel=st.integers(0, 40), before=st.integers(1, 6), now=st.integers(1, 6), data=st.data())
def test_any_ranks_read_what_any_others_wrote(
    tmp_path_factory: pytest.TempPathFactory, numel: int, before: int, now: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensor = torch.randn(numel)
    for rank in range(before):
        groups = [("all", zero3_slices({"w": tensor}, rank, before))]
        save_shards(folder / "s", groups, Part(0, rank, before), clients=1, step=0)
    saved = ShardedModel(folder / "s", [0])
    for rank in range(now):
        start, stop = (min(numel, r * ceil(numel / now)) for r in (rank, rank + 1))
        assert torch.equal(saved.read_range("w", 0, start, stop), tensor[start:stop])
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    assert torch.equal(saved.read_range("w", 0, start, stop), tensor[start:stop])


@pytest.mark.parametrize("damaged", ["000_w.safetensors", "001_m-w.safetensors", MANIFEST, "manifest.blake2b"])
@pytest.mark.parametrize("how", ["bit", "torn", "gone"])
def test_damage_is_found_before_anything_is_used(tmp_path: Path, damaged: str, how: str) -> None:
    save(tmp_path, 4)
    save(tmp_path, 8)
    path = rank_folder(step_folder(tmp_path, 8), 0, 1) / damaged
    if how == "bit":
        flip_a_bit(path)
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    if (damaged, how) == ("manifest.blake2b", "gone"):
        return  # the checksum alone is no part of the state
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, 8, Part(0, 1, 2))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, 8, Part(0, 0, 1))
    open_checkpoint(tmp_path, 8, Part(0, 0, 2))
    open_checkpoint(tmp_path, 4, Part(0, 1, 2))


def test_parts_of_two_attempts_are_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, rank=0, attempt=1)
    save(tmp_path, 5, rank=1, attempt=2)
    with pytest.raises(CheckpointError, match="not from one attempt"):
        open_checkpoint(tmp_path, 5, Part(0, 0, 1))


@pytest.mark.parametrize("stage", ["first file", "second file", "sync", "manifest", "rename"])
def test_a_full_disk_at_any_stage_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save(tmp_path, 4)
    full = OSError(28, "No space left on device")
    calls = 0

    def fail_at(number: int, original):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                raise full
            return original(*arguments, **options)

        return wrapped

    if stage in ("first file", "second file"):
        monkeypatch.setattr(
            write_shards, "save_file", fail_at(1 if stage == "first file" else 2, write_shards.save_file)
        )
    elif stage == "sync":
        monkeypatch.setattr(write_shards, "sync", fail_at(2, files.sync))
    elif stage == "manifest":
        monkeypatch.setattr(Path, "write_text", fail_at(1, Path.write_text))
    else:
        monkeypatch.setattr(Path, "rename", fail_at(1, Path.rename))
    with pytest.raises(CheckpointError, match=r"No space left[\s\S]*step_00000008/client_000/rank_001"):
        save(tmp_path, 8, rank=1)
    monkeypatch.undo()
    assert not list(step_folder(tmp_path, 8).rglob("*rank*"))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, 8, Part(0, 1, 2))
    open_checkpoint(tmp_path, 4, Part(0, 1, 2))
    save(tmp_path, 8)
    open_checkpoint(tmp_path, 8, Part(0, 1, 2))


def test_every_rank_removes_what_it_answers_for(tmp_path: Path) -> None:
    save(tmp_path, 4, ranks=3)
    save(tmp_path, 8, ranks=3)
    (step_folder(tmp_path, 4) / "client_000/rank_003.partial").mkdir()
    (tmp_path / "step_other").mkdir()
    assert steps_in(tmp_path) == [4, 8] and steps_in(tmp_path / "nowhere") == []
    remove_part(tmp_path, 4, Part(0, 1, 2))
    assert sorted(path.name for path in tmp_path.glob("step_00000004/client_000/*")) == ["rank_000", "rank_002"]
    remove_part(tmp_path, 4, Part(0, 0, 2))
    assert steps_in(tmp_path) == [8]
    remove_part(tmp_path, 4, Part(0, 0, 2))  # it is gone already


def test_copies_that_somebody_has_put_beside_a_checkpoint_are_no_part_of_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    here = step_folder(tmp_path, 4)
    shutil.copytree(here / "client_000" / "rank_001", here / "client_000" / "rank_001.bak")
    shutil.copytree(here / "client_000", here / "client_000.bak")
    (here / "client_notes").mkdir()
    for client in (None, 0):
        saved = find_checkpoint(tmp_path, client=client)
        assert torch.equal(saved.read("w", 0), STATE["w"])
    open_checkpoint(tmp_path, 4, Part(0, 0, 1))
    remove_part(tmp_path, 4, Part(0, 0, 1))
    left = sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.name.startswith(("client", "rank")))
    parts = ["client_000.bak/rank_000", "client_000.bak/rank_001", "client_000.bak/rank_001.bak"]
    assert left == ["client_000", "client_000.bak", *parts, "client_000/rank_001.bak", "client_notes"]
