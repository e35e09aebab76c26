"""What a plan tells about memory."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.filesize import decimal
from transformers import LongcatFlashConfig, MixtralConfig

from deca_ds.cli import main
from deca_ds.config import load_config
from deca_ds.errors import ConfigError
from deca_ds.planning.roofline import GPUS, USABLE
from deca_ds.tools.plan import _on_hosts, print_plan


def test_memory_is_told_by_part_in_80_columns_and_as_json(tiny_model, word_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tiny_model}}}\ndata: {{train: [{word_files[0]}]}}\n")
    command = ["plan", "--config", str(tmp_path / "run.yaml")]
    keys = [f"run.output={tmp_path / 'run'}", "cluster.clients=3", "cluster.ranks=[2,2,2]", "run.device=cuda"]
    keys += ["model.dtype=bfloat16", "data.max_length=16"]
    assert main([*command, *keys]) == 0
    told = capsys.readouterr().out
    table = told[told.index("memory of a rank") : told.index("activations: ")]
    widths = [len(line) for line in told.splitlines() if line[:1] in "┏┃┡│└"]
    assert "…" not in table and max(widths) <= 80
    assert main([*command, "--json", *keys]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["memory"]["device"] == "gpu" and numbers["memory"]["ranks_per_client"] == 2
    fullest = numbers["memory"]["blocks"][numbers["memory"]["fullest_block"]]
    for part in fullest["parts"]:
        assert re.search(rf"{re.escape(part['name'])} .* {re.escape(decimal(part['bytes']))} ", table), part
    for where in ("gpu", "host"):
        assert decimal(max(fullest[where].values())) in table
    assert numbers["disk"]["model"] > 0
    assert decimal(numbers["traffic"]["averaging"]) in told and decimal(round(numbers["traffic"]["run"])) in told
    assert f"{numbers['length']['tokens']:,} tokens" in " ".join(told.split())


def test_a_gpu_is_told_to_fit_or_not_and_how_long_a_step_takes(tiny_model, word_files, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tiny_model}}}\ndata: {{train: [{word_files[0]}]}}\n")
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    command = ["plan", "--config", str(tmp_path / "run.yaml"), "--hostfile", str(tmp_path / "hosts"), "--no-ssh"]
    keys = [f"run.output={tmp_path / 'run'}", "cluster.clients=2", "data.max_length=16", "data.micro_batch_size=2"]

    def plan(*options: str) -> tuple[int, str]:
        code = main([*command, *options, *keys])
        told = capsys.readouterr()
        return code, " ".join((told.out + told.err).split())

    code, told = plan("--gpu", "h100", "--net", "10G")
    assert code == 0 and re.search(r"fits: \S+ GB of 85.5 GB on an H100", told)
    assert "bfloat16" not in told and "float32 67 TFLOP/s x 0.4" in told and "between hosts 1.2 GB/s x 0.8" in told
    memory = json.loads(plan("--gpu", "h100", "--json")[1])["memory"]
    needed = max(memory["blocks"][memory["fullest_block"]]["gpu"].values())
    monkeypatch.setitem(GPUS, "H100", replace(GPUS["H100"], memory=int((needed - 1) / USABLE)))
    code, told = plan("--gpu", "H100")
    assert "does not fit" in told and "nearest setting that fits: " in told
    assert "Without --net, messages between hosts take no time here" in told
    code, told = plan("--net", "10G")
    assert code == 2 and "add --gpu" in told


def test_clients_share_the_network_of_their_host():
    assert _on_hosts(None) == (False, 1.0)
    assert _on_hosts([["a"], ["a"], ["b"]]) == (False, 2.0)
    assert _on_hosts([["a", "b"], ["c", "d"]]) == (True, 0.5)


def test_a_model_that_does_not_run_without_values_still_has_a_plan(tiny_model, word_files, tmp_path, capsys):
    LongcatFlashConfig(
        vocab_size=51, hidden_size=16, ffn_hidden_size=24, expert_ffn_hidden_size=8, num_layers=1, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=4, moe_topk=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", f"model.tokenizer={tiny_model}"]
    print_plan(load_config(None, [*keys, f"data.train=[{word_files[0]}]"]))
    told = " ".join(capsys.readouterr().out.split())
    assert "activations, logits and gradients are not in the table" in told and "model shard" in told


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_tells_fused_experts_that_they_need_checkpointing(
    tiny_model, word_files, tmp_path, capsys, checkpointing
):
    MixtralConfig(
        vocab_size=51, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", f"model.tokenizer={tiny_model}"]
    keys += [f"data.train=[{word_files[0]}]", f"model.gradient_checkpointing={str(checkpointing).lower()}"]
    print_plan(load_config(None, keys))
    told = " ".join(capsys.readouterr().out.split())
    assert ("WARNING: without model.gradient_checkpointing=true, fused experts" in told) != checkpointing


def test_without_the_data_all_else_is_told_before_they_are_refused(tiny_model, tmp_path, capsys, monkeypatch):
    """As a recipe's plan is made where the hub cannot be asked, or rows are malformed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    Path("run.yaml").write_text(f"model: {{path: {tiny_model}}}\ncluster: {{clients: 2}}\n")
    command = ["plan", "run.yaml", "data.max_length=16", "--gpu", "H100"]
    for train, why in (
        ("owner/rows", "has no dataset of this name"),
        ("gone.jsonl", "no such"),
        ("bad.jsonl", "is a int"),
    ):
        for length, is_known in (("algorithm.rounds=2", True), ("algorithm.epochs=2", False)):
            assert main([*command, f"data.train=[{train}]", length]) == 2
            out, err = capsys.readouterr()
            assert err.startswith("ERROR: ") and why in err
            told = "data: unknown, and so are what each client gets and "
            told += "" if is_known else "the length of the run and "
            line = next(line for line in out.splitlines() if line.startswith("data: "))
            assert line.startswith(f"{told}the time of an evaluation: ") and why in line
            assert "memory of a rank" in out and "traffic: " in out and "disk: " in out and "launch: " in out
            assert ("steps: 2 rounds" in out) == is_known and "data of each client" not in out
    for key in ("data.split=test", "data.column_names=[text]"):  # whether anything reads them depends on the data
        assert main([*command, "data.train=[gone.jsonl]", key]) == 2
        assert "memory of a rank" in capsys.readouterr().out
    assert main([*command, "data.train=[gone.jsonl]", "algorithm.epochs=2", "--json"]) == 2
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["length"] is None and numbers["memory"] and numbers["seconds_of_a_step"]["step"] > 0
    with pytest.raises(ConfigError, match=r"data\.common_holdout"):  # a contradiction is told at once
        print_plan(load_config("run.yaml", ["data.train=[gone.jsonl]", "data.common_holdout=2"]))
    assert not capsys.readouterr().out
