"""Where the assistant's turns begin and end in what a chat template writes, if it does not mark them.

A turn begins at the end of the generation prompt, or where that does not stand before it at its first text, and ends
with what the template writes after it where the conversation ends there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from deca_ds.data.template import ERRORS, ChatTemplate
from deca_ds.data.words import OTHER, WORD, Form, Masked, Messages, split, with_content

PROBE = {"role": "user", "content": WORD}


class UnclearError(Exception):
    """The template does not show where answers are. Its text continues after "the chat template"."""


class Turns:
    """The assistant's turns of one conversation.

    form: in which the template writes it. special: finds blanks and the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, masked: Masked, form: Form, special: re.Pattern[str]):
        self._template, self._masked, self._form, self._special = template, masked, form, special
        self._messages = masked.messages

    def pieces(self, literals: Sequence[str], numbers: Sequence[int]) -> Iterator[tuple[str | int, int]]:
        """See `Pieces`. literals, numbers: the conversation as it is written, see `split`. Raises UnclearError."""
        kinds = [[(0, OTHER)] for _ in literals]  # of each literal: from which character on it is what
        of_words = [OTHER] * len(numbers)
        for turn in self._masked.answers:
            places = [place for place, number in enumerate(numbers) if self._masked.slots[number].turn == turn]
            first, last = places[0], places[-1]
            if places != list(range(first, last + 1)):
                raise UnclearError("mixes an answer with other turns")
            kind = self._masked.kind(turn)
            kinds[first].append((self._begin(turn, literals[first], numbers[first]), kind))
            for place in range(first + 1, last + 1):
                kinds[place] = [(0, kind)]
            kinds[last + 1] = [
                (0, kind),
                (self._end(turn, literals[first], literals[last + 1], numbers[last]), OTHER),
            ]
            of_words[first : last + 1] = [kind] * (last + 1 - first)
        for place, literal in enumerate(literals):
            starts = [start for start, _ in kinds[place][1:]] + [len(literal)]
            for (start, kind), end in zip(kinds[place], starts, strict=True):
                yield literal[start:end], kind
            if place < len(numbers):
                yield numbers[place], of_words[place]

    def _begin(self, turn: int, before: str, number: int) -> int:
        """Return where the turn begins in `before`, the text that the template writes between the preceding text and
        the turn's first."""
        prompt = self._prompt(turn)
        if prompt.strip() and prompt in before:
            return before.rindex(prompt) + len(prompt)
        if self._masked.slots[number].field == "content":
            tags = split(self._messages[turn]["content"])[0][0].strip()  # before its first word
            if tags not in before:
                raise UnclearError(f"changes {tags!r} at the beginning of an answer")
            return before.rindex(tags) if tags else len(before)
        plain = {"role": "assistant", "content": WORD}  # tool calls begin where a content would
        text = self._write([*self._messages[:turn], plain], self._masked.tools)
        header = "" if text is None else split(text)[0][-2]
        return _common(before, header) if header else len(before)

    def _prompt(self, turn: int) -> str:
        """Return the prompt that the template writes for an answer at this place; "" if it has none."""
        asked = turn > 0 and self._messages[turn - 1]["role"] != "assistant"
        for before in ([self._messages[:turn]] if asked else []) + [[PROBE]]:
            without = self._write(before, self._masked.tools)
            prompted = self._write(before, self._masked.tools, prompt=True)
            if without is not None and prompted is not None and prompted.startswith(without):
                return prompted[len(without) :]
        return ""

    def _end(self, turn: int, before: str, after: str, number: int) -> int:
        """Return where the turn ends in `after`, the text that the template writes between the turn's last text and the
        next."""
        last = turn == len(self._messages) - 1
        ended = self._messages[: turn + 1]
        alone = after if last else self._after(number, ended)
        if alone is None:  # some templates want a content of the last turn alone
            alone = self._after(number, with_content(ended))
        if alone is None:  # some templates write no conversation without a user's turn
            alone = self._after(number, [PROBE, *ended])
        following = self._after(number, [*self._messages, PROBE]) if last else after
        if alone is None:  # it does not write such a conversation: up to its first special token
            special = next((end for end in self._special.finditer(after) if not end[0].isspace()), None)
            if special is None and after.strip() and self._masked.slots[number].field == "tool call":
                raise UnclearError("writes no conversation that ends with these tool calls")
            return special.end() if special else 0
        if following is None or following.startswith(alone):
            return len(alone)
        # It writes a turn's end differently at the end of a conversation.
        middle = self._before_next(turn, following)
        rest = alone.removeprefix(middle)
        if not last and not middle.strip() and alone.strip():  # its end looks like what stands before the next turn
            raise UnclearError(f"writes {alone!r} after an answer at the end, but {following[:40]!r} between turns")
        if not self._special.sub("", rest):  # nothing but special tokens, there
            return len(alone) if last else len(middle)
        if rest != alone and before.rstrip().endswith(rest.rstrip()):  # the prompt of a next answer, asked for or not
            return len(middle)
        raise UnclearError(f"writes {alone!r} after an answer at the end, but {following[:40]!r} between turns")

    def _before_next(self, turn: int, following: str) -> str:
        """Return the text between a turn and the next without what the template writes before a turn like the next."""
        role = "user" if turn == len(self._messages) - 1 else self._messages[turn + 1]["role"]
        text = self._write([{"role": role, "content": WORD}], None)
        header = "" if text is None else split(text)[0][0]
        shared = _common(header[::-1], following[::-1])
        return following[: len(following) - shared] if shared else ""

    def _after(self, number: int, messages: Messages) -> str | None:
        """Return what the template writes from the last occurrence of this word to the next word."""
        text = self._write(messages, self._masked.tools)
        if text is None:
            return None
        literals, numbers = split(text)
        places = [place for place, found in enumerate(numbers) if found == number]
        return literals[places[-1] + 1] if places else None

    def _write(self, messages: Messages, tools: Any, *, prompt: bool = False) -> str | None:
        try:
            return self._template.render(self._form(messages), tools, prompt=prompt)
        except ERRORS:  # it is no conversation of the user's that is refused here
            return None


def _common(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
