"""Where the job's store is: with the first rank, and when that has gone, with the leader of the first client left."""

from __future__ import annotations

from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore, host_again, join_again
from deca_ds.launch.view import View


class StoreSite:
    """store: this rank's connection to it, as it is now. host: the rank that hosts it."""

    def __init__(self, launch: Launch, store: JobStore, host: int):
        self._rank, self.store, self.host = launch.rank, store, host
        self._hosted: JobStore | None = None  # by this rank, for those who are left

    def announcement(self, view: View, layout: ClientLayout) -> str:
        """Return the address of another store, which this rank hosts from here on, if the host of the present one is
        out; otherwise nothing. It is for View.announcement, by the leader of the first client of `view`."""
        if layout.client_of(self.host) in view:
            return ""
        self._hosted = self._hosted or host_again(self.store)
        assert self._hosted.address is not None
        return "{} {}".format(*self._hosted.address)

    def move(self, announcement: str, host: int) -> None:
        """Continue with the store that rank `host` has announced. Raises LaunchError if it is out of reach."""
        address, port = announcement.split()
        own = self._hosted if host == self._rank else None
        self.store, self.host = own or join_again(self.store, (address, int(port))), host
