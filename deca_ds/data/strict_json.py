"""JSON in which no object has two values under one name: the json module would keep the last one without a word.

A list is read a value at a time: of a file that is one, no more has to be in memory than its largest value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

PART = 2**20  # characters that are read at a time
_LONGEST = 12  # characters of the longest thing that makes no sense when it is cut: \ud83d\ude00
_BLANKS = re.compile(r"[ \t\n\r]*")


def parse(text: str) -> Any:
    """Parse `text`. Raises ValueError where it is no JSON, or an object in it names one of its values twice."""
    return json.loads(text, object_pairs_hook=_object)


class Reader:
    """JSON from a file, front to back."""

    def __init__(self, file: TextIO):
        self._file, self._text = file, ""
        self._at = self._lines = 0  # the place in the text that has been read, and the line that the text begins in

    def peek(self) -> str:
        """Return the next character that is no blank; "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def items(self) -> Iterator[Any]:
        """Yield the values of a list, which is all that is there. Raises what `parse` does, JSONDecodeError with the
        line."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
        else:
            yield self._value()
            while self.peek() != "]":
                self._take(",")
                yield self._value()
            self._take("]")
        if self.peek():
            raise self._mistake("Extra data", self._at)

    def _value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                at_the_end = error.pos > len(self._text) - _LONGEST or error.msg.startswith("Unterminated string")
                if at_the_end and self._more():
                    continue
                raise self._mistake(error.msg, error.pos) from None
            if end > len(self._text) - _LONGEST and self._more():  # there may be more of a number
                continue
            self._at = end
            return value

    def _take(self, sign: str) -> None:
        if self.peek() != sign:
            raise self._mistake(f"Expecting {sign!r} delimiter", self._at)
        self._at += 1

    def _more(self) -> bool:
        """Read on, at least as much as the text that is not used yet; returns False at the end of the file."""
        rest = len(self._text) - self._at
        read = self._file.read(max(PART, rest))
        if read:
            self._lines += self._text.count("\n", 0, self._at)
            self._text, self._at = self._text[self._at :] + read, 0
        return bool(read)

    def _mistake(self, what: str, at: int) -> json.JSONDecodeError:
        return json.JSONDecodeError(what, "\n" * self._lines + self._text, self._lines + at)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"an object has two values named {twice!r}")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
