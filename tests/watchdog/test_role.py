"""What becomes of a rank, by what it is to the job and what happens to it: every case."""

from __future__ import annotations

from deca_ds.watchdog.role import Event, Outcome, Role, on_event

# without cluster.return_s, and with it
CASES = {
    (Role.MEMBER, Event.ERROR): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.CUT_OFF): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.HANGS): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.OTHERS_HANG): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.STILL_HANG): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.STORE_GONE): (Outcome.END, Outcome.END),
    (Role.MEMBER, Event.STORE_SILENT): (Outcome.END, Outcome.END),
    (Role.REJOINING, Event.ERROR): (Outcome.END, Outcome.END),
    (Role.REJOINING, Event.CUT_OFF): (Outcome.END, Outcome.COME_BACK),
    (Role.REJOINING, Event.HANGS): (Outcome.WAIT, Outcome.WAIT),
    (Role.REJOINING, Event.OTHERS_HANG): (Outcome.WAIT, Outcome.WAIT),
    (Role.REJOINING, Event.STILL_HANG): (Outcome.END, Outcome.END),
    (Role.REJOINING, Event.STORE_GONE): (Outcome.END, Outcome.COME_BACK),
    (Role.REJOINING, Event.STORE_SILENT): (Outcome.END, Outcome.COME_BACK),
    (Role.OUTLIVED, Event.ERROR): (Outcome.END_THE_CLIENT, Outcome.END_THE_CLIENT),
    (Role.OUTLIVED, Event.CUT_OFF): (Outcome.END_THE_CLIENT, Outcome.COME_BACK),
    (Role.OUTLIVED, Event.HANGS): (Outcome.END_THE_CLIENT, Outcome.COME_BACK_UNNOTICED),
    (Role.OUTLIVED, Event.OTHERS_HANG): (Outcome.WAIT, Outcome.WAIT),
    (Role.OUTLIVED, Event.STILL_HANG): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.OUTLIVED, Event.STORE_GONE): (Outcome.WAIT, Outcome.WAIT),
    (Role.OUTLIVED, Event.STORE_SILENT): (Outcome.END, Outcome.END),
}


def test_every_role_and_event_has_its_outcome():
    assert CASES.keys() == {(role, event) for role in Role for event in Event}
    found = {case: (on_event(*case, returns=False), on_event(*case, returns=True)) for case in CASES}
    assert found == CASES


def test_a_rank_trains_with_others_that_go_on_without_it_once_and_for_good():
    steps = {(role, becomes) for role in Role for becomes in Role if role.may_become(becomes)}
    assert steps == {(Role.MEMBER, Role.OUTLIVED), (Role.REJOINING, Role.OUTLIVED)}
