"""Times by hand."""

import re
from pathlib import Path

import pytest

from deca_ds.engine.chunked_loss import GPU_POSITIONS
from deca_ds.errors import ConfigError
from deca_ds.planning.roofline import (
    ARITHMETIC,
    GPUS,
    LINK,
    MEMORY,
    Gpu,
    Work,
    find_gpu,
    pass_flops,
    read_rate,
    step_time,
)

CARD = Gpu(memory=80, bf16=100.0, fp32=10.0, bandwidth=50.0, link=20.0, pcie=4.0)


def work(**changes) -> Work:
    nothing = dict(flops=0.0, moved=0.0, gathered=0.0, fetched=0.0, spans=False, messages=0.0, copied=0.0)
    return Work(**nothing | changes)


def test_compute_is_the_longer_of_arithmetic_and_memory():
    both = work(flops=100 * ARITHMETIC, moved=25 * MEMORY)
    assert step_time(both, CARD, None, "bfloat16").compute == pytest.approx(1)
    assert step_time(work(flops=100 * ARITHMETIC), CARD, None, "float32").compute == pytest.approx(10)
    assert step_time(work(flops=1.0, moved=100 * MEMORY), CARD, None, "bfloat16").compute == pytest.approx(2)


def test_gathering_counts_where_compute_does_not_hide_it():
    busy = dict(flops=300 * ARITHMETIC, gathered=40 * LINK)
    assert step_time(work(**busy), CARD, None, "bfloat16").zero3 == 0
    assert step_time(work(**busy, fetched=8 * LINK), CARD, None, "bfloat16").zero3 == pytest.approx(2 + 2 - 3)
    across = step_time(work(**busy, spans=True), CARD, 10.0, "bfloat16")
    assert across.zero3 == pytest.approx(4 - 3)


def test_messages_take_the_network_and_the_way_to_the_host():
    time = step_time(work(messages=10 * LINK, copied=2 * LINK), CARD, 5.0, "bfloat16")
    assert time.gossip == pytest.approx(2 + 0.5) and time.step == time.gossip
    assert step_time(work(messages=10.0, copied=2 * LINK), CARD, None, "bfloat16").gossip == pytest.approx(0.5)


def flops(**differing) -> float:
    given = {"above": 30, "block": 20, "attention": 0, "attention_above": 0, "tokens": 1, "again": False}
    return pass_flops(100, **given | differing)


def test_operations_count_forward_backward_and_recomputation():
    # 100 elements of matrices; 30 after the block, 20 in it: forward 2, gradients of activations 2, of weights 2
    assert flops(tokens=7) == 7 * (200 + 60 + 80)
    assert flops(attention=5, attention_above=2, again=True) == 200 + 5 + 60 + 80 + 4 + 100 + 2


def test_a_chunk_of_the_loss_has_enough_positions_to_keep_any_gpu_computing():
    """One of few positions would wait for the head's weight, of two bytes an element."""
    assert max(gpu.bf16 / gpu.bandwidth for gpu in GPUS.values()) < GPU_POSITIONS


def test_gpus_and_rates_are_found_by_name_and_unknown_ones_refused():
    assert find_gpu("rtx4090") == ("RTX4090", GPUS["RTX4090"])
    with pytest.raises(ConfigError, match="the plan does not know a GPU 'X1'"):
        find_gpu("X1")
    assert read_rate("10G") == 1.25e9 and read_rate("400Mbit/s") == 5e7
    for wrong in ("10", "fast", "0G", "10GB"):
        with pytest.raises(ConfigError, match="no rate"):
            read_rate(wrong)


def test_the_manual_names_the_sheet_of_every_rate() -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    named = {name: tuple(map(float, rates)) for name, *rates, sheet in rows if "*" in sheet}
    assert named == {name: (gpu.bf16 / 1e12, gpu.fp32 / 1e12, gpu.bandwidth / 1e9) for name, gpu in GPUS.items()}
