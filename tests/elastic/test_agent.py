"""What a rank does when the view changes, without other ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from deca_ds.config.schema import ClusterConfig, GossipConfig
from deca_ds.elastic.agent import ElasticAgent
from deca_ds.gossip import subset
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.view import Membership, View
from deca_ds.launch.world import Cluster
from deca_ds.watchdog.stop import StopByCommit

MIXING = build_mixing(GossipConfig(graph="ring"), 4, 0)


class Rank:
    """Of client 0 of four on a ring, in a gradient, and what its agent does. clients: those that start."""

    def __init__(self, clients: tuple[int, ...] = (0, 1, 2, 3), **cluster):
        self.membership = Membership(View(0, clients, 4))
        launch, layout = Launch("python", 0, 4, 0, None), ClientLayout(4, 1)
        self.cluster = Cluster(launch, layout, None, None, None, self.membership)
        self.cluster.progress.enter("gradient", step=5)
        self.mixing, self.questions, self.records = MIXING, [], []
        self.stop, self.lookout = StopByCommit(), SimpleNamespace(found=False)
        self.agent = ElasticAgent(
            ClusterConfig(clients=4, **cluster),
            self.cluster,
            commit=SimpleNamespace(also_ask=self.questions.append),
            rejoinable=None,
            gossip=SimpleNamespace(average_by=self.average_by, schedule=MIXING),
            mixing=MIXING,
            metrics=SimpleNamespace(membership=lambda step, record: self.records.append((step, record))),
            stop=self.stop,
            lookout=self.lookout,
        )

    def average_by(self, mixing):
        self.mixing = mixing

    def sees(self, number: int, *clients: int) -> bool:
        """Whether it continues with these."""
        self.membership.change(View(number, clients, 4))
        return self.stop.may_pass(5)

    def averages_without(self, *missing: int) -> bool:
        expected = subset.without(MIXING, missing).matrices
        return all(np.array_equal(a, b) for a, b in zip(self.mixing.matrices, expected, strict=True))


def test_a_death_and_a_return_change_the_matrices_and_are_told_once(capsys):
    rank = Rank()
    assert rank.sees(3, 0, 2, 3) and rank.averages_without(1)
    assert "gradient, step 5: client 1 gone; 3 of 4 continue, spectral gap" in capsys.readouterr().err
    rank.cluster.progress.enter("letting a client in")
    assert rank.sees(6, 0, 2, 3, 1) and rank.averages_without()
    assert "step 5: client 1 back; 4 of 4 continue, spectral gap" in capsys.readouterr().err
    (step, gone), (_, back) = rank.records
    assert step == 5 and gone["from_step"] == 5 and (gone["clients"], gone["missing"]) == ([0, 2, 3], [1])
    assert back["from_step"] == 6 and (back["clients"], back["missing"]) == ([0, 1, 2, 3], [])
    assert not rank.agent.rejoins


def test_a_job_that_starts_without_some_says_so(capsys):
    rank = Rank(clients=(0, 1, 2))
    rank.agent.begin(4)
    assert rank.averages_without(3) and rank.stop.may_pass(5) and rank.records[0][1]["from_step"] == 5
    assert "starting, step 4: client 3 absent; 3 of 4 continue" in capsys.readouterr().err
    whole = Rank()
    whole.agent.begin(4)
    assert not whole.records and not capsys.readouterr().err


def test_the_policy_is_obeyed(capsys):
    alone = Rank(min_clients=3)
    assert not alone.sees(2, 0, 1) and not alone.agent.rejoins
    assert "clients 2, 3 gone; 2 of 4 are left, fewer than cluster.min_clients: stopping" in capsys.readouterr().err
    comes_back = Rank(min_clients=3, return_s=60.0)
    assert not comes_back.sees(2, 0, 1) and comes_back.agent.rejoins
    assert not Rank().sees(2, 0, 2), "the ring is torn"
    assert Rank(on_partition="continue").sees(2, 0, 2)


def test_a_larger_part_that_one_leader_sees_is_joined_by_all(capsys):
    rank = Rank(return_s=60.0)
    stop, larger_part = rank.questions
    assert larger_part.answer() and stop.answer()
    rank.lookout.found = True
    assert not larger_part.answer()
    larger_part.heard(True)
    assert rank.stop.may_pass(5) and not rank.agent.rejoins
    larger_part.heard(False)
    larger_part.heard(False)
    assert not rank.stop.may_pass(5) and rank.agent.rejoins
    assert capsys.readouterr().err.count("is in reach again: clients 0, 1, 2, 3 will rejoin it") == 1
    assert len(Rank().questions) == 1, "without cluster.return_s nobody looks"
