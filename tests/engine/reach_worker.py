"""Trains a model of which parts run for some tokens only, block by block; prints what became of it.

Usage: reach_worker.py OUTPUT (a file of tensors, written by rank 0)
"""

import sys
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from deca_ds.algorithm.deca import DecaRule
from deca_ds.config import load_config
from deca_ds.engine import client as engine
from deca_ds.engine import internals
from deca_ds.engine.load import zero3_config
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.watchdog.guard import guarded

WIDTH, WORDS, EXPERTS, STEPS, LR, DECAY = 12, 40, 4, 5, 0.01, 0.1


class Experts(nn.Module):
    """Expert t % 4 sees token t; one that sees none does not run."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, hidden, ids):
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (ids % EXPERTS == number).nonzero(as_tuple=True)
            if len(chosen[0]):
                out = out.index_put(chosen, expert(hidden[chosen]).tanh())
        return out


class Layer(nn.Module):
    """unused never runs."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH, bias=False)
        self.before = nn.Linear(WIDTH, WIDTH)
        self.moe = Experts()
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, ids):
        hidden = hidden + self.before(hidden).tanh()
        hidden = hidden + self.moe(hidden, ids)
        return hidden + self.after(hidden).tanh()


class Model(nn.Module):
    """A causal language model as far as training needs one."""

    config = PretrainedConfig()

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.tower = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, input_ids)
        return SimpleNamespace(logits=self.head(hidden))


def rows(step: int) -> torch.Tensor:
    """The batch of one step, [4, 8]. Each row has tokens for one expert: the first half of the rows other ones than the
    second, so that two ranks run different experts; expert 3 runs from step 2 on, expert 2 at every other step."""
    draw = torch.Generator().manual_seed(step)
    experts = [0, 0, 1, 2 if step % 2 else 1] if step < 2 else [0, 3, 1, 2 if step % 2 else 0]
    drawn = [torch.randint(0, WORDS // EXPERTS, (8,), generator=draw) * EXPERTS + e for e in experts]
    return torch.stack(drawn)


def train(client: engine.Client, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    from deca_ds.algorithm.local import local_step

    found, rule, step = {}, DecaRule(signal="none"), 0
    for index in range(len(client.plan.blocks)):
        state = client.open_block(index, rule.buffers)
        for _ in range(STEPS):
            ids = rows(step)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
            batches = [{"input_ids": row[None], "labels": row[None], "attention_mask": torch.ones_like(row[None])}
                       for row in ids]  # fmt: skip
            stats = client.gradient(batches)
            found[f"norm {step}"] = torch.tensor(stats.norm)
            runs = state.local_steps.next(state.reached)
            local_step(rule, state.tensors, runs, slice(0, state.theta.numel()), lr=LR, weight_decay=DECAY)
            rule.stay(state.tensors)
            client.write_back()
            step += 1
        found[f"never {index}"] = torch.tensor([len(state.never_reached)])
        client.close_block()
    for name, start, stop, values in client.shards(list(client.shapes)):
        whole = torch.zeros(client.shapes[name]).flatten()
        whole[start:stop] = values
        dist.all_reduce(whole)
        found[name] = whole.view(client.shapes[name])
    return found


def main() -> None:
    options = ["run.device=cpu", "run.threads=1", "blocks.layers_per_block=2", "model.path=x", "data.batch_size=4"]
    config = load_config(None, [*options, "data.micro_batch_size=1"])
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store):
        cluster = connect(config, launch, store)
        internals.start()
        torch.manual_seed(0)
        engine.BUCKET_NUMEL = 10  # a bucket for each parameter
        with deepspeed.zero.Init(config_dict_or_path=zero3_config(config)):
            model = Model()
        deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        found = train(engine.Client(config, model, cluster.device), cluster.shard, cluster.ranks)
        if cluster.is_job_leader:
            save_file(found, sys.argv[1])


if __name__ == "__main__":
    main()
