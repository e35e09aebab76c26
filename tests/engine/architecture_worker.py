"""Loads saved models of several architectures one after the other; prints loss and gradient norm of every block.

Holds the loss by chunks of positions, and its gradients, to those of all logits, and compares random weights of the
same architectures with those that are drawn without ZeRO-3.

Usage: architecture_worker.py FOLDER ... (each a Hugging Face model)
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from engine_worker import batch_of
from transformers import AutoModelForCausalLM

from deca_ds.config import load_config
from deca_ds.engine import chunked_loss
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_architecture, load_model
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.launch import connect, read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.watchdog.guard import guarded

POSITIONS = 5  # that have logits together, where the loss goes by chunks


@contextmanager
def by_chunks(client: Client) -> Iterator[list[int]]:
    """The loss goes by chunks; yields a list that has an entry for every call of the head."""
    head = client.model.get_output_embeddings()
    usual = chunked_loss.LOGITS_BYTES
    calls: list[int] = []
    hook = head.register_forward_hook(lambda *_: calls.append(1))
    chunked_loss.LOGITS_BYTES = 4 * POSITIONS * head.out_features
    yield calls
    chunked_loss.LOGITS_BYTES = usual
    hook.remove()


def main() -> None:
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    options = ["run.device=cpu", "blocks.layers_per_block=1", "data.micro_batch_size=3", "data.batch_size=6"]
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store):
        cluster = connect(load_config(None, [*options, "model.path=x"]), launch, store)
        batch = batch_of(cluster.shard, cluster.ranks)
        for folder in folders:
            config = load_config(None, [*options, f"model.path={folder}"])
            client = Client(config, load_model(config, load_architecture(config.model)), cluster.device)
            blocks = []
            for index, block in enumerate(client.plan.blocks):
                state = client.open_block(index, ("m", "v"))
                stats = client.gradient([batch])
                gradient, score = state.grad.clone(), client.score(batch)[0]
                with by_chunks(client) as calls:
                    chunked = client.gradient([batch])
                    assert torch.allclose(client.score(batch)[0], score, rtol=1e-6), block.names
                client.end_scoring()
                assert len(calls) == 2, calls  # one gather for all chunks, each time
                assert math.isclose(chunked.loss, stats.loss, rel_tol=1e-6), block.names
                assert torch.allclose(state.grad, gradient, rtol=1e-5, atol=1e-6), block.names
                state.theta.sub_(state.grad, alpha=0.01)
                client.write_back()
                client.close_block()
                blocks.append({"names": block.names, "loss": stats.loss, "norm": stats.norm})
            random = load_config(None, [*options, f"model.path={folder}", "model.init=random", "model.dtype=bfloat16"])
            client = Client(random, load_model(random, load_architecture(random.model)), cluster.device)
            with nothing_drawn():
                plain = AutoModelForCausalLM.from_config(load_architecture(random.model), dtype=torch.float32)
            draw_weights(plain, random.run.seed)
            for name, start, stop, values in client.shards(list(client.shapes)):
                assert torch.equal(values, plain.get_parameter(name).detach().flatten()[start:stop].bfloat16()), name
            if cluster.is_job_leader:
                print("FOUND " + json.dumps(blocks), flush=True)


main()
