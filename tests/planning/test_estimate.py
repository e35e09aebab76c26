"""What a rank holds, against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import pytest
from transformers import LlamaConfig

from deca_ds.config import load_config
from deca_ds.engine.dry_pass import PassMemory
from deca_ds.gossip.schedule import build_mixing
from deca_ds.planning.estimate import Estimate, memory_json
from deca_ds.planning.gathered import Gathered, peak_gathered
from deca_ds.planning.memory import ACTIVATIONS, BUCKET_NUMEL, PROCESS, Shape, page_locked, parts, peak, totals
from deca_ds.planning.roofline import ARITHMETIC, LINK, Gpu
from deca_ds.transport import collectives

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
LENGTH = 16


def estimate(ranks: int, gpu: bool, *changes: str, clients: int = 3) -> Estimate:
    keys = ["model.path=none", "run.output=none", f"cluster.clients={clients}", f"data.max_length={LENGTH}"]
    keys += ["blocks.layers_per_block=1", "data.micro_batch_size=1", "gossip.graph=ring"]
    config = load_config(None, [*keys, *changes])
    return Estimate(config, LlamaConfig(**SHAPE), build_mixing(config.gossip, clients, 0), ranks, gpu)


def by_name(found) -> dict[str, int]:
    return {part.name: part.bytes for part in found.worst.parts}


def test_the_memory_of_a_bfloat16_model_on_two_gpus_is_the_sum_by_hand():
    found = estimate(2, True, "model.dtype=bfloat16")
    numel = sum(prod(p.shape) for p in found.model.parameters())
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert found.worst.label == "layer 0" and found.worst.numel == layer  # of equals the first keeps most
    held = by_name(found)
    assert held["model shard"] == 2 * numel // 2
    assert held["active block: float32 state"] == 16 * layer // 2
    assert held["low halves of masters"] == 2 * numel // 2
    assert held["gossip: receive buffers"] == page_locked(4 * layer // 2) * (2 + 1)  # two neighbours, a copy to send
    assert held["gradient bucket under way, its sum"] == 4 * (layer + layer // 2)
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
    assert (
        not {"gathered layers", "gradient bucket that is filled", "low halves of masters", "gossip: means"}
        & held.keys()
    )


def test_blocks_between_those_that_are_run_lie_on_the_line():
    found = estimate(1, True)
    kept = [next(part.bytes for part in block.parts if part.name == ACTIVATIONS) for block in found.by_block]
    assert len(kept) == 6 and kept[1:] == sorted(kept[1:], reverse=True)
    assert kept[2] - kept[3] == pytest.approx(kept[3] - kept[4], abs=1)
    names = found.plan.blocks[2].names
    assert kept[2] == pytest.approx(found.dry.training(names, 1, LENGTH).saved, rel=0.01)


def test_checkpointing_is_told_the_other_way_round_too():
    off, on = estimate(1, True), estimate(1, True, "model.gradient_checkpointing=true")
    assert off.other_activations() == by_name(on)[ACTIVATIONS]
    assert on.other_activations() == by_name(off)[ACTIVATIONS] > 2 * by_name(on)[ACTIVATIONS]


def test_the_most_at_a_time_is_of_one_moment():
    passes = PassMemory(saved=100, forward=110, loss=190, backward=150, kept=0)
    found = parts(small_shape(), 200, passes, Gathered(0, 0, 0), scoring=40, largest_call=0)
    context = next(part.bytes for part in found if part.name.startswith("CUDA"))
    assert peak(found, "gpu") == ("loss", 2000 + 16 * 200 + 190 + context)
    assert peak(found, "host") == ("checkpoint", 2000 + (16 * 200 + 4 * 1000) + PROCESS)


def test_what_passes_freed_is_still_there_between_them_and_counts_once_in_them():
    passes = PassMemory(saved=100, forward=160, loss=190, backward=150, kept=150)
    found = parts(small_shape(gpu=False, low_halves=False), 10, passes, Gathered(0, 0, 0), scoring=40, largest_call=0)
    at, held = totals(found, "host"), 2000 + 16 * 10 + PROCESS
    expected = {
        "rest": 150, "forward": 160, "loss": 190, "backward": 150, "arrival": 160, "reduction": 150, "gossip": 150,
        "evaluation": 150 + 40, "mean model": 150 + 40, "checkpoint": 150 + 16 * 10 + 2 * 1000,
    }  # fmt: skip
    assert at == {moment: held + more for moment, more in expected.items()}


SIZES = {"a": 5, "b": 7, "c": 2}
ONE_BY_ONE = [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(
    ("calls", "reuse", "prefetch", "live", "trained", "expected"),
    [
        (ONE_BY_ONE, 0, 0, 1000, "a", Gathered(7, 14, 5)),  # one at a time
        (ONE_BY_ONE, 5, 0, 1000, "b", Gathered(7 + 2, 14, 7)),  # the backward pass comes back to b after c
        (ONE_BY_ONE, 1000, 0, 1000, "a", Gathered(14, 5 + 7 + 7, 5)),  # all stays until its last use
        ([("a", "b"), ("c",)], 0, 0, 1000, "c", Gathered(12 + 12, 12 + 12, 2)),  # a piece, and what is copied out of it
        (ONE_BY_ONE, 0, 8, 1000, "c", Gathered(9 + 9, 5 + 9 + 9, 2)),  # b and c come ahead, in one piece
        (ONE_BY_ONE, 0, 8, 6, "c", Gathered(5 + 7, 5 + 7 + 7, 2)),  # b alone: with a, that is enough
        ([(), ("a",), ("b",)], 0, 8, 1000, "b", Gathered(12 + 12, 12 + 12, 7)),  # the module around them looks ahead
    ],
)
def test_the_most_that_is_gathered_follows_deepspeeds_reuse_prefetch_and_live_limits(
    calls, reuse, prefetch, live, trained, expected
):
    zero = {
        "stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": prefetch, "stage3_max_live_parameters": live
    }  # fmt: skip
    assert peak_gathered(calls, SIZES, trained, zero, ranks=2) == expected


def test_one_rank_brings_parameters_one_by_one():
    assert peak_gathered([("a", "b")], SIZES, "a", {"stage3_prefetch_bucket_size": 0}, ranks=1).most == 12


def small_shape(**changes) -> Shape:
    known = dict(
        ranks=1, gpu=True, width=2, trained=1000, frozen=0, buffers=0, state_bytes=16, low_halves=True, offload=False,
        rounding=0, sources=0, travels=1, wire=4, chunk=64, whole=False, kept=False, copied=True, mean_model=False,
    )  # fmt: skip
    return Shape(**known | changes)


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 1), (4, 4), (5, 8), ((1 << 22) + 1, 1 << 23)])
def test_torch_page_locks_the_next_power_of_two(size, taken):
    assert page_locked(size) == taken


@pytest.mark.parametrize("pinned", [True, False, None])
def test_the_part_of_each_offloaded_parameter_is_page_locked_by_itself(tmp_path, pinned):
    file, ranks = tmp_path / "offload.json", 3
    offload = {"device": "cpu"} | ({} if pinned is None else {"pin_memory": pinned})
    file.write_text(json.dumps({"zero_optimization": {"offload_param": offload}}))
    found = estimate(ranks, True, f"deepspeed={file}")
    sizes = [p.numel() for p in found.model.parameters()]
    slices = sum(page_locked(4 * -(-numel // ranks)) for numel in sizes)
    exact = 4 * -(-sum(sizes) // ranks)
    held = next(part for part in found.worst.parts if part.name == "model shard")
    assert held.where == "host" and abs(held.bytes - (exact if pinned is False else slices)) < 4 * len(sizes)


@pytest.mark.parametrize(("whole", "expected"), [(False, 4 * 4096), (True, 5 * 4096 + 512)])
def test_each_receive_buffer_is_page_locked_on_gpus(whole, expected):
    """Chunks of 3000 bytes, and one of 400 that is left."""
    shape = small_shape(sources=2, chunk=750, whole=whole)
    found = parts(shape, 5 * 750 + 100, PassMemory(0, 0, 0, 0, 0), Gathered(0, 0, 0), scoring=0, largest_call=0)
    assert {part.name: part.bytes for part in found}["gossip: receive buffers"] == 3 * expected


@pytest.mark.parametrize("clients", [3, 8])
@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_the_mean_model_takes_pieces_of_one_size_whatever_the_graph(clients, graph):
    numel = 2 * collectives.REDUCE_PIECE
    pieces = 4 * collectives.PIECES_AT_A_TIME * collectives.REDUCE_PIECE
    planned = estimate(1, False, f"gossip.graph={graph}", clients=clients)
    shape = replace(planned._shape, trained=numel, frozen=numel)
    found = parts(shape, 10, PassMemory(0, 0, 0, 0, 0), Gathered(0, 0, 0), scoring=0, largest_call=0)
    assert {part.name: part.bytes for part in found}["mean model: copy and pieces"] == 4 * numel + pieces


@pytest.mark.parametrize("gpu", [True, False])
def test_gloo_copies_what_it_gathers_and_reduces(gpu):
    """A block of one bucket is reduced when its backward pass is over; one of several, meanwhile as well."""
    nothing, gathered = PassMemory(0, 0, 0, 0, 0), Gathered(most=300, arriving=400, end=50)
    gloo = not gpu
    for block, several in ((200, False), (2 * BUCKET_NUMEL + 6, True)):
        shape = small_shape(ranks=2, gpu=gpu, width=4)
        found = parts(shape, block, nothing, gathered, scoring=0, largest_call=0)
        at = totals(found, "gpu" if gpu else "host")
        bucket = min(block, BUCKET_NUMEL)
        travels = 4 * (bucket + bucket // 2) + gloo * 4 * bucket
        assert at["reduction"] - at["rest"] == 4 * 50 + travels
        assert at["backward"] - at["rest"] == 4 * 300 + 4 * bucket + several * travels
        assert at["arrival"] - at["rest"] == 4 * 300 + gloo * 4 * 100
        assert at["forward"] - at["rest"] == 4 * 300


def test_the_json_has_the_memory_of_every_active_block():
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
    work = [found.work(index, False, 1.0) for index in range(6)]
    layer, head = 4 * 64 * 64 + 3 * 64 * 96, 512 * 64
    matrices, tokens, scores = 4 * layer + head, 2 * LENGTH, 2 * 4 * 64 * LENGTH
    assert work[5].flops == pytest.approx(tokens * (2 * matrices + scores + 4 * head + 2 * scores * head / matrices))
    assert work[0].flops == pytest.approx(tokens * (4 * matrices + 3 * scores))  # looking embeddings up is no product
    assert work[1].gathered == 0.0 and work[1].messages == 2 * 4 * (layer + 2 * 64)
    spread = estimate(2, True, "data.batch_size=2", "model.dtype=bfloat16").work(1, True, 0.5)
    assert spread.flops == pytest.approx(work[1].flops / 2) and spread.messages == work[1].messages / 2
    assert spread.gathered > 2 * sum(prod(p.shape) for p in found.model.parameters()) / 2


def test_an_evaluation_scores_its_sets_and_the_mean_model():
    """Arithmetic alone, then memory and links, on a card of 1 operation or 1 byte a second."""
    parameters = 4 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 2 * 512 * 64 + 64
    matrices = parameters - 512 * 64 - 9 * 64  # but embeddings and norms
    a_pass = 2 * LENGTH * (2 * matrices + 2 * 4 * 64 * LENGTH)  # of two sequences; attention's scores
    arithmetic = Gpu(memory=1, bf16=1.0, fp32=1.0, bandwidth=1e30, link=1e30, pcie=1e30)
    card = Gpu(memory=1, bf16=1e30, fp32=1e30, bandwidth=1e30, link=1.0, pcie=1.0)

    def seconds(card, ranks, *changes, net=None, own=5, common=12):
        planned = estimate(ranks, True, "evaluation.batch_size=2", *changes)
        return planned.evaluation_time(card, net, False, 1.0, own=own, common=common)

    # own: 3 passes; common: 6; the mean model's share of common: 2, or own once more
    for (own, common), passes in {(5, 12): 3 + 6 + 2, (5, 0): 3 + 3, (0, 0): 0}.items():
        time = seconds(arithmetic, 1, own=own, common=common)
        assert time.compute == pytest.approx(passes * a_pass / ARITHMETIC)
    assert seconds(arithmetic, 1, "evaluation.mean_model=false").compute == pytest.approx(9 * a_pass / ARITHMETIC)
    two = seconds(card, 2)  # own: 2 passes of each of two ranks; common: 3; mean model: 1
    assert two.zero3 == pytest.approx(6 * 4 * parameters / 2 / LINK)
    averaged = 2 * 2 / 3 * 4 * parameters  # n = 3
    assert two.gossip == pytest.approx(averaged / 2 / LINK)
    assert seconds(card, 2, net=4.0).gossip == pytest.approx(averaged / 2 / LINK + averaged / 4 / LINK)
