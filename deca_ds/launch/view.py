"""Which clients are in the job: an immutable View, and the Membership that holds a rank's current one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deca_ds.launch.launcher import ClientLayout


@dataclass(frozen=True)
class View:
    """The clients that are in the job, by number, of `total`.

    number: of the agreement that made this view; it grows from view to view, and the same number means the same view on
    all clients. 0: not agreed on, but given by the launcher or an invitation. clients: ascending, except that clients
    that joined later come last, in the order in which they joined. announcement: what the leader of the first client
    told the others in that agreement.
    """

    number: int
    clients: tuple[int, ...]
    total: int
    announcement: str = ""

    def __post_init__(self) -> None:
        if not self.clients or len(set(self.clients)) < len(self.clients) or not set(self.clients) <= self._everybody:
            raise ValueError(f"{self.clients} are not clients of {self.total}, each once")

    @classmethod
    def of_all(cls, total: int) -> View:
        """Make the view at a start from which no client is absent."""
        return cls(0, tuple(range(total)), total)

    @property
    def _everybody(self) -> set[int]:
        return set(range(self.total))

    def __contains__(self, client: int) -> bool:
        return client in self.clients

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def first(self) -> int:
        """The client whose leader speaks for the job."""
        return self.clients[0]

    @property
    def missing(self) -> tuple[int, ...]:
        """The clients that are not in the job, ascending."""
        return tuple(sorted(self._everybody.difference(self.clients)))

    def place(self, client: int) -> int:
        """Return where the client stands among those that are in."""
        return self.clients.index(client)

    def ranks(self, layout: ClientLayout) -> list[int]:
        """Return the clients' ranks, client by client."""
        return [rank for client in self.clients for rank in layout.ranks_of(client)]


class Membership:
    """The current view, for everybody in this rank who asks. Other threads may read it."""

    def __init__(self, view: View):
        self._view = view
        self._subscribers: list[Callable[[View, View], None]] = []

    @property
    def view(self) -> View:
        return self._view

    def change(self, view: View) -> None:
        """Replace the view by `view`, on which all ranks that are in have agreed; each of them calls this. Raises
        ValueError for one that is not newer than the current one."""
        if view.number <= self._view.number or view.total != self._view.total:
            raise ValueError(f"{view} does not come after {self._view}")
        before, self._view = self._view, view
        for subscriber in self._subscribers:
            subscriber(before, view)

    def subscribe(self, subscriber: Callable[[View, View], None]) -> None:
        """Have `subscriber` called after every change, with the view before it and the new one: after those who have
        subscribed before."""
        self._subscribers.append(subscriber)
