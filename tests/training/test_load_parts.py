"""What one rank of a host does for the others: threads stand for ranks."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore
from transformers import AutoModelForCausalLM, MixtralConfig

from deca_ds.algorithm import split_into_blocks
from deca_ds.config.data import DataConfig
from deca_ds.config.schema import Config, ModelConfig
from deca_ds.engine.tokenizer import load_tokenizer
from deca_ds.errors import DataError
from deca_ds.launch import Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.training import load as module
from deca_ds.training.load import first_of_host, load_shared


@pytest.fixture
def hosts(monkeypatch):
    """The name of a machine is that of its host."""
    monkeypatch.setattr(module, "machine", lambda host: host)


def on_ranks(hosts, action):
    """What action(rank, host) returns or raises on each rank."""
    with ThreadPoolExecutor(len(hosts)) as threads:
        running = [threads.submit(action, rank, host) for rank, host in enumerate(hosts)]
        return [one.exception(60) or one.result() for one in running]


def test_the_first_rank_of_a_host_downloads_first(hosts, tmp_path):
    names = ["a", "a", "b", "a", "b"]
    order, store = [], HashStore()

    def enter(paths):
        def action(rank, host):
            class Here(Launch):
                host = names[rank]

            job = JobStore(store, None, timedelta(seconds=60), Progress())
            with first_of_host(ModelConfig(path=paths[rank]), Here("x", rank, len(names), None, None), job, range(5)):
                order.append(rank)

        assert on_ranks(names, action) == [None] * 5

    enter(["owner/name"] * 5)
    assert set(order[:2]) == {0, 2} and set(order) == set(range(5))
    store = HashStore()
    enter([str(tmp_path)] * 4 + ["owner/name"])  # one host has no folder of the model: all do the same
    assert set(order[5:7]) == {0, 2}


def words(path, text="w1"):
    path.write_text("".join(json.dumps({"text": f"{text} w{i} w3"}) + "\n" for i in range(20)))
    return str(path)


def test_one_rank_a_host_prepares_and_all_have_the_same(hosts, tiny_model, tmp_path, monkeypatch):
    names, barrier, gathered, prepared = ["a", "a", "b"], threading.Barrier(3), [None] * 3, []
    original = module.prepare_client_data

    def prepare(config, *rest):
        prepared.append(config.data.cache)
        return original(config, *rest)

    monkeypatch.setattr(module, "prepare_client_data", prepare)
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))

    def load(trains):
        def action(rank, host):
            def gather(value):
                barrier.wait(60)
                gathered[rank] = value
                barrier.wait(60)
                return list(gathered)

            launch = SimpleNamespace(host=host)
            cluster = SimpleNamespace(client=0, shard=rank, launch=launch, progress=Progress(), is_job_leader=rank == 0)
            cluster.gather_in_client = gather
            config = Config(data=DataConfig(train=[trains[rank]], cache=str(tmp_path / f"cache_{host}")))
            return load_shared(config, tokenizer, cluster)

        return on_ranks(names, action)

    same, other = words(tmp_path / "same.jsonl"), words(tmp_path / "other.jsonl", "w2")
    first, *others = load([same] * 3)
    assert sorted(prepared) == [str(tmp_path / "cache_a"), str(tmp_path / "cache_b")]
    assert all(one.train.to_dict() == first.train.to_dict() and one.summary == first.summary for one in others)
    for error in load([same, same, other]):
        assert isinstance(error, DataError) and "client 0 has other data on b than on a" in str(error)


@pytest.mark.parametrize(
    ("leads", "checkpointing", "warns"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_mixture_of_experts_is_told_at_the_start_that_it_needs_checkpointing(
    leads, checkpointing, warns, monkeypatch, capsys
):
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=2))
    plan = split_into_blocks(model, layers_per_block=1, outside="own")
    monkeypatch.setattr(module, "load_model", lambda config, architecture: model)
    monkeypatch.setattr(module, "Client", lambda config, model, device: SimpleNamespace(model=model, plan=plan))
    cluster = SimpleNamespace(progress=Progress(), launch=SimpleNamespace(rank=0), device=None, is_job_leader=leads)
    config = Config(model=ModelConfig(path="none", gradient_checkpointing=checkpointing))
    module.load_client(SimpleNamespace(config=config, cluster=cluster), model.config)
    said = " ".join(capsys.readouterr().err.split())
    assert ("without model.gradient_checkpointing=true, fused experts (" in said) == warns
