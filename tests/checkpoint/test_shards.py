"""Writing slices and reading whole parameters back; what is missing or damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_states import save_clients, zero3_slices
from torch import Tensor

from deca_ds.checkpoint.part import Part, rank_folder
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.write_shards import MANIFEST, Slice, save_shards
from deca_ds.errors import CheckpointError

SHAPES = {"odd": (7, 3), "one": (1,), "two": (2,), "scalar": (), "wide": (3, 5, 2)}


def random_state(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("clients", [1, 3])
def test_what_is_saved_is_read_back_bit_for_bit_and_averaged(
    tmp_path: Path, clients: int, ranks: int, dtype: torch.dtype
) -> None:
    states = [random_state(client, dtype) for client in range(clients)]
    save_clients(tmp_path, states, ranks=ranks)
    saved = ShardedModel(tmp_path)
    assert (saved.clients, saved.step, saved.names) == (list(range(clients)), 7, list(SHAPES))
    for name, shape in SHAPES.items():
        assert (saved.shape(name), saved.dtype(name)) == (shape, dtype)
        for client, state in enumerate(states):
            assert torch.equal(saved.read(name, client), state[name])
        mean = torch.stack([state[name].float() for state in states]).mean(0).to(dtype)
        assert saved.mean(name).dtype == dtype
        torch.testing.assert_close(saved.mean(name), mean)


def test_mean_adds_in_float32_in_ascending_order(tmp_path: Path) -> None:
    states = [{"w": torch.full((5,), value, dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0)]
    save_clients(tmp_path, states, ranks=2)
    # bfloat16 has 8 bits: 256 + 1 is 256 there, 258 / 3 in float32 is 86
    assert torch.equal(ShardedModel(tmp_path).mean("w"), torch.full((5,), 86.0, dtype=torch.bfloat16))


@settings(max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    ranks=st.integers(1, 6),
    clients=st.integers(1, 2),
)
def test_any_layout_reads_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], ranks: int, clients: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "model"
    states = [{f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)} for _ in range(clients)]
    save_clients(folder, states, ranks=ranks)
    saved = ShardedModel(folder)
    for client, state in enumerate(states):
        for name, tensor in state.items():
            assert torch.equal(saved.read(name, client), tensor)


def test_one_group_is_consumed_at_a_time_and_slices_may_share_a_buffer(tmp_path: Path) -> None:
    buffer, written = torch.arange(10.0), []

    def groups():
        for index in range(2):
            # the groups before are on the disk when this one is asked for
            written.append(len(list(tmp_path.glob("client_000/*.partial/*.safetensors"))))
            views = {f"{index}.a": buffer[:4], f"{index}.b": buffer[4:]}
            yield f"block {index}", zero3_slices(views, 0, 1)

    folder = save_shards(tmp_path, groups(), Part(0, 0, 1), clients=1, step=0)
    assert written == [0, 1]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == ["000_block-0.safetensors", "001_block-1.safetensors"]
    assert torch.equal(ShardedModel(tmp_path).read("1.b", 0), buffer[4:])


def test_clients_may_have_different_numbers_of_ranks(tmp_path: Path) -> None:
    state = random_state(0, torch.float32)
    for client, ranks in enumerate((1, 3)):
        for rank in range(ranks):
            groups = [("all", zero3_slices(state, rank, ranks))]
            save_shards(tmp_path, groups, Part(client, rank, ranks), clients=2, step=1)
    assert torch.equal(ShardedModel(tmp_path).mean("odd"), state["odd"])


def test_only_the_wanted_clients_must_be_here(tmp_path: Path) -> None:
    states = [random_state(client, torch.float32) for client in range(3)]
    save_clients(tmp_path, states, ranks=2)
    shutil.rmtree(tmp_path / "client_000")
    saved = ShardedModel(tmp_path, [2])
    assert (saved.clients, saved.clients_of_run) == ([2], 3)
    assert torch.equal(saved.read("odd", 2), states[2]["odd"])
    with pytest.raises(CheckpointError, match=r"missing: client 0[\s\S]*copy .* from the other hosts"):
        ShardedModel(tmp_path)
    with pytest.raises(CheckpointError, match=r"no client 3[\s\S]*0 to 2"):
        ShardedModel(tmp_path, [3])


def test_saving_twice_is_refused(tmp_path: Path) -> None:
    save_clients(tmp_path, [random_state(0, torch.float32)], ranks=1)
    with pytest.raises(CheckpointError, match=r"saved already[\s\S]*client_000/rank_000"):
        save_clients(tmp_path, [random_state(0, torch.float32)], ranks=1)


def test_an_interrupted_save_is_not_taken_for_a_saved_model(tmp_path: Path) -> None:
    def broken():
        yield "first", zero3_slices(random_state(0, torch.float32), 0, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_shards(tmp_path, broken(), Part(0, 0, 1), clients=1, step=0)
    with pytest.raises(CheckpointError, match="no saved model"):
        ShardedModel(tmp_path)
    save_clients(tmp_path, [random_state(0, torch.float32)], ranks=1)  # and the left-over is no obstacle
    assert not list(tmp_path.glob("*/*.partial"))
    assert torch.equal(ShardedModel(tmp_path).read("odd", 0), random_state(0, torch.float32)["odd"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "client_000").touch()  # a file where a folder must be
    with pytest.raises(CheckpointError, match=r"cannot save the model[\s\S]*rank_000"):
        save_shards(tmp_path, [], Part(0, 0, 1), clients=1, step=0)


@pytest.mark.parametrize("case", ["wrong length", "given twice"])
def test_a_caller_error_is_a_plain_value_error(tmp_path: Path, case: str) -> None:
    good = Slice("w", (4,), 0, 4, torch.ones(4))
    bad = Slice("w", (4,), 0, 3, torch.ones(4)) if case == "wrong length" else good
    with pytest.raises(ValueError, match=r"w: |w is given twice") as raised:
        save_shards(tmp_path, [("a", [good]), ("b", [bad])], Part(0, 0, 1), clients=1, step=0)
    assert not isinstance(raised.value, CheckpointError)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no saved model[\s\S]*nowhere"):
        ShardedModel(tmp_path / "nowhere")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    save_clients(tmp_path, [random_state(0, torch.float32)] * 2, ranks=3)
    shutil.rmtree(rank_folder(tmp_path, 1, 2))
    with pytest.raises(CheckpointError, match=r"missing: client 1 rank 2[\s\S]*other hosts"):
        ShardedModel(tmp_path)


def test_a_rank_in_another_ranks_folder_is_refused(tmp_path: Path) -> None:
    save_clients(tmp_path, [random_state(0, torch.float32)] * 2, ranks=1)
    shutil.rmtree(rank_folder(tmp_path, 1, 0))
    shutil.copytree(rank_folder(tmp_path, 0, 0), rank_folder(tmp_path, 1, 0))
    with pytest.raises(CheckpointError, match=r"holds client 0 rank 0[\s\S]*client_001"):
        ShardedModel(tmp_path)


@pytest.mark.parametrize("content", ['{"version": 1, "cli', "{}", "[]", '{"version": 99, "client": 0, "rank": 0}'])
def test_a_damaged_manifest_or_one_of_another_version_is_refused(tmp_path: Path, content: str) -> None:
    save_clients(tmp_path, [random_state(0, torch.float32)], ranks=1)
    (rank_folder(tmp_path, 0, 0) / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"(damaged manifest|version 99)[\s\S]*manifest.json"):
        ShardedModel(tmp_path)


def test_a_changed_torn_or_missing_file_is_named(tmp_path: Path) -> None:
    save_clients(tmp_path, [random_state(0, torch.float32)], ranks=1)
    first, second = sorted(rank_folder(tmp_path, 0, 0).glob("*.safetensors"))
    good = first.read_bytes()
    first.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    saved = ShardedModel(tmp_path)
    saved.read("wide", 0)  # in the other file
    for read in (lambda: saved.read("odd", 0), lambda: saved.mean("odd")):
        with pytest.raises(CheckpointError, match=rf"{first.name} is damaged.*checksum[\s\S]*copy it again"):
            read()
    first.write_bytes(good[:-3])
    with pytest.raises(CheckpointError, match=f"{first.name} has {len(good) - 3} bytes, {len(good)} were written"):
        ShardedModel(tmp_path)
    first.write_bytes(good)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
        ShardedModel(tmp_path)


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([(0, 4), (6, 10)], r"w: elements \[4, 6\) of 10 are missing"),
        ([(0, 6), (4, 10)], r"w: elements \[4, 6\) of 10 are held twice"),
        ([(0, 4), (4, 8)], r"w: elements \[8, 10\) of 10 are missing"),
        ([(0, 0), (0, 0)], r"w: elements \[0, 10\) of 10 are missing"),
        ([(0, 10), (0, 10)], r"w: elements \[0, 10\) of 10 are held twice"),
    ],
)
def test_elements_that_are_missing_or_held_twice_are_named(
    tmp_path: Path, intervals: list[tuple[int, int]], message: str
) -> None:
    for rank, (start, stop) in enumerate(intervals):
        piece = Slice("w", (10,), start, stop, torch.ones(stop - start))
        save_shards(tmp_path, [("all", [piece])], Part(0, rank, 2), clients=1, step=0)
    with pytest.raises(CheckpointError, match=f"client 0, {message}"):
        ShardedModel(tmp_path)


@pytest.mark.parametrize(
    ("other", "step", "message"),
    [
        (torch.ones(3, 2), 7, r"w is \(3, 2\) float32 in client 1 rank 0, \(2, 3\) float32 elsewhere"),
        (torch.ones(2, 3, dtype=torch.bfloat16), 7, r"w is \(2, 3\) bfloat16 in client 1"),
        (torch.ones(2, 3), 8, "client 1 rank 0 was saved at step 8 .* others at step 7"),
    ],
)
def test_clients_of_other_shapes_types_or_steps_are_refused(
    tmp_path: Path, other: Tensor, step: int, message: str
) -> None:
    for client, (tensor, at) in enumerate([(torch.ones(2, 3), 7), (other, step)]):
        groups = [("all", zero3_slices({"w": tensor}, 0, 1))]
        save_shards(tmp_path, groups, Part(client, 0, 1), clients=2, step=at)
    with pytest.raises(CheckpointError, match=message):
        ShardedModel(tmp_path)


def test_a_parameter_that_one_client_lacks_is_named(tmp_path: Path) -> None:
    save_clients(tmp_path, [{"a": torch.ones(2), "w": torch.ones(3)}, {"a": torch.ones(2)}], ranks=1)
    with pytest.raises(CheckpointError, match=r"client 1, w: elements \[0, 3\) of 3 are missing"):
        ShardedModel(tmp_path)


def test_manifest_says_who_wrote_what(tmp_path: Path) -> None:
    save_clients(tmp_path, [{"a": torch.ones(5), "b": torch.ones(1)}], ranks=3, step=12)
    manifest = json.loads((rank_folder(tmp_path, 0, 2) / MANIFEST).read_text())
    assert {key: manifest[key] for key in ("client", "clients", "rank", "ranks", "step")} == {
        "client": 0,
        "clients": 1,
        "rank": 2,
        "ranks": 3,
        "step": 12,
    }
    assert (manifest["tensors"]["a"]["start"], manifest["tensors"]["a"]["stop"]) == (4, 5)
    assert (manifest["tensors"]["b"]["start"], manifest["tensors"]["b"]["stop"]) == (1, 1)
