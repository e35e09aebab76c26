import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from deca_ds.engine.losses import RowScores
from deca_ds.engine.masters import join
from deca_ds.launch.launcher import ClientLayout
from deca_ds.training import evaluation
from deca_ds.training.evaluation import average, class_scores, empty_totals, overwrite_with_mean, summarize, take_in
from deca_ds.transport.local import LocalNetwork


@pytest.mark.parametrize("answers", [True, False])
def test_language_scores_are_per_token_and_answers_match_whole(answers):
    dataset = Dataset.from_dict({"input_ids": [[1], [2], [3], [4]], "labels": [[1], [2], [3], [4]]})
    totals = torch.tensor([[6.0, 2, 3], [2.0, 1, 1], [1.5, 0, 1], [0.5, 5, 5]], dtype=torch.float64)
    scores = summarize(totals, dataset, SimpleNamespace(label_names=[], answers=answers))
    wanted = {"loss": 1.0, "perplexity": pytest.approx(math.e), "examples": 4, "token_accuracy": 0.8}
    assert scores == (wanted | {"exact_match": 0.5} if answers else wanted)


def test_rows_that_fill_up_a_batch_are_not_taken_in():
    totals = empty_totals(3)
    each = torch.tensor([5.0, 6.0, 7.0])
    take_in(totals, torch.tensor([2, -1, 0]), RowScores(each, each.int() + 10, each.int() + 20))
    assert totals.tolist() == [[7, 17, 27], [0, 0, 0], [5, 15, 25]]


def test_every_batch_that_is_scored_is_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(evaluation.dist, "all_reduce", lambda tensor: None)
    ids = [[1, 2]] * 5
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1, 1]] * 5, "labels": ids})
    data = SimpleNamespace(own_evaluation=dataset, common_evaluation=None, label_names=[], answers=False)
    moved, scored = [], []

    def score(batch):
        scored.append(len(moved))
        ones = torch.ones(len(batch["row"]), dtype=torch.int64)
        return RowScores(ones.double(), ones, ones)

    client = SimpleNamespace(device=torch.device("cpu"), score=score, end_scoring=lambda: None)
    progress = SimpleNamespace(tick=lambda: moved.append(None))
    here = SimpleNamespace(client=0, shard=0, ranks=1, progress=progress)
    transport = SimpleNamespace(epoch=0)
    scores = evaluation.Evaluator(client, here, transport, None, data, 2, 0, mean_model=False).evaluate()
    assert scores["own"]["examples"] == 5 and scored == [1, 2, 3], "a tick before each of three batches"


def test_the_likeliest_label_is_the_one_that_is_scored():
    """Three examples, two labels; rows in any order. Example 2 is scored wrong."""
    rows = [(0, 0, 0, 1.0), (1, 1, 1, 0.5), (0, 1, 0, 2.0), (2, 0, 1, 0.25), (1, 0, 1, 0.75), (2, 1, 1, 3.0)]
    dataset = Dataset.from_dict(
        {
            "example": [row[0] for row in rows],
            "candidate": [row[1] for row in rows],
            "label": [row[2] for row in rows],
        }
    )
    totals = torch.tensor([[row[3], 0, 1] for row in rows], dtype=torch.float64)
    scores = summarize(totals, dataset, SimpleNamespace(label_names=["red", "blue"], answers=True))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["recall"] == {"red": 1.0, "blue": 0.5}
    assert scores["confusion"] == [["red", "red", 1], ["blue", "red", 1], ["blue", "blue", 1]]
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["loss"] == pytest.approx((1.0 + 0.5 + 3.0) / 3), "only the right answers count"
    assert scores["examples"] == 3 and "exact_match" not in scores


def test_private_sets_are_pooled_by_size():
    pooled = average(
        [{"loss": 1.0, "examples": 1, "accuracy": 0.0}, None, {"loss": 3.0, "examples": 3, "accuracy": 1.0}]
    )
    assert pooled["loss"] == 2.5 and pooled["accuracy"] == 0.75 and pooled["examples"] == 4
    assert "macro_f1" not in pooled
    assert average(
        [{"loss": 1.0, "examples": 1, "exact_match": 1.0}, {"loss": 2.0, "examples": 3, "exact_match": 0.0}]
    )["exact_match"] == pytest.approx(0.25)
    assert average([None, None]) == {}


