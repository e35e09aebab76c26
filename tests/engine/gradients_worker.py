"""Counts what lives of gradients and buckets at every hook of a backward pass; writes it and what the gradients are.

The block's layers declare their modules in the reverse of the order in which they use them. Usage: gradients_worker.py;
the environment's FOUND names the file, of lines of JSON.
"""

import json
import math
import os
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from deca_ds.config import load_config
from deca_ds.engine import client as engine
from deca_ds.engine import internals
from deca_ds.engine.load import zero3_config
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.watchdog.guard import guarded

WIDTH, WIDE, WORDS, EXPERTS, LAYERS, BUCKET = 16, 64, 40, 4, 3, 300  # BUCKET: elements


class Experts(nn.Module):
    """A leaf: an expert without tokens on a rank does not run there. One of two matrices is fused."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDE) / 4)
        self.down_proj = nn.ModuleList(nn.Linear(WIDE, WIDTH) for _ in range(EXPERTS))

    def forward(self, hidden, ids):
        out = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            chosen = (ids % EXPERTS == expert).nonzero(as_tuple=True)
            if len(chosen[0]):
                inner = (hidden[chosen] @ self.gate_up_proj[expert]).tanh()
                out = out.index_put(chosen, self.down_proj[expert](inner))
        return out


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.experts = Experts()
        self.norm_3 = nn.LayerNorm(WIDTH)
        self.after = nn.Linear(WIDE, WIDTH, bias=False)
        self.before = nn.Linear(WIDTH, WIDE)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.norm_1 = nn.LayerNorm(WIDTH)

    def forward(self, hidden, ids):
        normed = self.norm_1(hidden)
        hidden = hidden + self.o(self.q(normed).tanh() * self.v(normed))
        hidden = hidden + self.after(self.before(self.norm_2(hidden)).tanh())
        return hidden + self.scale * self.experts(self.norm_3(hidden), ids)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDE)
        self.down = nn.Linear(WIDE, WIDTH)

    def forward(self, hidden, ids):
        return self.down(self.up(hidden))


class Model(nn.Module):
    """Blocks of LAYERS: the first one is trained, the second one is above it."""

    config = PretrainedConfig()

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([*(Layer() for _ in range(LAYERS)), *(Frozen() for _ in range(LAYERS))])
        self.head = nn.Linear(WIDTH, WORDS)
        self.checkpointing, self.saved = False, []

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            if number == LAYERS:
                with torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t):
                    for above in self.layers[LAYERS:]:
                        hidden = above(hidden, input_ids)
                break
            keywords = {"use_reentrant": False}
            hidden = (
                checkpoint(layer, hidden, input_ids, **keywords) if self.checkpointing else layer(hidden, input_ids)
            )
        return SimpleNamespace(logits=self.head(hidden))

    def _note(self, tensor):
        self.saved.append({2: "weight", 1: "bias"}[len(tensor.ds_shape)] if hasattr(tensor, "ds_shape") else "input")
        return tensor


def rows(rank: int) -> torch.Tensor:
    """[2, 8]: the first rank has tokens for experts 0 and 1, the second for 2 and 3."""
    draw = torch.Generator().manual_seed(rank)
    experts = torch.randint(0, 2, (2, 8), generator=draw) + 2 * rank
    return torch.randint(0, WORDS // EXPERTS, (2, 8), generator=draw) * EXPERTS + experts


def batch_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


class Watch:
    """Bytes of the block's gradients and of buckets that live, at every gradient's hook."""

    def __init__(self, client: engine.Client):
        self.client, self.alive = client, []
        self.most = {when: {"all": 0, "outside leaves": 0} for when in ("in", "after")}
        self.sent, self.sent_at_last_hook, self._send = [], 0, dist.reduce_scatter_tensor

    def __enter__(self):
        dist.reduce_scatter_tensor = self.reduce_scatter
        return self

    def __exit__(self, *_):
        dist.reduce_scatter_tensor = self._send

    def reduce_scatter(self, output, rows, **options):
        self._note(rows, False)
        self.sent.append(rows.nbytes)
        return self._send(output, rows, **options)

    def _note(self, tensor, in_leaf):
        storage = tensor.untyped_storage()
        self.alive.append((StorageWeakRef(storage), storage.nbytes(), in_leaf))

    def look(self, when):
        self.alive = [each for each in self.alive if not each[0].expired()]
        filling = self.client._reducer._buckets._filling
        buckets = 0 if filling is None else filling.rows.nbytes
        most, sizes = self.most[when], [(size, in_leaf) for _, size, in_leaf in self.alive]
        most["all"] = max(most["all"], buckets + sum(size for size, _ in sizes))
        most["outside leaves"] = max(
            most["outside leaves"], buckets + sum(size for size, in_leaf in sizes if not in_leaf)
        )

    def before(self, parameter):
        self._note(parameter.grad, internals.leaf(parameter) is not None)
        self.look("in")

    def after(self, parameter):
        self.look("after")
        self.sent_at_last_hook = len(self.sent)


def measure(client: engine.Client, dense: Model, rank: int, checkpointing: bool) -> dict:
    client.model.checkpointing = checkpointing
    names = client.plan.blocks[1].names
    assert all(name.split(".")[1] in "012" for name in names)
    with Watch(client) as watch:
        parameters = [client.model.get_parameter(name) for name in names]
        early = [p.requires_grad_(True).register_post_accumulate_grad_hook(watch.before) for p in parameters]
        state = client.open_block(1, ())
        late = [p.register_post_accumulate_grad_hook(watch.after) for p in parameters]
        client.model.saved = []
        client.gradient([batch_of(rows(rank))])
        sent, saved = list(watch.sent), list(client.model.saved)
        for hook in early + late:
            hook.remove()
    grad = state.grad.clone()
    client.gradient([batch_of(rows(rank))])
    again = [] if torch.equal(grad, state.grad) else ["block"]

    dense.zero_grad()
    ids = torch.cat([rows(0), rows(1)])
    logits = dense(ids).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    wrong = []
    for name, start, stop, parts in client.block_shards():
        expected = dense.get_parameter(name).grad
        expected = torch.zeros(math.prod(client.shapes[name])) if expected is None else expected.flatten()
        if not torch.allclose(parts["grad"], expected[start:stop], rtol=1e-4, atol=1e-6):
            wrong.append(name)
    client.close_block()
    sizes = [math.prod(client.shapes[name]) for name in names]
    return {
        "checkpointing": checkpointing,
        "bucket_bytes": 4 * BUCKET,
        "largest_bytes": 4 * max(sizes),
        "small_bytes": 4 * sum(size for size in sizes if size <= WIDE),
        "leaf_bytes": 4 * sum(size for name, size in zip(names, sizes, strict=True) if "0.experts" in name),
        "at_the_end_bytes": 4 * sum(s for n, s in zip(names, sizes, strict=True) if "unused" in n or "scale" in n),
        "wrong": wrong,
        "again": again,
        "buckets": len(sent),
        "bucket_sizes": sent,
        "bytes_in_hooks": watch.most["in"],
        "bytes_after_hooks": watch.most["after"],
        "sent_before_the_last_hook": watch.sent_at_last_hook,
        "saved_by_frozen": saved,
    }


def left_at_the_end(client: engine.Client) -> list[bool]:
    """Whether the gradient of a block that is one matrix is still there, at each of its buckets."""
    left, known, send = [], [], dist.reduce_scatter_tensor

    def reduce_scatter(output, rows, **options):
        left.append(not known[0].expired())
        return send(output, rows, **options)

    (name,) = client.plan.blocks[0].names
    matrix = client.model.get_parameter(name)
    note = matrix.requires_grad_(True).register_post_accumulate_grad_hook(
        lambda p: known.append(StorageWeakRef(p.grad.untyped_storage()))
    )
    dist.reduce_scatter_tensor = reduce_scatter
    try:
        client.open_block(0, ())
        client.gradient([batch_of(rows(0))])
    finally:
        dist.reduce_scatter_tensor = send
        note.remove()
    client.close_block()
    return left


def main() -> None:
    options = ["run.device=cpu", "run.threads=1", f"blocks.layers_per_block={LAYERS}", "model.path=x"]
    config = load_config(None, [*options, "data.batch_size=4", "data.micro_batch_size=2"])
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store):
        cluster = connect(config, launch, store)
        torch.manual_seed(0)
        dense = Model()
        internals.start()
        torch.manual_seed(0)
        engine.BUCKET_NUMEL = BUCKET
        with deepspeed.zero.Init(config_dict_or_path=zero3_config(config)):
            model = Model()
        for name, values in dense.named_parameters():
            internals.overwrite(model.get_parameter(name), values.detach())
        deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        client = engine.Client(config, model, cluster.device)
        for checkpointing in (False, True):
            found = measure(client, dense, cluster.shard, checkpointing)
            if cluster.is_job_leader:
                with open(os.environ["FOUND"], "a") as file:
                    file.write(json.dumps(found) + "\n")
        left = left_at_the_end(client)
        if cluster.is_job_leader:
            with open(os.environ["FOUND"], "a") as file:
                file.write(json.dumps({"left": left}) + "\n")


if __name__ == "__main__":
    main()
