"""Every rank's failure ends the whole job within seconds and names itself.

The first rank that fails writes its message to the job's store. A thread in every other rank sees it there and ends its
process, whatever the process waits for (a collective, a message, a slow disk). The job leaves a FAILED marker with the
message of that first rank (ending.py), or a DONE marker. The same thread (watcher.py) sends this rank's heartbeats and
ends waits that last too long (heartbeats.py). It ends this process as well when the store no longer answers.

What a failure leads to depends on the rank's role (role.py). With cluster.on_failure=continue, from the first step on,
a rank that fails reports that on its own output and in FAILED_client_NNN and kills itself, as the MPI library expects
of dead ranks. The store may be lost with its host; the survivors then open another one. A rank that hangs, or waits too
long for other ranks of its client, ends that client; over torch the others also drop it if its process does not run.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import Store

from deca_ds.launch import Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.store_site import StoreSite
from deca_ds.run_folder import HEARTBEATS
from deca_ds.watchdog.ancestors import Ancestors
from deca_ds.watchdog.early_end import EarlyEnd, StopBeforeTraining
from deca_ds.watchdog.ending import Ending, end_process
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.look import Look
from deca_ds.watchdog.patience import USUAL, Patience
from deca_ds.watchdog.role import Outcome, Role
from deca_ds.watchdog.standing import Elasticity, Rejoining, Standing, of_a_connection
from deca_ds.watchdog.stop import StopByCommit, StopByStore
from deca_ds.watchdog.watcher import Watcher

_DONE_KEY, _EARLY_KEY = "job/done", "job/early"


class JobGuard:
    """This rank's part in ending the job; `guarded` makes one. Its parts:

    site: where the job's store is. heartbeats: what this rank and the others do. _standing: this rank's role in the
    job. _ending, early_end: how its process ends. _watcher: the thread that watches the job.

    rejoining: given if this rank's client comes back and is not a member yet. ancestors: the processes above this one.
    """

    def __init__(
        self,
        launch: Launch,
        store: JobStore,
        rejoining: Rejoining | None = None,
        ancestors: Ancestors | None = None,
        patience: Patience = USUAL,
    ):
        self._launch = launch
        stop = StopByStore(launch.rank, launch.world_size, store.timeout.total_seconds())
        self._standing = Standing(launch, rejoining, stop, patience)
        self.site = StoreSite(launch, store, launch.first if rejoining is None else rejoining.host)
        self.heartbeats = Heartbeats(launch, self._standing.ranks, store.progress)
        self._ending = Ending(launch, self.site, self.heartbeats)
        met = partial(self._meet, key=_EARLY_KEY, waits=True)
        self.early_end = EarlyEnd(self._ending.begun, met, self._end_early, patience.reacts_s)
        parts = launch, self.site, self.heartbeats, self._standing, self._ending
        look = Look(*parts, ancestors or Ancestors(), self.fail)
        self._watcher = Watcher(*parts, self.early_end, look, self.fail)

    @property
    def progress(self) -> Progress:
        """Where this rank's main thread notes what it does."""
        return self.heartbeats.progress

    @property
    def store(self) -> JobStore:
        """The job's, wherever it is now."""
        return self.site.store

    @property
    def stop(self) -> StopByStore | StopByCommit:
        """How a request to stop reaches all ranks, and after which step they stop."""
        return self._standing.stop

    @property
    def output(self) -> Path | None:
        """The run's folder, as soon as this job has claimed it."""
        return self._ending.output

    def write_to(self, output: Path) -> None:
        """Write to `output`, the run's folder, which this job has claimed, from now on."""
        self._ending.write_to(output)
        self.show_life(output)

    def show_life(self, output: Path) -> None:
        """Write heartbeats to `output`, the run's folder, which this job has claimed, and nothing else: a start that
        may still be refused leaves all other files as they are."""
        self.heartbeats.write_to(output / HEARTBEATS)

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when this rank is done, so that no other rank takes its end for a death."""
        self._ending.at_exit.append(callback)

    def enter_elastic(self, elasticity: Elasticity) -> None:
        """Note that the ranks are connected in a way that survives the failure of a client, as soon as all of them have
        called `let_others_go_on`."""
        self._standing.enter_elastic(elasticity)
        elasticity.membership.subscribe(self._watcher.follow)

    def let_others_go_on(self) -> None:
        """Let a failure of this rank end its own client alone from now on. To be called after `enter_elastic`."""
        self._standing.let_others_go_on()
        self.heartbeats.let_others_go_on()

    def let_stop_before_training(self, tell: Callable[[], None]) -> None:
        """Let a request to stop end all ranks wherever they are, as long as none of them trains; SIGUSR1 must call
        `hear`. tell: called by the thread that ends this process."""
        self.early_end.expect(tell)
        self.stop.let_end_early()

    def hear(self, *_: Any) -> None:
        """Have the job stop; a signal handler. Raises StopBeforeTraining, once, if all ranks have agreed to stop before
        training."""
        self.stop.ask()
        if self.stop.ends_early:
            self.early_end.interrupt()

    def fail(self, error: BaseException) -> NoReturn:
        """Report `error`, unless another rank was first, and end this process as this rank's role says."""
        self.early_end.forbid()
        self._ending.begun.acquire()
        if of_a_connection(error) and (told := self._standing.told_over()) is not None:
            self._ending.end_in_order(told)
        match self._standing.outcome(self._standing.event_of(error)):
            case Outcome.COME_BACK:
                self.come_back(f"was cut off: {error}")
            case Outcome.COME_BACK_UNNOTICED:
                self.come_back(f"hangs: {error}", through=False)
            case Outcome.END_THE_CLIENT:
                self._ending.end_the_client(error)
            case Outcome.END:
                self._ending.end_alone(error, mark=self._standing.ends_the_run)
            case _:
                self._ending.end_the_job(error)

    def come_back(self, why: str, *, through: bool = True) -> NoReturn:
        """Become a new process that tries to rejoin the others. through: whether the callbacks of `on_exit` tell the
        others that this rank is done."""
        self._ending.come_back(why, self._standing.return_s, through=through)

    def finish(self) -> None:
        """Stop watching, because every rank is done. Ends this process if a client has died."""
        self.early_end.forbid()
        self.progress.enter("done")
        for callback in self._ending.at_exit:
            callback()
        store = self.store.store
        try:
            self._let_all_leave(store)
        except RuntimeError:  # the store's host has died
            if self._standing.role is not Role.OUTLIVED:
                raise
        self._watcher.close()
        self.heartbeats.beat(store, last=True)
        if self._standing.view_has_changed:
            end_process(0)  # MPI_Finalize, an exit handler, may wait for the dead for ever
        gc.freeze()  # or the interpreter would look for garbage in everything, several times: a second of each rank

    def _end_early(self, store: Store) -> NoReturn:
        self._let_all_leave(store)
        end_process(0)

    def _let_all_leave(self, store: Store) -> None:
        """Note that this rank needs the store no more. Its host waits until nobody does."""
        self._meet(store, _DONE_KEY, waits=self._launch.rank == self.site.host)

    def _meet(self, store: Store, key: str, *, waits: bool) -> None:
        """Count this rank at the meeting point `key`. waits: whether to wait until all ranks are there."""
        store.add(key, 1)
        deadline = time.monotonic() + self.store.timeout.total_seconds()
        while waits and store.add(key, 0) < len(self._standing.ranks()) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def guarded(
    launch: Launch, store: JobStore, rejoining: Rejoining | None = None, patience: Patience = USUAL
) -> Iterator[JobGuard]:
    """Run the body under a `JobGuard`: an exception in it ends the job, and its end waits for all ranks to finish."""
    guard = JobGuard(launch, store, rejoining, patience=patience)
    try:
        yield guard
    except StopBeforeTraining:
        guard.early_end.end(guard.store.store)
    except BaseException as error:
        guard.fail(error)
    guard.finish()
