import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, recall_score

from deca_ds.training.evaluation import _class_scores, average, summarize


def test_language_scores_are_per_token():
    dataset = Dataset.from_dict({"input_ids": [[1], [2]], "labels": [[1], [2]]})
    scores = summarize(torch.tensor([[6.0, 3], [2.0, 1]], dtype=torch.float64), dataset, [])
    assert scores == {"loss": 2.0, "perplexity": pytest.approx(math.e**2), "examples": 2}


def test_the_likeliest_label_counts():
    """Three examples, two labels; rows in any order. Example 2 is scored wrong."""
    rows = [(0, 0, 0, 1.0), (1, 1, 1, 0.5), (0, 1, 0, 2.0), (2, 0, 1, 0.25), (1, 0, 1, 0.75), (2, 1, 1, 3.0)]
    dataset = Dataset.from_dict(
        {
            "example": [row[0] for row in rows],
            "candidate": [row[1] for row in rows],
            "label": [row[2] for row in rows],
        }
    )
    totals = torch.tensor([[row[3], 1] for row in rows], dtype=torch.float64)
    scores = summarize(totals, dataset, ["red", "blue"])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["recall"] == {"red": 1.0, "blue": 0.5}
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["loss"] == pytest.approx((1.0 + 0.5 + 3.0) / 3), "only the right answers count"
    assert scores["examples"] == 3


def test_private_sets_are_pooled_by_size():
    pooled = average(
        [{"loss": 1.0, "examples": 1, "accuracy": 0.0}, None, {"loss": 3.0, "examples": 3, "accuracy": 1.0}]
    )
    assert pooled["loss"] == 2.5 and pooled["accuracy"] == 0.75 and pooled["examples"] == 4
    assert "macro_f1" not in pooled
    assert average([None, None]) == {}


@pytest.mark.parametrize("seed", range(5))
def test_class_scores_equal_those_of_scikit_learn(seed):
    """Classes that do not occur, and classes that nobody answers, are among them."""
    random = np.random.default_rng(seed)
    names = [f"class {index}" for index in range(6)]
    truth, predicted = random.choice([0, 1, 3, 4], 30), random.choice([0, 2, 3, 5], 30)
    scores = _class_scores(truth, predicted, names)
    present = sorted(set(truth))
    recall = recall_score(truth, predicted, labels=present, average=None, zero_division=0)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(
        f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    )
    assert scores["recall"] == pytest.approx({names[k]: value for k, value in zip(present, recall, strict=True)})
