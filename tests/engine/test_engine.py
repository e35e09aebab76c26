"""One client's engine in real processes: gradients against a dense model, block switches, written shards."""

import json
import math
from pathlib import Path

import pytest
import torch
from jobs import launch
from transformers import AutoModelForCausalLM

WORKER = "tests/engine/engine_worker.py"
pytestmark = pytest.mark.multiprocess


def measure(ranks: int, model: Path, found: Path, *overrides: str) -> dict:
    arguments = [f"model.path={model}", *overrides]
    finished = launch("hand" if ranks > 1 else "python", ranks, arguments, script=WORKER, FOUND=str(found))
    assert finished.code == 0, finished.output[-3000:]
    return json.loads(found.read_text())


@pytest.fixture(scope="module")
def dense(tiny_model):
    """Loss, and gradient norm and sum of every block, of the whole model in this process, in float64."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 44, (6, 9), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    blocks: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        key = name.split(".")[2] if ".layers." in name else ("0-embed" if "embed" in name else "9-head")
        blocks.setdefault(key, []).append(parameter.grad.double())
    order = ["0-embed", "0", "1", "2", "9-head"]
    norms = [math.sqrt(sum(float((g * g).sum()) for g in blocks[key])) for key in order]
    sums = [sum(float(g.sum()) for g in blocks[key]) for key in order]
    return loss.item(), norms, sums


@pytest.mark.parametrize(("ranks", "checkpointing"), [(1, False), (2, True), (3, False)])
def test_gradients_clipping_and_block_switches_equal_a_dense_model_on_any_number_of_ranks(
    tiny_model, dense, tmp_path, ranks, checkpointing
):
    overrides = ["data.micro_batch_size=1", "data.batch_size=12", f"model.gradient_checkpointing={checkpointing}"]
    overrides.append("deepspeed=ds_configs/zero3_lean.json")
    found = measure(ranks, tiny_model, tmp_path / "found.json", *overrides)
    loss, norms, sums = dense
    assert found["losses"] == pytest.approx([loss] * 10, rel=1e-5)
    assert found["norms"] == pytest.approx([norm for norm in norms for _ in range(2)], rel=1e-4)
    for found_sum, expected, norm in zip(found["gradient_sums"], sums, norms, strict=True):
        # of at most 7,000 elements: off by up to the root of that times what their norm is off by, 1e-5 of itself
        assert found_sum == pytest.approx(expected, rel=0, abs=1e-3 * norm)
    assert found["clipped"] == pytest.approx([0.5] * 5, rel=1e-4)
    if ranks == 1:
        # shards are whole parameters, and the model is an ordinary one
        assert found["left_gathered"] == 5 * found["parameters"]
        assert found["hooks"] == 0
        assert found["unlike_plain"] == []
    else:
        assert found["left_gathered"] == 0
        # with nothing prefetched and nothing kept for later, one parameter is whole at a time
        assert found["gathered_in_backward"] <= 2
    assert found["follow_writes"] == [True, True, True]
    assert found["uniform_loss"] == pytest.approx(1.0, rel=1e-5)
    assert found["restored"] == 0.0
    assert found["covered"] == found["elements"]
    # layer 1 is active: its input and those below need no gradient
    assert found["layers_in_backward"] == [False, False, True]
    assert found["tensors_grown"] <= 5
    assert found["rss_grown"] < 20 * 2**20
