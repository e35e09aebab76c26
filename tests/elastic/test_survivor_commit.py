"""A commit by itself: work counts for all survivors or is done again, and an error that is no death ends the job."""

from __future__ import annotations

import pytest

from deca_ds.elastic.survivor_commit import Question, SurvivorCommit, answers_in, bits
from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.progress import EVERYBODY, Progress
from deca_ds.launch.view import View


class Connections:
    """found: what the first agreement finds all ranks to say, question by question; nothing if one has died. In the
    others they say what this rank does. fewer: whether clients are missing after a death."""

    def __init__(self, found: list[bool] | None = None, fewer: bool = True):
        self.members, self.progress = View.of_all(3), Progress()
        self.found, self.fewer, self.told = found, fewer, []

    def give_up(self):
        self.told.append("gives up")

    def agree(self, answers):
        assert self.progress.awaits == EVERYBODY
        self.told.append(list(answers))
        found, self.found = self.found, None
        return list(answers) if found is None else found

    def reconnect(self):
        self.told.append("reconnects")
        return self.fewer


def works(connections, *outcomes):
    left = list(outcomes)

    def work():
        connections.told.append("works")
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return work


def test_work_that_is_through_counts_once_and_questions_are_asked_with_it():
    connections, heard = Connections([True, False, False]), []
    commit = SurvivorCommit(connections)
    commit.also_ask(Question(lambda: True, heard.append))
    assert commit.run(works(connections, 7), last=True) == 7
    assert connections.told == ["works", [True, True, True]] and heard == [False]
    assert connections.progress.awaits is None


@pytest.mark.parametrize("found", [[], [False, False]])
def test_work_that_does_not_count_for_all_is_done_again_on_new_connections(found):
    connections = Connections(found)
    assert SurvivorCommit(connections).run(works(connections, "lost", "kept")) == "kept"
    assert connections.told == ["works", [True, False], "reconnects", "works", [True, False]]


def test_a_rank_that_sees_an_error_lets_the_others_stop_waiting_before_it_says_no():
    connections = Connections()
    commit = SurvivorCommit(connections)
    assert commit.run(works(connections, MessageError("damaged"), 7)) == 7
    assert connections.told == ["works", "gives up", [False, False], "reconnects", "works", [True, False]]


def test_messages_that_fail_again_and_again_though_nobody_has_died_end_the_job(capsys):
    connections = Connections(fewer=False)
    with pytest.raises(GossipError, match="keep failing, though all clients are there: damaged"):
        SurvivorCommit(connections).run(works(connections, *[MessageError("damaged")] * 3))
    assert connections.told.count("works") == 3
    assert capsys.readouterr().err.count("WARNING: starting: damaged; sent again") == 3


def test_other_errors_are_no_matter_of_the_commit():
    connections = Connections()
    with pytest.raises(ValueError, match="a defect"):
        SurvivorCommit(connections).run(works(connections, ValueError("a defect")))
    assert connections.told == ["works"]


def test_answers_travel_as_bits():
    assert [answers_in(bits(answers), 3) for answers in ([True, False, True], [False] * 3)] == [
        [True, False, True],
        [False] * 3,
    ]
