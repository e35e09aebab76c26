"""The one answer to who is in."""

from __future__ import annotations

import dataclasses

import pytest

from deca_ds.launch.launcher import ClientLayout
from deca_ds.launch.view import Membership, View


def test_a_view_says_who_is_in_and_cannot_be_changed():
    view = View(7, (3, 4, 0), 5)  # client 0 has come back
    assert 4 in view and 1 not in view and len(view) == 3
    assert view.first == 3 and view.place(0) == 2 and view.missing == (1, 2)
    assert view.ranks(ClientLayout.of([2, 1, 1, 2, 1])) == [4, 5, 6, 0, 1]
    assert View.of_all(3) == View(0, (0, 1, 2), 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.clients = (3,)


@pytest.mark.parametrize("clients", [(), (0, 0), (0, 3), (-1,)])
def test_a_view_of_nobody_or_of_strangers_is_refused(clients):
    with pytest.raises(ValueError, match="are not clients of 3, each once"):
        View(1, clients, 3)


def test_subscribers_hear_of_each_change_in_their_order_when_everybody_sees_it():
    membership, heard = Membership(View.of_all(3)), []
    membership.subscribe(lambda before, after: heard.append(("first", before, after, membership.view)))
    membership.subscribe(lambda before, after: heard.append(("second", before, after, membership.view)))
    left = View(4, (1, 2), 3, "127.0.0.1 7")
    membership.change(left)
    assert heard == [(who, View.of_all(3), left, left) for who in ("first", "second")]


@pytest.mark.parametrize("late", [View(2, (1, 2), 3), View(1, (1,), 3), View(3, (1, 2), 4)])
def test_no_view_follows_a_later_one_and_none_has_its_number(late):
    membership, heard = Membership(View.of_all(3)), []
    membership.change(View(2, (0, 1), 3))
    membership.subscribe(lambda *views: heard.append(views))
    with pytest.raises(ValueError, match="does not come after"):
        membership.change(late)
    assert membership.view == View(2, (0, 1), 3) and not heard
