"""What occurs more than once: within a client's training examples, at other clients, and in what is scored.

Examples are the same where their texts are, but for blanks and for upper and lower case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from datasets import Dataset

from deca_ds.data.prepare import COMMON, OWN, TRAIN
from deca_ds.data.rows import BATCH

Hashes = npt.NDArray[np.uint64]
_PLACES = 3  # of each kind that are named
_NOT_TEXT = ("group", "place", "unused", "document", "ids")


@dataclass(frozen=True)
class Contents:
    """The examples of one set: a hash of each, and the table that knows their places."""

    hashes: Hashes
    examples: Dataset

    def place(self, index: int) -> str | None:
        """Return file and line of an example; None for a piece of a document."""
        return str(self.examples[index]["place"]) if "place" in self.examples.column_names else None


@dataclass(frozen=True)
class Pair:
    """Two places with the same example. clients: whose they are; None: of the common evaluation set."""

    places: tuple[str, str]
    clients: tuple[int | None, int]


@dataclass(frozen=True)
class OfClient:
    """Examples of a client. again: of those that it trains on, how many repeat an earlier one. elsewhere: how many
    another client trains on, too. scored: of those in its own evaluation set, how many anybody trains on."""

    again: int
    elsewhere: int
    scored: int


@dataclass(frozen=True)
class Repeats:
    """By client; common: of the common evaluation set, how many anybody trains on. pairs: some of each kind."""

    clients: dict[int, OfClient]
    common: int
    again: list[Pair]
    elsewhere: list[Pair]
    scored: list[Pair]


def contents(examples: Dataset) -> Contents:
    """Hash the examples of a set by their texts, whatever their blanks and letter case."""
    hashes: list[int] = []
    for batch in examples.iter(BATCH) if len(examples) else ():
        texts = zip(*(batch[name] for name in batch if name not in _NOT_TEXT), strict=True)
        whole = [_hash("\0".join(" ".join(text.split()) for text in of_row).casefold()) for of_row in texts]
        for place, ids in enumerate(batch.get("ids", ())):
            if ids:  # a piece of a document, whose text is in its tokens
                whole[place] = _hash(repr(ids))
        hashes += whole
    return Contents(np.array(hashes, np.uint64), examples)


def repeats(sets: Mapping[int, Mapping[str, Contents]]) -> Repeats:
    """Find examples that occur more than once: within a client, at several clients, or in an evaluation set.

    sets: of each client, TRAIN, OWN and COMMON.
    """
    train = {client: of[TRAIN] for client, of in sets.items()}
    distinct = {client: np.unique(of.hashes) for client, of in train.items()}
    values, holders = np.unique(np.concatenate(list(distinct.values())), return_counts=True)
    shared = values[holders > 1]
    by_client, again, elsewhere, scored = {}, [], [], []
    for client, of in sets.items():
        hashes = of[TRAIN].hashes
        at_others = np.flatnonzero(np.isin(hashes, shared))
        seen = np.flatnonzero(np.isin(of[OWN].hashes, values))
        by_client[client] = OfClient(len(hashes) - len(distinct[client]), len(at_others), len(seen))
        again += _again(client, of[TRAIN])
        others = {other: found for other, found in train.items() if other > client}
        elsewhere += _pairs(client, of[TRAIN], at_others, others)
        scored += _pairs(client, of[OWN], seen, train)
    common = next(iter(sets.values()))[COMMON]
    seen = np.flatnonzero(np.isin(common.hashes, values))
    scored = _pairs(None, common, seen, train) + scored
    return Repeats(by_client, len(seen), again[:_PLACES], elsewhere[:_PLACES], scored[:_PLACES])


def _again(client: int, of: Contents) -> list[Pair]:
    """Return some pairs of equal examples within one set."""
    _, first, inverse = np.unique(of.hashes, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[inverse] != np.arange(len(of.hashes)))[:_PLACES]
    return _named([((client, of, int(index)), (client, of, int(first[inverse[index]]))) for index in later])


def _pairs(
    client: int | None, of: Contents, indices: npt.NDArray[np.intp], train: Mapping[int, Contents]
) -> list[Pair]:
    """Return some of the examples with these indices, each with a place where a client trains on it."""
    found = []
    for index in map(int, indices[:_PLACES]):
        for other, there in train.items():
            places = np.flatnonzero(there.hashes == of.hashes[index])
            if len(places):
                found.append(((client, of, index), (other, there, int(places[0]))))
                break
    return _named(found)


def _named(pairs: list[tuple[tuple[int | None, Contents, int], tuple[int, Contents, int]]]) -> list[Pair]:
    made = []
    for (one, of, index), (other, there, place) in pairs:
        first, second = of.place(index), there.place(place)
        if first is not None and second is not None:
            made.append(Pair((first, second), (one, other)))
    return made


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
