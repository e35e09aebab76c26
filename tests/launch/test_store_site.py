"""Where the job's store is when its host has gone."""

from __future__ import annotations

import pytest
from jobs import free_port

from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.store_site import StoreSite
from deca_ds.launch.view import View

LAYOUT = ClientLayout(3, 2)


@pytest.fixture
def sites() -> dict[int, StoreSite]:
    """Of ranks 0, 2 and 4, which lead their clients."""
    port = free_port()
    launches = {rank: Launch("deepspeed", rank, 6, 0, ("127.0.0.1", port)) for rank in (0, 2, 4)}
    return {rank: StoreSite(launch, open_job_store(launch, 20), host=0) for rank, launch in launches.items()}


def test_the_store_stays_while_its_host_is_in(sites):
    assert sites[0].announcement(View(1, (0, 2), 3), LAYOUT) == ""
    assert sites[2].announcement(View(1, (1, 0), 3), LAYOUT) == "", "client 0 has come back behind client 1"


def test_the_first_that_is_left_hosts_another_one_and_all_meet_there(sites):
    view = View(1, (1, 2), 3)
    told = sites[2].announcement(view, LAYOUT)
    assert sites[2].announcement(view, LAYOUT) == told, "asked again, because one more had gone: the same store"
    for rank in (2, 4):
        sites[rank].move(told, host=2)
        sites[rank].store.store.set(f"from {rank}", "1")
    assert sites[2].host == sites[4].host == 2
    assert sites[2].store.store.check(["from 2", "from 4"]) and not sites[0].store.store.check(["from 2"])
    assert sites[4].announcement(view, LAYOUT) == ""
    assert sites[4].announcement(View(2, (2,), 3), LAYOUT) not in ("", told)
