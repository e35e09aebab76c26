"""All ranks see the same views under the same numbers, through a death and a return: one rank a client, in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from jobs import free_port
from quorum_job import Job

from deca_ds.elastic.invitation import Invitation
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.rejoin import join_job, save_addresses
from deca_ds.elastic.survivor_commit import SurvivorCommit
from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore, open_job_store
from deca_ds.launch.store_site import StoreSite
from deca_ds.launch.view import Membership, View
from deca_ds.transport.collectives import barrier
from deca_ds.transport.transport import Endpoint

pytestmark = pytest.mark.timeout(200)
CLIENTS = 3


class Rank:
    """With all that follows the view. seen: all views, in order. rejoins: whether it is a rejoining client."""

    def __init__(self, job: Job, launch: Launch, votes: QuorumClient, store: JobStore, rejoins: bool = False):
        clients = tuple(c for c in range(CLIENTS) if not rejoins or c != launch.rank)
        self.membership, self.site = Membership(View(0, clients, CLIENTS)), StoreSite(launch, store, host=0)
        self.seen = [self.membership.view]
        self.membership.subscribe(self._see)
        announcement = partial(self.site.announcement, layout=job.layout)
        end = Endpoint(job.layout, launch.rank, 20.0, self.membership)
        self.transport = ReconnectingGloo(votes, self.site, announcement, end, connected=not rejoins)
        self.commit = SurvivorCommit(self.transport)

    def _see(self, before: View, view: View) -> None:
        assert before == self.seen[-1]
        self.seen.append(view)
        if view.announcement:
            self.site.move(view.announcement, view.first)

    def exchange(self, last: bool = False) -> None:
        self.commit.run(partial(barrier, self.transport), last=last)

    def let_in(self) -> None:
        self.exchange(last=True)
        while not self.transport.joining:
            self.exchange(last=True)
        self.transport.connect_joining()
        self.exchange()

    def come_in(self) -> None:
        self.transport.wait_for_admission()
        self.transport.connect_joining()
        self.exchange()


def test_all_ranks_see_the_same_views(tmp_path):
    job, port = Job(CLIENTS), free_port()
    launches = [Launch("deepspeed", rank, CLIENTS, rank, ("127.0.0.1", port)) for rank in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:

        def on_all(*calls: Callable[[], object]) -> list:
            return [each.result() for each in [pool.submit(call) for call in calls]]

        stores = [open_job_store(launch, 100.0) for launch in launches]
        made = zip(launches, job.votes, stores, strict=True)
        ranks: list[Rank] = on_all(*(partial(Rank, job, *parts) for parts in made))
        on_all(*(rank.exchange for rank in ranks))
        assert all(len(rank.seen) == 1 for rank in ranks)

        job.end(0)
        _, one, two = ranks
        on_all(one.exchange, two.exchange)
        assert one.seen == two.seen and len(one.seen) == 2
        gone = one.seen[-1]
        assert gone.clients == (1, 2) and gone.number > 0
        assert one.site.host == two.site.host == 1 and gone.announcement == "{} {}".format(*two.site.store.address)

        addresses = [(client, *address) for client, address in job.votes[1].addresses.items()]
        told = Invitation(one.site.store.address, 1, addresses, 7, {}, "", [], 0, 4, None)
        job.servers[1].invite(told.text())
        save_addresses(tmp_path, job.votes[1].addresses)
        rejoin, store = join_job(launches[0], job.layout, tmp_path, 10.0, 60.0)
        votes = QuorumClient(0, job.layout, rejoin.addresses, 20.0, 60.0, rejoin.own, rejoin)
        back = Rank(job, launches[0], votes, store, rejoins=True)
        on_all(one.let_in, two.let_in, back.come_in)
        assert one.seen == two.seen and back.seen[1:] == one.seen[2:] == [View(back.seen[-1].number, (1, 2, 0), 3)]
        assert back.seen[-1].number > gone.number
