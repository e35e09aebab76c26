"""Loads models, scores each, descends in every block, and saves its shards as they came; prints what it found as JSON.

Usage: loading_worker.py JSON, a list of {"folder": a Hugging Face model, "options": [key=value, ...]}; the shards go to
FOLDER/run-RANKS/model.
"""

import json
import sys
from pathlib import Path

from tiny_models import rows

from deca_ds.checkpoint.slices import save_shards
from deca_ds.config import load_config
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_architecture, load_model
from deca_ds.errors import UserError
from deca_ds.launch import Cluster, connect, read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.training.checkpoints import model_slices
from deca_ds.watchdog.guard import guarded


def look(cluster: Cluster, folder: Path, options: list[str]) -> dict:
    config = load_config(None, options)
    model = load_model(config, load_architecture(config.model))
    client = Client(config, model, cluster.device)
    batch = rows(cluster.shard, cluster.ranks)
    client.check_loss(batch)
    losses, counts = client.score(batch)
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
        model_slices(client, cluster),
        client=0,
        clients=1,
        rank=cluster.shard,
        ranks=cluster.ranks,
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
            if cluster.is_job_leader:
                print("FOUND " + json.dumps(found), flush=True)


main()
