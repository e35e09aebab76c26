"""Export of tiny models: reloads to bit-equal parameters, streams, and leaves nothing behind when it fails."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_states import CONFIGS, load_exported, model_state, save_clients, zero3_slices
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deca_ds.checkpoint import export as export_module
from deca_ds.checkpoint.export import export_model
from deca_ds.checkpoint.part import Part, rank_folder
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import step_folder
from deca_ds.checkpoint.write_shards import save_shards
from deca_ds.cli import main
from deca_ds.engine.slices import buffer_name
from deca_ds.errors import CheckpointError, ConfigError
from deca_ds.tools.export import parse_size

MakeRun = Callable[..., tuple[Path, list[PreTrainedModel]]]
LAUNCHER = Path(__file__).parents[2] / "launchers" / "export.py"


def reload_state(folder: Path) -> dict[str, torch.Tensor]:
    return model_state(load_exported(folder))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_nothing_left(output: Path) -> None:
    assert not output.exists()
    assert not list(output.parent.glob(f"{output.name}*"))


def write_states(run: Path, states: list[dict[str, torch.Tensor]], ranks: int = 1) -> None:
    """Replace a run's saved model."""
    shutil.rmtree(run / "model")
    save_clients(run / "model", states, ranks=ranks)


@pytest.mark.parametrize("max_bytes", [10_000, 10_000_000])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_one_client_reloads_bit_equal(tmp_path: Path, make_run: MakeRun, architecture: str, max_bytes: int) -> None:
    run, trained = make_run(architecture, clients=2, ranks=3)
    report = export_model(run, tmp_path / "out", client=1, max_shard_bytes=max_bytes)
    assert_same(reload_state(tmp_path / "out"), model_state(trained[1]))
    assert report.source == "client 1"
    assert report.parameters == sum(p.numel() for p in trained[1].parameters())
    assert (report.files == 1) == (tmp_path / "out" / "model.safetensors").exists()
    assert (report.files > 1) == (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert report.note is None
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("story") == 2


def test_the_weights_have_the_permissions_of_the_other_files(tmp_path: Path, make_run: MakeRun) -> None:
    umask = os.umask(0o027)
    try:
        run, _ = make_run()
        export_model(run, tmp_path / "out")
    finally:
        os.umask(umask)
    files = [*run.rglob("*.safetensors"), *(tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral", "qwen2_tied"])
def test_files_are_what_save_pretrained_writes(tmp_path: Path, make_run: MakeRun, architecture: str) -> None:
    run, trained = make_run(architecture, dtype=torch.bfloat16)
    export_model(run, tmp_path / "out", client=0)
    trained[0].save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.bfloat16 for name in theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("clients", "ranks"), [(1, 1), (1, 2), (3, 1), (3, 2), (3, 3)])
def test_the_export_of_all_clients_holds_their_mean(
    tmp_path: Path, make_run: MakeRun, clients: int, ranks: int, dtype: torch.dtype
) -> None:
    run, trained = make_run("qwen2_tied", clients=clients, ranks=ranks, dtype=dtype)
    report = export_model(run, tmp_path / "out")
    states = [model_state(model) for model in trained]
    for name, tensor in reload_state(tmp_path / "out").items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, torch.stack([s[name].float() for s in states]).mean(0).to(dtype))
    assert report.source == ("mean of 1 client" if clients == 1 else f"mean of {clients} clients")


def test_tied_weights_are_stored_once(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run("qwen2_tied")
    export_model(run, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def save_checkpoint(run: Path, step: int, states: list[dict[str, torch.Tensor]], **state: object) -> None:
    """A checkpoint in the middle of an activation, written by two ranks a client."""
    for client, own in enumerate(states):
        name = next(iter(own))
        buffers = {buffer_name(key, name): torch.rand(own[name].shape) for key in "mv"}
        for rank in range(2):
            groups = [("all", zero3_slices(own, rank, 2)), ("m", zero3_slices(buffers, rank, 2))]
            if client not in state.get("missing", ()):
                save_shards(
                    step_folder(run / "checkpoints", step), groups, Part(client, rank, 2), clients=len(states),
                    step=step, state={"attempt": 1, **state},
                )  # fmt: skip


def test_a_checkpoint_is_exported_without_the_state_of_its_block(tmp_path: Path, make_run: MakeRun) -> None:
    run, trained = make_run("llama", clients=2)
    states = [model_state(model) for model in trained]
    save_checkpoint(run, 8, [{name: tensor + 1 for name, tensor in state.items()} for state in states])
    save_checkpoint(run, 12, states)
    report = export_model(run, tmp_path / "one", client=1, checkpoint=12)
    assert_same(reload_state(tmp_path / "one"), states[1])
    assert report.source == "client 1, after 12 inner steps" and report.note is None
    export_model(run, tmp_path / "mean", checkpoint=8)
    for name, tensor in reload_state(tmp_path / "mean").items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2 + 1)


def test_of_a_stopped_run_the_newest_whole_checkpoint_is_exported(tmp_path: Path, make_run: MakeRun, capsys) -> None:
    run, trained = make_run("llama", clients=2)
    shutil.rmtree(run / "model")
    (run / "DONE").rename(run / "STOPPED")
    states = [model_state(model) for model in trained]
    save_checkpoint(run, 8, states, missing=[1])
    save_checkpoint(run, 12, states)
    next((run / "checkpoints/step_00000012/client_000/rank_001").glob("000_*")).unlink()
    with pytest.raises(CheckpointError, match="no saved model here") as caught:
        export_model(run, tmp_path / "out")
    assert "--checkpoint newest" in caught.value.fix
    assert main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "newest"]) == 0
    assert_same(reload_state(tmp_path / "out"), states[0])
    assert "mean of 1 client (without 1, gone before the end), after 8 inner steps" in capsys.readouterr().out


