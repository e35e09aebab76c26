"""Score a model on an evaluation set: loss and accuracy per token, exact matches of answers, and for classification
accuracy and macro-F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor

from deca_ds.algorithm import squared_norm
from deca_ds.data import ClientData, evaluation_batches
from deca_ds.engine.client import Client
from deca_ds.engine.losses import RowScores
from deca_ds.engine.masters import round_into
from deca_ds.launch.world import Cluster
from deca_ds.training.divergence import diverged
from deca_ds.training.scores import MEAN_MODEL, SETS
from deca_ds.transport import Commit, Transport, all_reduce_sum, gather_json, sum_slices

MEAN = "the mean of the clients' models"
POOLED = ("loss", "token_accuracy", "exact_match", "accuracy", "macro_f1")
TOLD = (*POOLED, "examples")  # what clients tell each other of scores on sets of their own
JOB_SCORES = ("consensus_distance", "mean", "clients")  # of all clients together


@dataclass(frozen=True)
class Evaluator:
    """Scores this client's model on its own and on the common set, and the mean of all clients' models."""

    client: Client
    cluster: Cluster
    transport: Transport
    commit: Commit
    data: ClientData
    batch_size: int
    pad_id: int
    mean_model: bool
    scored: Callable[[str, int, int], None] = lambda what, done, rows: None

    def evaluate(self) -> dict[str, Any]:
        """Return the scores on all sets that there are: {"own": ..., "common": ..., "mean": ..., "consensus_distance":
        ...}. With the mean model come "clients", by number: what each has found on its own and on the common set.

        Waits for the other clients only if the mean model is to be scored. If one of them dies meanwhile, all is scored
        again with those that are left.
        """
        while True:
            epoch = self.transport.epoch
            scores = self._evaluate()
            if self.transport.epoch == epoch:
                return scores

    def _evaluate(self) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        if self.data.own_evaluation is not None:
            scores["own"] = self._score(self.data.own_evaluation, SETS["own"])
        if self.data.common_evaluation is not None:
            scores["common"] = self._score(self.data.common_evaluation, SETS["common"])
        if self.mean_model and len(self.cluster.members) > 1:
            scores |= self._score_mean_model()
            sets = {name: scores[name] for name in SETS if name in scores}
            told = {name: {key: found[key] for key in TOLD if key in found} for name, found in sets.items()}
            every = self.commit.run(lambda: gather_json(self.transport, told))
            scores["clients"] = dict(zip(map(str, self.cluster.members.clients), every, strict=True))
        self.client.end_scoring()
        return scores

    def _score_mean_model(self) -> dict[str, Any]:
        """Overwrite the shards with the mean over clients, score it, put the own values back.

        The consensus distance is sqrt(1/n sum_i |x_i - mean|^2) over all trained parameters (Kong et al., arXiv
        2102.04828).
        The common set is shared out over the ranks of all clients; without one, each client scores its own set.
        """
        self.client.end_scoring()
        # frozen parameters are equal everywhere
        trained = [name for block in self.client.plan.blocks for name in block.names]
        with self.client.borrowed_shards(trained) as shards:
            numels = [prod(self.client.shapes[name]) for name in trained]
            averaged = self.commit.run(
                lambda: overwrite_with_mean(shards, numels, self.transport, len(self.cluster.members))
            )
            found = [self.client.client_sum(each) for each in averaged]
            total = self.commit.run(lambda: self._sum(torch.tensor(found, dtype=torch.float64)))
            if self.data.common_evaluation is not None:
                scores = self._score(self.data.common_evaluation, MEAN_MODEL, MEAN, shared=True)
            else:  # private sets, of which a client may have none
                held = self.data.own_evaluation
                own = None if held is None else self._score(held, f"{MEAN_MODEL}, {SETS['own']}", MEAN)
                told = None if own is None else {key: own[key] for key in TOLD if key in own}
                scores = average(self.commit.run(lambda: gather_json(self.transport, told)))
            self.client.end_scoring()
        squared, differing = total.tolist()  # of equal models the mean is off by its rounding
        distance = (squared / len(self.cluster.members)) ** 0.5 if differing else 0.0
        return {"consensus_distance": distance} | ({"mean": scores} if scores else {})

    def _score(self, dataset: Dataset, what: str, whose: str = "", *, shared: bool = False) -> dict[str, Any]:
        """Return scores over `dataset`, by this client alone or, if `shared`, by all clients, each on a part. what: the
        name of the set on displays. whose: the name of the model in errors; without it that of this client."""
        rank, ranks = self.cluster.shard, self.cluster.ranks
        if shared:
            members, layout = self.cluster.members, self.cluster.layout
            sizes = [len(layout.ranks_of(client)) for client in members.clients]
            rank, ranks = sum(sizes[: members.place(self.cluster.client)]) + rank, sum(sizes)
        totals = empty_totals(len(dataset))
        batches = evaluation_batches(dataset, batch_size=self.batch_size, rank=rank, ranks=ranks, pad_id=self.pad_id)
        for number, batch in enumerate(batches):
            self.cluster.progress.tick()
            self.scored(what, min(number * self.batch_size * ranks, len(dataset)), len(dataset))
            take_in(totals, batch["row"], self.client.score(batch))
        on_device = totals.to(self.client.device)
        dist.all_reduce(on_device)
        totals = on_device.cpu().contiguous()
        if shared:
            totals = self.commit.run(lambda: self._sum(totals))
        return summarize(totals, dataset, self.data, whose or f"client {self.cluster.client}")

    def _sum(self, totals: Tensor) -> Tensor:
        """Sum `totals` over all clients."""
        totals = totals.clone()
        all_reduce_sum(self.transport, totals)
        return totals


def empty_totals(rows: int) -> Tensor:
    """Make the RowScores of every row for `take_in`, [rows, 3] float64, none of them known."""
    return torch.zeros(rows, len(RowScores._fields), dtype=torch.float64)


def take_in(totals: Tensor, rows: Tensor, scores: RowScores) -> None:
    """Write the scores of a batch to its rows. rows: [batch]; -1 fills up, so that all ranks run as many passes."""
    kept = rows >= 0
    totals[rows[kept]] = torch.stack([each[kept].double() for each in scores], dim=1)


def overwrite_with_mean(
    shards: Sequence[tuple[Tensor, Callable[[slice], Tensor]]],
    numels: Sequence[int],
    transport: Transport,
    clients: int,
) -> tuple[float, int]:
    """Overwrite this rank's shards x with the mean over the clients, summed in float32; all ranks call this.

    shards: flat, each with a function that makes the float32 masters of a slice of it. numels: of the whole parameters.
    clients: how many take part. Returns |x - mean|^2 over the shards, and at how many pieces this rank has seen that
    clients differ.
    """
    squared, differing = 0.0, 0

    def differ() -> None:
        nonlocal differing
        differing += 1

    held = [shard.numel() for shard, _ in shards]
    sums = sum_slices(transport, numels, held, lambda number, elements: shards[number][1](elements), differ)
    for number, elements, mean in sums:
        shard, masters = shards[number]
        mean /= clients
        squared += float(squared_norm(masters(elements).sub_(mean)))
        round_into(shard[elements], mean)
    return squared, differing


def summarize(totals: Tensor, dataset: Dataset, data: ClientData, whose: str = "the model") -> dict[str, Any]:
    """Return the scores of `dataset`, one of `data`'s sets, from those of its rows. totals: RowScores, [rows, 3].
    whose: the name of the model in errors.

    Returns loss (nats per target token), perplexity and examples. Then token_accuracy, the share of the targets that
    are the likeliest token after what precedes them, and where the targets are answers exact_match, the share of rows
    all of whose targets are: there greedy decoding gives the answer, token for token. In place of these, for
    classification, where a row is an example with one of the labels as its answer and the likeliest answer counts:
    accuracy, macro_f1, recall by label, and the entries of the confusion matrix that are not 0, as [right label,
    answer, number of examples].
    Raises DivergedError if any row's loss is not finite: of such losses none is the smallest.
    """
    losses, right, counts = totals.numpy().T
    bad = len(losses) - int(np.isfinite(losses).sum())
    if bad:
        how = f"the loss of {bad} of {len(losses)} rows of an evaluation set is not finite"
        raise diverged(whose, how, "evaluation")
    if "candidate" not in dataset.column_names:
        exact = {"exact_match": float(np.mean(right == counts))} if data.answers else {}
        token_accuracy = float(right.sum() / max(1.0, counts.sum()))
        return _language_scores(losses, counts) | {"token_accuracy": token_accuracy} | exact
    columns = dataset.with_format("numpy")
    example, candidate, label = (np.asarray(columns[name][:]) for name in ("example", "candidate", "label"))
    scores = np.full((example.max() + 1, len(data.label_names)), -np.inf)
    scores[example, candidate] = -losses
    truth = np.zeros(len(scores), dtype=int)
    truth[example] = label
    predicted = scores.argmax(axis=1)
    answers = candidate == label
    return _language_scores(losses[answers], counts[answers]) | class_scores(truth, predicted, data.label_names)


def average(summaries: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Pool the summaries of sets that different clients hold: the mean of every score, weighted by examples.

    None stands for a client without a set; with no set at all the result is empty.
    """
    held = [summary for summary in summaries if summary is not None]
    if not held:
        return {}
    weights = [summary["examples"] for summary in held]
    keys = [key for key in POOLED if all(key in summary for summary in held)]
    pooled = {key: float(np.average([summary[key] for summary in held], weights=weights)) for key in keys}
    return pooled | {"examples": sum(weights)}


def class_scores(truth: np.ndarray, predicted: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """Return the accuracy, the recall of each class that occurs in `truth`, the mean of their F1 scores, and the
    confusion matrix."""
    confusion = np.zeros((len(label_names), len(label_names)), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    right, actual, answered = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = actual.nonzero()[0]
    f1 = 2 * right[present] / (actual + answered)[present]  # 2 TP / (2 TP + FN + FP)
    return {
        "accuracy": float(right.sum() / len(truth)),
        "macro_f1": float(f1.mean()),
        "recall": {label_names[index]: float(right[index] / actual[index]) for index in present},
        "confusion": [[label_names[i], label_names[j], int(confusion[i, j])] for i, j in np.argwhere(confusion)],
    }


def _language_scores(losses: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    loss = float(losses.sum() / max(1.0, counts.sum()))
    return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), "examples": len(losses)}
