"""Loads saved models of several architectures one after the other; prints loss and gradient norm of every block.

Compares random weights of the same architectures with those that are drawn without ZeRO-3.

Usage: architecture_worker.py FOLDER ... (each a Hugging Face model)
"""

import json
import sys

import torch
from engine_worker import batch_of
from transformers import AutoModelForCausalLM

from deca_ds.cluster import connect, read_launch
from deca_ds.cluster.guard import guarded
from deca_ds.cluster.store import open_job_store
from deca_ds.config import load_config
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_architecture, load_model
from deca_ds.engine.random_weights import draw_weights, nothing_drawn


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
            if cluster.is_main:
                print("FOUND " + json.dumps(blocks), flush=True)


main()