def test_the_best_checkpoint_is_that_of_the_evaluation_with_the_lowest_loss(tmp_path, make_run, capsys) -> None:
    run, trained = make_run("llama")
    states = [model_state(trained[0])]
    save_checkpoint(run, 8, states)
    save_checkpoint(run, 12, [{name: tensor + 1 for name, tensor in states[0].items()}])

    def scored(**losses: float) -> int:
        lines = [{"kind": "evaluation", "step": int(at[1:]), "own": {"loss": loss}} for at, loss in losses.items()]
        (run / "metrics").mkdir(exist_ok=True)
        (run / "metrics/client_000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "best"])

    assert scored(_0=0.1, _8=0.5) == 2 and "best before its first inner step" in capsys.readouterr().err
    assert scored(_0=3.0, _8=0.5, _12=0.5) == 0
    assert_same(reload_state(tmp_path / "out"), states[0])


@pytest.mark.parametrize(
    ("wanted", "message"), [("9", r"no checkpoint after inner step 9[\s\S]*those after inner step 8, 12"),
                            ("12", "not from one attempt")]
)  # fmt: skip
def test_a_checkpoint_that_is_not_there_or_not_one_is_refused(tmp_path, make_run, capsys, wanted, message) -> None:
    run, trained = make_run("llama")
    states = [model_state(trained[0])]
    save_checkpoint(run, 8, states)
    save_checkpoint(run, 12, states)
    part = run / "checkpoints/step_00000012/client_000/rank_001"
    manifest = json.loads((part / "manifest.json").read_text())
    manifest["state"]["attempt"] = 2
    (part / "manifest.json").write_text(json.dumps(manifest))
    (part / "manifest.blake2b").unlink()
    assert main(["export", str(run), str(tmp_path / "out"), "--checkpoint", wanted]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_export_has_the_data_type_that_is_asked_for_and_its_config_says_so(
    tmp_path: Path, make_run: MakeRun, dtype: str
) -> None:
    run, trained = make_run("gpt2_tied")
    config = json.loads((run / "hf" / "config.json").read_text())
    (run / "hf" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    export_model(run, tmp_path / "out", dtype=dtype)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model_state(trained[0]).items()}
    assert_same(reload_state(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_config_names_the_data_type_that_was_trained(tmp_path: Path, make_run: MakeRun) -> None:
    run, trained = make_run()
    config = json.loads((run / "hf" / "config.json").read_text())
    (run / "hf" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export_model(run, tmp_path / "out")
    assert_same(reload_state(tmp_path / "out"), model_state(trained[0]))


def test_everything_but_weights_is_copied(tmp_path: Path, make_run: MakeRun) -> None:
    run, trained = make_run()
    (run / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (run / "hf" / "model.safetensors.index.json").write_text("{}")
    export_model(run, tmp_path / "deep" / "out")
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
    assert "model.safetensors.index.json" not in names
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert_same(reload_state(tmp_path / "deep" / "out"), model_state(trained[0]))


def test_a_run_without_a_tokenizer_is_exported(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run()
    for path in (run / "hf").glob("tokenizer*"):
        path.unlink()
    export_model(run, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("client", [0, None])
def test_at_most_one_output_file_and_one_parameter_are_alive(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, architecture: str, client: int | None
) -> None:
    run, trained = make_run(architecture, clients=2, ranks=2)
    limit, alive, peak, handed = 20_000, {}, [0], []

    def watched(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def read(*args) -> torch.Tensor:
            tensor = method(*args)
            storage = tensor.untyped_storage()
            alive[id(storage)] = storage.nbytes()
            weakref.finalize(tensor, alive.pop, id(storage))
            peak[0] = max(peak[0], sum(alive.values()))
            return tensor

        return read

    def recorded(tensors: dict[str, torch.Tensor], *args, **kwargs) -> None:
        handed.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *args, **kwargs)

    for name in ("read", "mean"):
        monkeypatch.setattr(ShardedModel, name, watched(getattr(ShardedModel, name)))
    monkeypatch.setattr(export_module, "save_file", recorded)
    report = export_model(run, tmp_path / "out", client=client, max_shard_bytes=limit)

    largest = max(tensor.nbytes for tensor in model_state(trained[0]).values())
    assert len(handed) == report.files > 3
    assert max(handed) <= limit
    assert sum(handed) == sum(tensor.nbytes for tensor in model_state(trained[0]).values())
    assert 0 < peak[0] <= limit + largest


def test_progress_reaches_the_total(tmp_path: Path, make_run: MakeRun) -> None:
    run, trained = make_run("mixtral")
    seen = []
    export_model(run, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in model_state(trained[0]).values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_an_existing_output_is_not_touched(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match=r"exists already[\s\S]*out"):
        export_model(run, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_run_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such run folder[\s\S]*nowhere"):
        export_model(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("DONE", "missing: client 1$"),
        ("FAILED", r"missing: client 1 \(.*FAILED: client 1 lost"),
        (None, "not marked DONE"),
    ],
)
def test_an_incomplete_run_is_refused(tmp_path: Path, make_run: MakeRun, marker: str | None, message: str) -> None:
    run, trained = make_run(clients=2)
    shutil.rmtree(run / "model" / "client_001")
    (run / "DONE").unlink()
    if marker:
        (run / marker).write_text("client 1 lost\nrank 1: no answer\n")
    with pytest.raises(CheckpointError, match=f"(?m){message}"):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")
    report = export_model(run, tmp_path / "out", client=0)  # whose files are here
    assert (report.note is None) == (marker == "DONE")
    assert_same(reload_state(tmp_path / "out"), model_state(trained[0]))


def test_a_client_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run(clients=2)
    with pytest.raises(CheckpointError, match=r"no client 2[\s\S]*0 to 1"):
        export_model(run, tmp_path / "out", client=2)


@pytest.mark.parametrize(("client", "where"), [(1, "client 1"), (None, "mean of 2 clients; not finite in client 1")])
def test_weights_that_are_not_finite_are_refused_with_parameter_and_client(
    tmp_path: Path, make_run: MakeRun, client: int | None, where: str
) -> None:
    run, trained = make_run(clients=2, ranks=2)
    states = [model_state(model) for model in trained]
    states[1]["model.norm.weight"][3:5] = torch.tensor([float("nan"), float("inf")])
    write_states(run, states, ranks=2)
    with pytest.raises(CheckpointError, match=rf"2 of 32 elements of model.norm.weight[\s\S]*{where}"):
        export_model(run, tmp_path / "out", client=client)
    assert_nothing_left(tmp_path / "out")


def test_a_value_that_overflows_the_wanted_data_type_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    run, trained = make_run()
    state = model_state(trained[0])
    state["model.norm.weight"][0] = 1e5
    write_states(run, [state])
    with pytest.raises(CheckpointError, match=r"1 of 32 elements of model.norm.weight are too large for float16"):
        export_model(run, tmp_path / "out", dtype="float16")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("case", ["missing", "not known", "shape"])
def test_weights_that_do_not_fit_config_json_are_refused_by_name(tmp_path: Path, make_run: MakeRun, case: str) -> None:
    run, trained = make_run()
    state = model_state(trained[0])
    norm = state.pop("model.norm.weight")
    if case == "not known":
        state |= {"model.norm.weight": norm, "adapter.weight": norm.clone()}
    elif case == "shape":
        state |= {"model.norm.weight": norm[:-1]}
    write_states(run, [state])
    expected = {
        "missing": "model.norm.weight missing",
        "not known": "adapter.weight not known",
        "shape": r"model.norm.weight has shape \(31,\), config.json makes it \(32,\)",
    }
    with pytest.raises(CheckpointError, match=expected[case]):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_a_damaged_shard_is_refused_by_its_name(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run(ranks=2)
    path = max(rank_folder(run / "model", 0, 1).glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no_such_model"}', '{"auto_map": {}}'])
def test_a_config_json_that_makes_no_model_is_refused(tmp_path: Path, make_run: MakeRun, content: str | None) -> None:
    run, _ = make_run()
    (run / "hf" / "config.json").unlink()
    if content is not None:
        (run / "hf" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json[\s\S]*hf"):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_code_that_comes_with_the_model_is_not_run(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run()
    code = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (run / "hf" / "config.json").write_text(json.dumps(code))
    (run / "hf" / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match=r"trust_remote_code[\s\S]*--trust-remote-code"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_does_not_load_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run()
    (run / "hf" / "tokenizer.json").write_text("not json")
    with pytest.raises(CheckpointError, match="tokenizer does not load"):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_an_export_is_read_back_and_refused_if_the_disk_has_changed_it(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run()

    def corrupting(tensors: dict[str, torch.Tensor], *args, **kwargs) -> None:
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, *args, **kwargs)

    monkeypatch.setattr(export_module, "save_file", corrupting)
    with pytest.raises(CheckpointError, match=r"does not hold what was written to it: model.norm.weight"):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_names_that_do_not_load_are_caught(tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run()

    def misnaming(model: PreTrainedModel, group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("model.norm", "model.morn"): tensor for name, tensor in group.items()}

    monkeypatch.setattr(export_module, "to_file_format", misnaming)
    with pytest.raises(CheckpointError) as raised:
        export_model(run, tmp_path / "out")
    assert "missing keys: model.norm.weight" in str(raised.value)
    assert "unexpected keys: model.morn.weight" in str(raised.value)
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run, _ = make_run()

    def no_space(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(export_module, "save_file", no_space)
    with pytest.raises(CheckpointError, match=r"(the export needs .* GB|No space left)[\s\S]*fix: +(check|free)"):
        export_model(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def launch(*arguments: object) -> int:
    """launchers/export.py's main."""
    spec = importlib.util.spec_from_file_location("export_launcher", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def test_the_command_exports_one_client_or_the_mean_and_says_which(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, trained = make_run(clients=3)
    (run / "DONE").unlink()
    size = ("--max-shard-size", "0.02MB", "--dtype", "bfloat16")
    assert launch(run, tmp_path / "out", "--client", 2, *size) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("exported client 2") and str(tmp_path / "out") in printed and "not marked DONE" in printed
    assert_same(reload_state(tmp_path / "out"), {n: t.bfloat16() for n, t in model_state(trained[2]).items()})
    assert launch(run, tmp_path / "mean", "--mean") == 0
    assert "mean of 3 clients" in capsys.readouterr().out


def test_the_command_explains_mistakes_and_writes_nothing(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run()
    assert launch(run, tmp_path / "out", "--client", 5) == 2
    assert "no client 5" in capsys.readouterr().err
    assert launch(run, tmp_path / "out", "--max-shard-size", "lots") == 2
    assert "'lots'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        launch(run, tmp_path / "out", "--client", 0, "--mean")
    assert_nothing_left(tmp_path / "out")


def test_sizes_have_decimal_or_binary_units_and_all_else_is_refused() -> None:
    assert [parse_size(text) for text in ("500MB", "2gb", "0.5GiB")] == [500_000_000, 2_000_000_000, 1 << 29]
    for wrong in ("", "0MB", "-1GB", "12", "2 potatoes", "nanGB", "infGB"):
        with pytest.raises(ConfigError, match="--max-shard-size"):
            parse_size(wrong)
