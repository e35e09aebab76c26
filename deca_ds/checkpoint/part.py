"""Whose part of a saved model something is, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deca_ds.run_folder import CLIENT, RANK, numbered

PARTIAL = ".partial"  # after the name of a rank's folder until it is complete


def rank_folder(folder: Path, client: int, rank: int) -> Path:
    """Return the folder in which `rank` of `client` keeps its slices."""
    return folder / CLIENT.format(client) / RANK.format(rank)


def rank_folders(folder: Path) -> list[Path]:
    """Return those of all ranks that are in the folder of a model, client by client."""
    return [own for client in numbered(folder, CLIENT).values() for own in numbered(client, RANK).values()]


@dataclass(frozen=True)
class Part:
    """What one rank saves: number `rank` of the `ranks` of client number `client`."""

    client: int
    rank: int
    ranks: int

    def folder(self, of: Path) -> Path:
        """Return where its slices are, in the folder of a whole model."""
        return rank_folder(of, self.client, self.rank)
