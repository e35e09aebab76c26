"""Trains and scores a model of which one layer runs other modules where a rare token is; rank 1 of two has that once.

Usage: choosing_worker.py WHAT=WHEN. WHAT: other (a module instead of the usual one), without (a module less),
plain (one without parameters more). WHEN: the number of the pass; passes 0 to 3 train, passes 4 to 7 score.
"""

import sys

import deepspeed
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from deca_ds.config import load_config
from deca_ds.engine import internals
from deca_ds.engine.client import Client
from deca_ds.engine.load import zero3_config
from deca_ds.launch import ClientLayout, read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.watchdog.guard import guarded

WORDS, RARE = 44, 43
what, _, when = sys.argv[1].partition("=")


class Choosing(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.usual, self.other, self.plain = LlamaMLP(config), LlamaMLP(config), nn.Identity()
        self.rare = False

    def forward(self, hidden):
        if not self.rare:
            return self.usual(hidden)
        if what == "without":
            return hidden
        return self.other(hidden) if what == "other" else self.usual(self.plain(hidden))


class Model(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp = Choosing(config)

    def forward(self, input_ids, **options):
        self.model.layers[1].mlp.rare = bool((input_ids == RARE).any())
        return super().forward(input_ids=input_ids, **options)


def batch(rank: int, number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, RARE, (1, 9), generator=torch.Generator().manual_seed(2 * number + rank))
    if rank == 1 and number == int(when):
        ids[0, 4] = RARE
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def main() -> None:
    options = ["run.device=cpu", "run.threads=1", "blocks.layers_per_block=1", "model.path=x", "data.batch_size=2"]
    config = load_config(None, [*options, "data.micro_batch_size=1"])
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store) as guard:
        cluster = connect(config, launch, store, guard.progress)
        guard.progress.watch(ClientLayout(1, 2), 60.0)
        internals.start()
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
        sizes |= dict(num_key_value_heads=2, attention_dropout=0.1)
        with deepspeed.zero.Init(config_dict_or_path=zero3_config(config)):
            model = Model(LlamaConfig(vocab_size=WORDS, **sizes))
        client = Client(config, model, cluster.device)
        before = torch.get_rng_state()
        client.check_loss(batch(0, 8), [batch(1, 9)])  # the rows that are tried do not show it
        assert torch.equal(torch.get_rng_state(), before), "dropout is drawn as without the check"
        client.open_block(3, ())
        for number in range(8):
            guard.progress.enter("a pass", step=number, works=True)
            if number < 4:
                client.gradient([batch(cluster.shard, number)])
            else:
                client.score(batch(cluster.shard, number))
                client.end_scoring()
            if cluster.shard == 1:
                print(f"pass {number} is done", flush=True)


if __name__ == "__main__":
    main()
