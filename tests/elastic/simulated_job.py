"""A whole job on simulated processes, network and time, with the real membership protocol (elastic/protocol.py).

Every process has a `Voter`, leaders a `Coordinator`. Connections are queues in order, of which any may be late, end
early or lose what is under way. Nothing waits: `step` does one thing of those that can happen, chosen by a seeded
generator. What must never happen is checked as it happens (simulated_checks.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from simulated_checks import Checks, Violation
from simulated_network import END, Connection, Network
from simulated_process import Process

from deca_ds.elastic.decision import Decision
from deca_ds.elastic.protocol import Coordinator, Message, Sends
from deca_ds.elastic.voter import Voter
from deca_ds.errors import UserError
from deca_ds.launch.launcher import ClientLayout

SILENT_HOST_S = 11.0
Hold = Callable[[Process, Message], bool]  # of the receiver and the next message to it: whether that has to wait


class Job(Network):
    """n clients of k ranks. present: those that are there at the start. steps: inner steps, which may be changed."""

    def __init__(
        self, clients: int, ranks: int = 1, seed: int = 0, present: tuple[int, ...] = (), silence_s: float = 30.0
    ):
        super().__init__()
        self.layout, self.random, self.silence_s = ClientLayout(clients, ranks), random.Random(seed), silence_s
        self.present = present or tuple(range(clients))
        self.now, self.steps = 0.0, 10**6
        self.sent: Counter[str] = Counter()  # messages of each kind
        self.processes: list[Process] = []
        self.current: dict[int, Process] = {}  # the newest life of each rank
        self.entered: dict[Any, set[int]] = {}
        self.handed: dict[Any, int] = {}
        self.saved: dict[int, tuple[str, int]] = {}
        self.faulty: set[tuple[int, int]] = set()  # client and life
        self.clean = True  # no connection broke between those who live
        self.slow = False  # somebody was stopped or hung
        self.struck = 0.0  # when the last one died
        self.checks = Checks(self)
        for client in self.present:
            self._start(client, 0)
        self.saved = {client: self.address(client) for client in self.present}
        for process in self.processes:
            process.voter = Voter(process.rank, self.saved, silence_s, silence_s)
            process.program = process.main(False)
            process.invite()
            process.resume(None)

    # what happens to processes and the network

    def address(self, client: int) -> tuple[str, int]:
        return "host", self.current[self.layout.leader_of(client)].number

    def ranks(self, client: int) -> list[Process]:
        return [self.current[rank] for rank in self.layout.ranks_of(client) if rank in self.current]

    def members(self, clients: tuple[int, ...]) -> list[Process]:
        """Processes of these clients that are in the job, or were."""
        return [each for each in self.processes if each.client in clients and (each.life == 0 or each.log)]

    def living(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def _start(self, client: int, life: int) -> list[Process]:
        started = []
        for rank in self.layout.ranks_of(client):
            process = self.current[rank] = Process(self, rank, life)
            if process.leads:
                everybody = self.present if life == 0 else range(self.layout.clients)
                process.coordinator = Coordinator(
                    self.layout, client, everybody, self.silence_s, self.silence_s, self.now
                )  # fmt: skip
            self.processes.append(process)
            started.append(process)
        return started

    def may_start(self, client: int) -> bool:
        return not any(process.runs for process in self.ranks(client))

    def start(self, client: int) -> None:
        """New processes of a client that has gone ask to come back."""
        before = self.ranks(client)
        for process in self._start(client, max([process.life for process in before], default=0) + 1):
            process.asking = [other for other in self.saved if other != client]

    def kill(self, process: Process, lose: bool = False, after_s: float = 0.0) -> None:
        """It dies, the rest of its client with the next `tick`. lose: all that it has sent and has not arrived."""
        process.alive, process.waits, self.struck = False, None, self.now
        self.faulty.add((process.client, process.life))
        for connection in [*process.connections.values(), *([process.connection] if process.connection else [])]:
            self.cut(connection, lose, after_s)

    def end(self, process: Process) -> None:
        """It is through, and ends."""
        process.alive = False
        for connection in [*process.connections.values(), *([process.connection] if process.connection else [])]:
            self.cut(connection)

    def hang(self, process: Process) -> None:
        """Its main thread does nothing any more."""
        process.hangs = self.slow = True
        self.faulty.add((process.client, process.life))

    def freeze(self, processes: list[Process], seconds: float) -> None:
        """They do nothing for a while."""
        self.slow = True
        for process in processes:
            if not process.frozen:
                process.frozen, process.thaws = True, self.now + seconds
            self.faulty.add((process.client, process.life))

    def thaw(self, at: float) -> None:
        for process in self.processes:
            if process.frozen and at >= process.thaws:
                process.frozen = False

    # what can happen

    def actions(self, hold: Hold | None = None) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for connection in self.connections:
            if self.blocked and self.blocks(connection):
                continue
            for queue, to, hear in (
                (connection.up, connection.coordinator, self._heard_above),
                (connection.down, connection.rank, self._heard_below),
            ):
                if queue and queue[0][0] <= self.now and not to.frozen and not (hold and hold(to, queue[0][1])):
                    found.append(lambda hear=hear, connection=connection: hear(connection))
        for process in self.processes:
            if process.alive and not process.frozen:
                if process.voter is not None:
                    if process.connection is None and process.voter.coordinator is not None and not process.through:
                        found.append(lambda process=process: self._connect(process))
                elif process.asking and process.asked is None:
                    found.append(lambda process=process: self._ask(process))
                if process.waits is not None and not process.hangs and (answer := process.answer()) is not None:
                    found.append(lambda process=process, answer=answer: process.go_on(answer))
        return found

    def step(self, hold: Hold | None = None) -> bool:
        """One thing of those that can happen now; False if there is none."""
        actions = self.actions(hold)
        if actions:
            actions[int(self.random.random() * len(actions))]()
        return bool(actions)

    def drain(self, hold: Hold | None = None, stop: Callable[[], bool] | None = None) -> bool:
        """All that can happen now, or until something is so; whether it is."""
        for _ in range(20_000):
            if stop and stop():
                return True
            if not self.step(hold):
                return False
        raise Violation("the job does not come to rest, though no time passes")

    def tick(self, seconds: float = 1.0, hold: Hold | None = None, stop: Callable[[], bool] | None = None) -> bool:
        """Time passes, and all that can happen then, or until something is so; whether it is."""
        self.now += seconds
        self.thaw(self.now)
        self._die_together()
        self._break_blocked()
        for process in self.living():
            if process.coordinator is not None and not process.frozen:
                self._coordinate(process, process.coordinator.awake(self.now))
        if self.drain(hold, stop):
            return True
        for process in self.living():
            connection, voter = process.connection, process.voter
            if process.runs and voter is not None and not voter.out and connection and self.now >= voter.deadline:
                self._lose(process)
        for process in self.living():
            if process.runs and process.coordinator is not None:
                before = process.coordinator.last
                self._coordinate(process, process.coordinator.passed(self.now), before)
            if process.runs:
                process.guard()
        return self.drain(hold, stop)

    def run(self, seconds: float, hold: Hold | None = None) -> None:
        end = self.now + seconds
        self.drain(hold)
        while self.now < end:
            self.tick(1.0, hold)

    def until(self, done: Callable[[], bool], hold: Hold | None = None, seconds: float = 1000.0) -> bool:
        """Until something is so, and nothing that can happen after it, or for so long; whether it is."""
        end = self.now + seconds
        so = self.drain(hold, done)
        while not so and self.now < end:
            so = self.tick(0.5, hold, done)
        return so

    def catch(self, kind: str, seconds: float) -> None:
        """Until somebody has just sent a message of this kind, for at most so long."""
        before = self.sent[kind]
        self.until(lambda: self.sent[kind] > before, seconds=seconds)

    # the inside of the simulation

    def _break_blocked(self) -> None:
        for connection in self.connections:
            if not (self.blocked and self.blocks(connection)):
                connection.blocked_since = None
            elif connection.blocked_since is None:
                connection.blocked_since = self.now + self.random.uniform(0.0, 3.0)
            elif self.now - connection.blocked_since >= SILENT_HOST_S:
                self._end_at_rank(connection)
                self._end_at_coordinator(connection)

    def _end_at_rank(self, connection: Connection) -> None:
        """What the rank's system does when the other host is silent."""
        connection.down.clear()
        if connection.rank.connection is connection and connection.rank_has_it:
            if connection.rank.runs:
                self._lose(connection.rank)
            else:
                connection.down.append((self.now, END))

    def _end_at_coordinator(self, connection: Connection) -> None:
        connection.up.clear()
        connection.up.append((self.now, END))
        if connection.coordinator.runs:
            self._heard_above(connection)

    def _die_together(self) -> None:
        for process in self.living():
            if any(not other.alive and not other.through for other in self._mates(process)):
                self.kill(process, lose=False)

    def _mates(self, process: Process) -> list[Process]:
        return [
            other
            for other in self.processes
            if other.client == process.client and other.life == process.life and other is not process
        ]

    def _connect(self, process: Process) -> None:
        voter = process.voter
        address = voter.addresses[voter.coordinator]
        if self.open(process, address, []):
            self.says(process, voter.connected(self.now))
        else:
            self.says(process, voter.ended())

    def _ask(self, process: Process) -> None:
        client = process.asking.pop(0)
        leader = self.current.get(self.layout.leader_of(process.client))
        address = ("host", leader.number) if process.leads else None
        message = {"kind": "join", "rank": process.rank, "address": address}
        if client in self.saved and self.open(process, self.saved[client], [message]):
            process.asked = client, self.now

    def _lose(self, process: Process) -> None:
        """This rank's connection is over, for both sides."""
        connection = process.connection
        process.connection, connection.rank_has_it = None, False
        connection.up.append((self.now, END))
        connection.down.clear()
        if process.voter is None:
            process.asked = None
        elif process.voter.out is None:
            self.says(process, process.voter.ended())
        self.forget(connection)

    def _heard_above(self, connection: Connection) -> None:
        _, message = connection.up.popleft()
        process = connection.coordinator
        coordinator = process.coordinator
        if not process.alive or coordinator.retired or not connection.coordinator_has_it:
            connection.up.clear()
            connection.coordinator_has_it = False
            self.forget(connection)
            return
        self._coordinate(process, coordinator.awake(self.now))
        if coordinator.retired:
            return
        before = coordinator.last
        if message is END:
            connection.coordinator_has_it = False
            connection.up.clear()
            connection.down.append((self.now, END))
            del process.connections[connection.number]
            self.forget(connection)
            sends = coordinator.ended(connection.number)
        else:
            sends = coordinator.heard(connection.number, message, self.now)
        self._coordinate(process, sends, before)

    def _coordinate(self, process: Process, sends: Sends, before: Decision | None = None) -> None:
        for number, message in sends:
            self.sent[message["kind"]] += 1
            if number in process.connections:
                connection = process.connections[number]
                last = connection.down[-1][0] if connection.down else 0.0
                if not connection.down or connection.down[-1][1] is not END:
                    connection.down.append((max(last, self.now + connection.late_s), message))
        if before is not None and process.coordinator.last is not before:
            self.checks.decides(process, before, process.coordinator.last)
        if process.coordinator.retired:
            for connection in process.connections.values():
                connection.coordinator_has_it = False
                connection.down.append((self.now, END))
            process.connections.clear()

    def _heard_below(self, connection: Connection) -> None:
        _, message = connection.down.popleft()
        process = connection.rank
        if not process.alive or process.connection is not connection:
            connection.down.clear()
            connection.rank_has_it = False
            self.forget(connection)
        elif message is END:
            self._lose(process)
        elif process.voter is not None:
            self.says(process, process.voter.heard(message, self.now))
        elif message["kind"] == "invitation":
            self._invited(process, message)
        elif message["kind"] == "asleep":
            self._lose(process)
        elif message["kind"] == "out":
            process.asking = []
            self._lose(process)

    def _invited(self, process: Process, message: Message) -> None:
        everybody = {client: (host, port) for client, host, port in message["addresses"]}
        for client in message["clients"]:
            other = self.processes[everybody[client][1]]
            gone = not other.alive or other.coordinator.retired
            if gone or frozenset((process.client, client)) in self.blocked:
                process.asking = []
                self._lose(process)
                return
        own = self.current[self.layout.leader_of(process.client)]
        known = self.saved | {process.client: ("host", own.number)}
        process.voter = Voter(process.rank, known, self.silence_s, self.silence_s, process.asked[0])
        process.store = message["store"][1]
        process.program = process.main(True)
        self.says(process, process.voter.ready())
        process.resume(None)

    def says(self, process: Process, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, (Decision, UserError)):
                process.inbox.append(effect)
                if isinstance(effect, Decision):
                    self.checks.learns(process, effect)
            elif process.connection is not None:
                self.checks.sends(process, effect)
                self.sent[effect["kind"]] += 1
                connection = process.connection
                last = connection.up[-1][0] if connection.up else 0.0
                if not connection.up or connection.up[-1][1] is not END:
                    connection.up.append((max(last, self.now + connection.late_s), effect))
