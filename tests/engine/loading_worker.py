"""Loads models, scores each, descends in every block, and saves its shards as they came; writes what it found.

Holds the loss by chunks of positions, and its gradients, to those of all logits; with "random", compares random weights
of the same architecture with those that are drawn without ZeRO-3.

Usage: loading_worker.py JSON, a list of {"folder": a Hugging Face model, "options": [key=value, ...], "random": bool};
the shards go to FOLDER/run-RANKS/model, and a line of JSON for each model to the file that FOUND names (environment).
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny_models import rows
from transformers import AutoModelForCausalLM

from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.write_shards import save_shards
from deca_ds.config import load_config
from deca_ds.engine import chunked_loss
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_model
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.engine.state import model_pieces
from deca_ds.errors import UserError
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import Cluster, connect
from deca_ds.training.checkpoints import slice_groups
from deca_ds.watchdog.guard import guarded

POSITIONS = 5  # that have logits together, where chunks are small


@contextmanager
def small_chunks(client: Client) -> Iterator[list[int]]:
    """The loss goes by chunks of few positions; yields a list that has an entry for every call of the head."""
    head = client.model.get_output_embeddings()
    usual = chunked_loss.LOGITS_BYTES
    calls: list[int] = []
    hook = head.register_forward_hook(lambda *_: calls.append(1))
    chunked_loss.LOGITS_BYTES = 4 * POSITIONS * head.weight.ds_shape[0]
    yield calls
    chunked_loss.LOGITS_BYTES = usual
    hook.remove()


def compare_random(cluster: Cluster, folder: Path, options: list[str]) -> None:
    config = load_config(None, [*options, f"model.path={folder}", "model.init=random", "model.dtype=bfloat16"])
    client = Client(config, load_model(config, load_architecture(config.model)), cluster.device)
    with nothing_drawn():
        plain = AutoModelForCausalLM.from_config(load_architecture(config.model), dtype=torch.float32)
    draw_weights(plain, config.run.seed)
    for name, start, stop, values in client.shards(list(client.shapes)):
        assert torch.equal(values, plain.get_parameter(name).detach().flatten()[start:stop].bfloat16()), name


def look(cluster: Cluster, folder: Path, options: list[str]) -> dict:
    config = load_config(None, options)
    model = load_model(config, load_architecture(config.model))
    client = Client(config, model, cluster.device)
    batch = rows(cluster.shard, cluster.ranks)
    client.check_loss(batch)
    losses, _, counts = client.score(batch)
    client.end_scoring()
    found = {
        "score": client.client_sum(float(losses.sum())) / client.client_sum(float(counts.sum())),
        "blocks": [],
        "frozen": client.plan.frozen,
    }
    before = {name: shard.clone() for name, _, _, shard in client.shards(list(client.shapes))}
    for index, block in enumerate(client.plan.blocks):
        state = client.open_block(index, ())
        stats = client.gradient([batch])
        if index in (0, len(client.plan.blocks) - 1) and config.model.dtype == "float32":
            gradient, score = state.grad.clone(), client.score(batch)[0]
            with small_chunks(client) as calls:
                chunked = client.gradient([batch])
                assert torch.allclose(client.score(batch)[0], score, rtol=1e-6), block.names
            client.end_scoring()
            assert len(calls) == 2, calls  # one gather for all chunks, each time
            assert math.isclose(chunked.loss, stats.loss, rel_tol=1e-6), block.names
            assert torch.allclose(state.grad, gradient, rtol=1e-5, atol=1e-6), block.names
        state.theta.sub_(state.grad, alpha=0.01)
        client.write_back()
        client.close_block()
        found["blocks"].append({"names": block.names, "loss": stats.loss, "norm": stats.norm})
    for name, shard in before.items():
        client.set_master(name, shard)
    for index in range(len(client.plan.blocks)):  # a learning rate of 0
        client.open_block(index, ())
        client.write_back()
        client.close_block()
    run = folder / f"run-{cluster.ranks}"
    save_shards(
        run / "model",
        slice_groups(model_pieces(client), cluster),
        Part(0, cluster.shard, cluster.ranks),
        clients=1,
        step=0,
    )
    if cluster.is_job_leader:
        client.model.config.save_pretrained(run / "hf")
        (run / "DONE").touch()
    return found


def main() -> None:
    wanted = json.loads(next(argument for argument in sys.argv[1:] if argument.startswith("[")))
    common = ["run.device=cpu", "run.threads=1", "blocks.layers_per_block=1", "data.batch_size=6"]
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store):
        cluster = connect(load_config(None, [*common, "data.micro_batch_size=1", "model.path=x"]), launch, store)
        common += [f"data.micro_batch_size={6 // cluster.ranks}"]
        for one in wanted:
            folder = Path(one["folder"])
            try:
                found = look(cluster, folder, [*common, f"model.path={folder}", *one["options"]])
            except UserError as error:  # the same on all ranks, or the job hangs until its deadline
                found = {"refused": str(error)}
            else:
                if one["random"]:
                    compare_random(cluster, folder, common)
            if cluster.is_job_leader:
                with open(os.environ["FOUND"], "a") as file:
                    file.write(json.dumps(found) + "\n")


main()
