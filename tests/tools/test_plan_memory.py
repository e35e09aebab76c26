"""What a plan tells about memory."""

import json
import re

from rich.filesize import decimal
from transformers import LongcatFlashConfig

from deca_ds.cli import main
from deca_ds.config import load_config
from deca_ds.tools.plan import print_plan


def test_memory_is_told_by_part_in_80_columns_and_as_json(tiny_model, word_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tiny_model}}}\ndata: {{train: [{word_files[0]}]}}\n")
    command = ["plan", "--config", str(tmp_path / "run.yaml")]
    keys = [f"run.output={tmp_path / 'run'}", "cluster.clients=3", "cluster.ranks=[2,2,2]", "run.device=cuda"]
    keys += ["model.dtype=bfloat16", "data.max_length=16"]
    assert main([*command, *keys]) == 0
    told = capsys.readouterr().out
    table = told[told.index("memory of a rank") : told.index("activations: ")]
    assert "…" not in table and max(map(len, told.splitlines())) <= 80
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
