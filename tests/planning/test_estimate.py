"""What a rank holds, against sums by hand."""

from __future__ import annotations

from math import prod

import pytest
from transformers import LlamaConfig

from deca_ds.config import load_config
from deca_ds.engine.dry_pass import PassMemory
from deca_ds.gossip.schedule import build_mixing
from deca_ds.planning.estimate import Estimate, memory_json
from deca_ds.planning.gathered import peak_gathered
from deca_ds.planning.memory import ACTIVATIONS, PROCESS, Shape, parts, peak

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
LENGTH = 16


def estimate(ranks: int, gpu: bool, *changes: str, clients: int = 3) -> Estimate:
    keys = ["model.path=none", "run.output=none", f"cluster.clients={clients}", f"data.max_length={LENGTH}"]
    keys += ["blocks.layers_per_block=1", "data.micro_batch_size=1"]
    config = load_config(None, [*keys, *changes])
    return Estimate(config, LlamaConfig(**SHAPE), build_mixing(config.gossip, clients, 0), ranks, gpu)


def by_name(found) -> dict[str, int]:
    return {part.name: part.bytes for part in found.worst.parts}


def test_a_bfloat16_model_of_two_ranks_on_gpus():
    found = estimate(2, True, "model.dtype=bfloat16")
    numel = sum(prod(p.shape) for p in found.model.parameters())
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert found.worst.label == "layer 0" and found.worst.numel == layer  # of equals the first keeps most
    held = by_name(found)
    assert held["model shard"] == 2 * numel // 2
    assert held["active block: float32 state"] == 16 * layer // 2
    assert held["low halves of masters"] == 2 * numel // 2
    assert held["gossip: receive buffers"] == 4 * layer // 2 * (2 + 1)  # two neighbours, a copy to send
    assert held["gradient buckets"] == 4 * (layer + layer // 2)
    assert held["checkpoint: copies to write"] == 16 * layer // 2 + (2 + 2) * numel // 2
    where = {part.name: part.where for part in found.worst.parts}
    assert where["low halves of masters"] == where["gossip: receive buffers"] == where["process"] == "host"
    assert where["model shard"] == where["active block: float32 state"] == where[ACTIVATIONS] == "gpu"


def test_on_a_cpu_all_is_on_the_host_and_one_rank_gathers_nothing():
    found = estimate(1, False, clients=1)
    held = by_name(found)
    numel = sum(prod(p.shape) for p in found.model.parameters())
    assert held["model shard"] == 4 * numel and held["process"] == PROCESS
    assert {part.where for part in found.worst.parts} == {"host"}
    assert not {"gathered layers", "gradient buckets", "low halves of masters", "gossip: means"} & held.keys()


def test_blocks_between_those_that_are_run_lie_on_the_line():
    found = estimate(1, True)
    kept = [next(part.bytes for part in turn.parts if part.name == ACTIVATIONS) for turn in found.turns]
    assert len(kept) == 6 and kept[1:] == sorted(kept[1:], reverse=True)
    assert kept[2] - kept[3] == pytest.approx(kept[3] - kept[4], abs=1)
    names = found.plan.blocks[2].names
    assert kept[2] == pytest.approx(found._dry.training(names, 1, LENGTH).saved, rel=0.01)


def test_checkpointing_is_told_the_other_way_round_too():
    off, on = estimate(1, True), estimate(1, True, "model.gradient_checkpointing=true")
    assert off.other_activations() == by_name(on)[ACTIVATIONS]
    assert on.other_activations() == by_name(off)[ACTIVATIONS] > 2 * by_name(on)[ACTIVATIONS]


def test_the_most_at_a_time_is_of_one_moment():
    passes = PassMemory(saved=100, forward=110, loss=190, backward=150)
    shape = Shape(
        ranks=1, gpu=True, width=2, trained=1000, frozen=0, buffers=0, state_bytes=16, low_halves=True, offload=False,
        neighbours=0, travels=1, wire=4, chunk=64, whole=False, kept=False, copied=True, mean_model=False,
    )  # fmt: skip
    found = parts(shape, 200, passes, gathered=0, scoring=40, largest_call=0)
    context = next(part.bytes for part in found if part.name.startswith("CUDA"))
    assert peak(found, "gpu") == ("loss", 2000 + 16 * 200 + 190 + context)
    assert peak(found, "host") == ("checkpoint", 2000 + (16 * 200 + 4 * 1000) + PROCESS)


CALLS = [("a",), ("b",), ("c",)]
SIZES = {"a": 5, "b": 7, "c": 2}


@pytest.mark.parametrize(
    ("reuse", "prefetch", "trained", "most"),
    [
        (0, 0, {"a"}, 7),  # one at a time
        (0, 3, {"a"}, 10),  # and what is fetched ahead
        (5, 0, {"b"}, 9),  # the backward pass comes back to b after c
        (1000, 0, {"a"}, 14),  # all stays until its last use
        (1000, 1000, {"c"}, 14),  # never more than there is
    ],
)
def test_what_is_gathered_at_a_time(reuse, prefetch, trained, most):
    zero = {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": prefetch}
    assert peak_gathered(CALLS, SIZES, trained, zero) == most


def test_json_has_every_blocks_turn():
    found = estimate(2, True)
    told = memory_json(found)
    assert [block["block"] for block in told["blocks"]] == list(range(6))
    worst = told["blocks"][told["fullest_block"]]
    assert max(worst["gpu"].values()) == found.worst.at_most("gpu")
    assert worst["gpu"]["loss"] == sum(
        part["bytes"] for part in worst["parts"] if part["where"] == "gpu" and "loss" in part["when"]
    )


def test_a_step_takes_the_work_of_its_passes_and_messages():
    found = estimate(1, True, "data.batch_size=2", "model.dtype=bfloat16")
    work = [found._work(index, False, 1.0) for index in range(6)]
    layer, head = 4 * 64 * 64 + 3 * 64 * 96, 512 * 64
    matrices, tokens, scores = 4 * layer + head, 2 * LENGTH, 2 * 4 * 64 * LENGTH
    assert work[5].flops == pytest.approx(tokens * (2 * matrices + scores + 4 * head + 2 * scores * head / matrices))
    assert work[0].flops == pytest.approx(tokens * (4 * matrices + 3 * scores))  # looking embeddings up is no product
    assert work[1].gathered == 0.0 and work[1].messages == 2 * 4 * (layer + 2 * 64)
    spread = estimate(2, True, "data.batch_size=2", "model.dtype=bfloat16")._work(1, True, 0.5)
    assert spread.flops == pytest.approx(work[1].flops / 2) and spread.messages == work[1].messages / 2
    assert spread.gathered > 2 * sum(prod(p.shape) for p in found.model.parameters()) / 2
