"""What a rejoining client learns about the job, and whether it fits in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deca_ds.config import Config
from deca_ds.errors import DataError, LaunchError
from deca_ds.launch import Launch
from deca_ds.launch.compare_ranks import LIBRARIES
from deca_ds.watchdog.restart import JOIN


@dataclass(frozen=True)
class Invitation:
    """What a coordinator tells a rejoining client.

    store: address of the job's store; host: the rank that hosts it. addresses: of all coordinators, as client, host and
    port. attempt: number of this attempt at the run.
    software: see launch/compare_ranks.py. tokenizer: digest of its vocabulary. label_names, common_evaluation: of the
    data, equal for all clients. rounds: of the run. date: data.date. clients: the members. rejoin_id: a text that no
    other rejoin of this job has.
    """

    store: tuple[str, int]
    host: int
    addresses: Sequence[tuple[int, str, int]]
    attempt: int
    software: Mapping[str, str]
    tokenizer: str
    label_names: Sequence[str]
    common_evaluation: int
    rounds: int
    date: str | None
    clients: Sequence[int] = ()
    rejoin_id: str = ""

    def text(self) -> dict[str, Any]:
        """Return what the coordinator is to send; it adds `clients` and `rejoin_id`."""
        content = asdict(self)
        del content["clients"], content["rejoin_id"]
        return content

    @staticmethod
    def read(message: Mapping[str, Any]) -> Invitation:
        """Read a message. Raises LaunchError if it is one of another version of deca_ds."""
        try:
            return Invitation(**{key: value for key, value in message.items() if key != "kind"})
        except TypeError as error:
            raise LaunchError("the job runs another version of deca_ds", where=JOIN, fix=_AS_BEFORE) from error

    def compare_software(self, config: Config, launch: Launch, own: Mapping[str, str]) -> None:
        """Raise LaunchError unless this rank runs what the job runs."""
        for name, value in own.items():
            allowed = name in LIBRARIES and config.cluster.allow_mixed_versions
            if name != "host" and value != self.software[name] and not allowed:
                raise LaunchError(
                    f"rank {launch.rank} on {launch.host} has {_NAMES.get(name, name)} {value}, the job "
                    f"{self.software[name]}",
                    where=JOIN,
                    fix=_AS_BEFORE,
                )

    def compare_data(self, label_names: Sequence[str], common_evaluation: int, tokenizer: str) -> None:
        """Raise DataError unless this client's labels, common evaluation set and tokenizer are those of the job."""
        own = {"labels": list(label_names), "common evaluation examples": common_evaluation, "tokenizer": tokenizer}
        theirs = (list(self.label_names), self.common_evaluation, self.tokenizer)
        for (name, value), of_job in zip(own.items(), theirs, strict=True):
            if value != of_job:
                raise DataError(
                    f"this client has the {name} {value}, the job {of_job}",
                    where=JOIN,
                    fix="give it the data and the model that it was started with",
                )


_AS_BEFORE = "start it as it was started with the others: the same deca_ds, libraries and configuration"
_NAMES = {"code": "deca_ds source files", "keys": "configuration"}