@pytest.mark.parametrize("seed", range(5))
def test_class_scores_equal_those_of_scikit_learn(seed):
    """Classes that do not occur, and classes that nobody answers, are among them."""
    from sklearn import metrics  # here, as every worker imports this file

    random = np.random.default_rng(seed)
    names = [f"class {index}" for index in range(6)]
    truth, predicted = random.choice([0, 1, 3, 4], 30), random.choice([0, 2, 3, 5], 30)
    scores = class_scores(truth, predicted, names)
    present = sorted(set(truth))
    recall = metrics.recall_score(truth, predicted, labels=present, average=None, zero_division=0)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(
        metrics.f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    )
    assert scores["recall"] == pytest.approx({names[k]: value for k, value in zip(present, recall, strict=True)})
    counts = metrics.confusion_matrix(truth, predicted, labels=range(6))
    assert scores["confusion"] == [[names[i], names[j], counts[i, j]] for i, j in np.argwhere(counts)]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)])
def test_the_mean_model_is_made_in_pieces(sizes, monkeypatch):
    """Of parameters of many pieces, of one element and of none on a rank: the right mean, in few pieces at a time."""
    piece, numels = 12, [101, 1, 30]
    monkeypatch.setattr("deca_ds.transport.collectives.REDUCE_PIECE", piece)
    layout, clients = ClientLayout.of(sizes), len(sizes)
    network = LocalNetwork(sizes, 30)
    draw = torch.Generator().manual_seed(0)
    whole = [[torch.randn(numel, generator=draw) for numel in numels] for _ in sizes]
    most, squared, shards = [0] * sum(sizes), [0.0] * sum(sizes), [[] for _ in range(sum(sizes))]

    def body(rank: int) -> None:
        client, shard = layout.client_of(rank), layout.shard_of(rank)
        transport = network.transport(rank)
        living: list[weakref.ref] = []

        def held(numel: int) -> slice:
            size = -(-numel // sizes[client])
            return slice(min(shard * size, numel), min((shard + 1) * size, numel))

        def masters(values: torch.Tensor, elements: slice) -> torch.Tensor:
            made = join(values[elements], None)
            assert made.numel() <= piece
            living.append(weakref.ref(made))
            living[:] = [ref for ref in living if ref() is not None]
            most[rank] = max(most[rank], len(living))
            return made

        own = [x[held(x.numel())].clone() for x in whole[client]]
        shards[rank] = [torch.zeros_like(values) for values in own]
        parts = [
            (target, lambda elements, values=values: masters(values, elements))
            for target, values in zip(shards[rank], own, strict=True)
        ]
        squared[rank], _ = overwrite_with_mean(parts, numels, transport, clients)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(sum(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    means = []
    for parameter in range(len(numels)):
        total = torch.zeros(numels[parameter])
        for values in whole:
            total += values[parameter]  # in the order of the clients: the same bits
        means.append(total / clients)
    for client in range(clients):
        ranks = layout.ranks_of(client)
        for parameter, mean in enumerate(means):
            assert torch.equal(torch.cat([shards[rank][parameter] for rank in ranks]), mean)
        distance = sum(float((x - mean).double().square().sum()) for x, mean in zip(whole[client], means, strict=True))
        assert sum(squared[rank] for rank in ranks) == pytest.approx(distance, rel=1e-6)
    assert max(most) <= 4  # three that travel and the one that is compared with its mean


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("other", [None, 0, 50, 100])
def test_models_that_are_equal_are_told_from_those_that_are_not(sizes, other, monkeypatch):
    """Their mean is not what they are: three times a float32, divided by three, need not be the same."""
    monkeypatch.setattr("deca_ds.transport.collectives.REDUCE_PIECE", 12)
    layout, network, numel = ClientLayout.of(sizes), LocalNetwork(sizes, 30), 101
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    assert not torch.equal((whole + whole + whole) / 3, whole)

    def body(rank: int) -> tuple[float, int]:
        client, shard = layout.client_of(rank), layout.shard_of(rank)
        own = whole.clone()
        if other is not None and client == 1:
            own[other] = own[other].nextafter(torch.tensor(9.0))
        size = -(-numel // sizes[client])
        own = own[shard * size : (shard + 1) * size]
        shards = [(torch.zeros_like(own), lambda elements: own[elements].clone())]
        return overwrite_with_mean(shards, [numel], network.transport(rank), 3)

    with ThreadPoolExecutor(sum(sizes)) as threads:
        found = list(threads.map(body, range(sum(sizes))))
    assert sum(squared for squared, _ in found) > 0
    assert (sum(differing for _, differing in found) > 0) == (other is not None)
