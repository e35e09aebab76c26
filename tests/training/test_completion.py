"""Which checkpoints survivors know to be complete, and which they keep for a resume with all clients."""

from types import SimpleNamespace

import pytest

from deca_ds.training.completion import CompletionByCommit


class Commit:
    """A commit whose agreements the test makes. answers: of the other ranks."""

    def __init__(self) -> None:
        self.members = SimpleNamespace(missing=[])

    def also_ask(self, question) -> None:
        self.question = question

    def agree(self, others: bool = True) -> None:
        self.question.heard(self.question.answer() and others)


@pytest.fixture
def commit() -> Commit:
    return Commit()


@pytest.fixture
def completion(commit) -> CompletionByCommit:
    return CompletionByCommit(commit, None)


def save(completion: CompletionByCommit, step: int) -> None:
    completion.begin(step)
    completion.add(step)


def test_a_checkpoint_that_all_have_written_is_complete_from_the_next_agreement_on(commit, completion):
    save(completion, 2)
    commit.agree(others=False)
    assert not completion.complete(2)
    commit.agree()
    assert completion.complete(2) and completion.keeps(2)


def test_a_client_that_has_begun_a_checkpoint_has_written_the_one_before(commit, completion):
    """So a disk that is slow at every agreement does not hide that there is a checkpoint."""
    for step in (2, 4):
        save(completion, step)
        commit.agree(others=False)
    assert completion.complete(2) and not completion.complete(4)
    assert completion.keeps(2) and completion.keeps(4)
    commit.agree()
    assert completion.complete(4) and completion.keeps(4) and not completion.keeps(2)


def test_the_checkpoint_before_is_kept_until_a_returned_client_has_written_a_newer_one(commit, completion):
    save(completion, 2)
    commit.agree()
    commit.members.missing = [1]
    commit.agree()
    save(completion, 4)
    commit.agree()
    assert completion.complete(4) and completion.keeps(2)
    commit.members.missing = []
    commit.agree()
    assert completion.complete(4) and completion.keeps(2), "client 1 has no part of the newer one"
    save(completion, 6)
    commit.agree()
    assert completion.keeps(6) and not completion.keeps(2)


def test_a_checkpoint_that_a_client_may_have_died_over_is_kept_beside_the_one_before(commit, completion):
    save(completion, 2)
    commit.agree()
    save(completion, 4)
    commit.members.missing = [1]
    commit.agree()
    commit.members.missing = []
    commit.agree()
    assert completion.keeps(2) and completion.keeps(4)
    save(completion, 6)
    commit.agree()
    assert not completion.keeps(2) and not completion.keeps(4) and completion.keeps(6)


def test_an_absent_client_is_not_missing():
    commit = Commit()
    commit.members.missing = [1]
    completion = CompletionByCommit(commit, 8, absent=[1])
    save(completion, 10)
    assert completion.keeps(8)
    commit.agree()
    assert completion.keeps(10) and not completion.keeps(8)
