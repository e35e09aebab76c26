"""Where in a conversation's text the assistant's turns stand, from what the chat template itself writes.

A conversation is rendered once with every text in it replaced by a word of its own. What the template writes around
these words is the layout of all conversations of that shape; the actual texts, put in the place of the words, must give
exactly what the template makes of the actual conversation. So every character of the rendered text is known to be the
template's or that of one field, whatever the fields hold, and a text that the template leaves out is found.

A turn of the assistant is trained from the end of the generation prompt, or where that does not stand before it from
its first text, to the end of what the template writes after it where the conversation ends there. Where the template
marks answers with {% generation %}, these marks decide instead, and must enclose the assistant's texts and no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any

from deca_ds.data.template import BEGIN, END, ERRORS, ChatTemplate
from deca_ds.data.words import (
    FORMS,
    LEFT_OUT,
    OTHER,
    TRAINED,
    WORD,
    WRITTEN_PART,
    Form,
    Messages,
    Pieces,
    Slot,
    Spans,
    mask,
    match,
    split,
    with_content,
)
from deca_ds.errors import DataError

Conversation = Mapping[str, Any]
_PROBE = {"role": "user", "content": WORD}
_TEMPLATE = "the tokenizer's chat_template"
_KEPT = 4096  # layouts


@dataclass(frozen=True)
class Layout:
    """What the template writes. form: how the turns are given to it, one of FORMS."""

    pieces: Pieces
    form: Form


class Conversations:
    """Renders conversations (deca_ds/data/formats/chat.py has their shape) and finds the assistant's turns in the text.

    special: the tokenizer's special tokens. answers_only: whether only the assistant's turns are trained.
    """

    def __init__(self, template: ChatTemplate, special: Sequence[str], *, answers_only: bool = True):
        self.template, self.answers_only = template, answers_only
        self.ending = re.compile("|".join([r"\s+", *map(re.escape, sorted(special, key=len, reverse=True))]))
        self.layouts: dict[tuple[bool, str], Layout] = {}

    def render(self, conversation: Conversation, place: str) -> tuple[str, Spans, Spans]:
        """The text, the spans of it that are trained, and those of the assistant's turns that are not to be.

        Raises DataError with the place for a conversation that the template refuses, or does not write as it is.
        """
        where = f"{place}; {_TEMPLATE}"
        for tags in (False, True):  # a template may look for tags in a content, and write it differently for them
            masked, slots, texts = mask(conversation, tags=tags)
            key = tags, json.dumps(masked, ensure_ascii=False)
            layout = self.layouts.get(key)
            if layout is None:
                layout = _Finder(self, masked, slots, texts, conversation, where).layout()
                if len(self.layouts) >= _KEPT:
                    self.layouts.clear()
                self.layouts[key] = layout
            try:
                text = self.template.render(layout.form(conversation["messages"]), conversation["tools"])
            except ERRORS as error:
                raise _refusal(conversation, error, where) from error
            spans = match(layout.pieces, texts, text)
            if spans is not None:
                return text, spans[TRAINED], spans[LEFT_OUT]
        raise DataError(
            f"the chat template changes the texts of {shown(conversation)}, so answers cannot be told from the rest",
            where=where,
            fix="use a template that writes texts as they are, or remove the row",
        )

    def notes(self) -> list[str]:
        """What the user should know of the template."""
        try:
            text = self.template.render([_PROBE, {"role": "assistant", "content": "Zq00000qZ"}], marked=True)
        except ERRORS:
            return []
        after = split(text)[0][-1]
        if not after.replace(END, "").strip():
            return ["the chat template writes nothing behind the last answer: its end is not trained"]
        left = after[after.rfind(END) + 1 :].split()
        if END not in after or not left:
            return []
        return [f"the chat template's marks leave out what ends an answer ({left[0][:40]}): it is not trained"]


class _Finder:
    """Finds the layout of one shape of conversations.

    masked: the conversation with words in the place of its texts. slots, texts: what each word stands for.
    """

    def __init__(
        self,
        of: Conversations,
        masked: Conversation,
        slots: Sequence[Slot],
        texts: Sequence[str],
        conversation: Conversation,
        where: str,
    ):
        self.template, self.ending, self.answers_only = of.template, of.ending, of.answers_only
        self.masked, self.slots, self.texts = masked, slots, texts
        self.conversation, self.where = conversation, where
        self.messages: Messages = masked["messages"]
        self.tools = masked["tools"]
        self.assistant = [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]

    def layout(self) -> Layout:
        literals, numbers, form = self._whole()
        pieces: Iterable[tuple[str | int, int]]
        if not self.answers_only and not self.masked["untrained"]:
            plain = [literal.replace(BEGIN, "").replace(END, "") for literal in literals]
            pieces = [(piece, OTHER) for pair in zip_longest(plain, numbers, fillvalue="") for piece in pair]
        elif self.template.marks_answers:
            pieces = self._by_marks(literals, numbers)
        else:
            pieces = self._by_turns(literals, numbers, form)
        return Layout([piece for piece in pieces if piece[0] != ""], form)

    def _whole(self) -> tuple[list[str], list[int], Form]:
        """The literals of the template, the numbers of the words between them, and the form in which it writes all."""
        refused: DataError | None = None
        lost: DataError | None = None
        for form in FORMS:
            try:
                text = self.template.render(form(self.messages), self.tools, marked=True)
            except ERRORS as error:
                refused = refused or _refusal(self.conversation, error, self.where)
                continue
            if WRITTEN_PART.search(text):
                continue
            literals, numbers = split(text)
            left = next((n for n, slot in enumerate(self.slots) if not slot.optional and n not in numbers), None)
            if left is not None:
                lost = lost or self._lost(left)
                continue
            self._check_tools(text, form)
            return literals, numbers, form
        told = lost or refused
        assert told is not None
        raise told

    def _lost(self, number: int) -> DataError:
        slot = self.slots[number]
        role = self.messages[slot.turn]["role"]
        return DataError(
            f"the chat template does not write the {slot.field} of a turn of the {role}: {self.texts[number][:60]!r}",
            where=self.where,
            fix="use a template that writes it, or remove it from the data",
        )

    def _check_tools(self, text: str, form: Form) -> None:
        if not self.tools:
            return
        names = [tool["function"]["name"] for tool in self.tools]
        without = self._try(form, self.messages, None)
        if without == text.replace(BEGIN, "").replace(END, "") or not all(name in text for name in names):
            raise DataError(
                f"the chat template does not write the tools ({', '.join(names)})"[:300],
                where=self.where,
                fix="use a template that writes them, or remove the field 'tools'",
            )

    def _kind(self, turn: int) -> int:
        return LEFT_OUT if turn in self.masked["untrained"] else TRAINED

    def _by_marks(self, literals: list[str], numbers: list[int]) -> Iterator[tuple[str | int, int]]:
        """By {% generation %}. Raises DataError unless the marks enclose the assistant's texts and no others."""
        found: list[tuple[str | int, int]] = []  # pieces, each with the number of the mark that it is in, or 0
        owners = [-1]  # whose turn each mark is in
        inside, turn, claimed = False, -1, set[int]()
        for literal, number in zip(literals, [*numbers, None], strict=True):
            for part in re.split(f"([{BEGIN}{END}])", literal):
                if part in (BEGIN, END):
                    if inside == (part == BEGIN):
                        raise self._unclear("has marks within marks")
                    inside = not inside
                    owners += [turn] * inside
                else:
                    found.append((part, inside * (len(owners) - 1)))
            if number is None:
                break
            turn, field = self.slots[number].turn, self.slots[number].field
            found.append((number, inside * (len(owners) - 1)))
            if inside and turn not in self.assistant:
                raise self._unclear(f"marks a turn of the {self.messages[turn]['role']} as an answer")
            if not inside and turn in self.assistant and not self.slots[number].optional:
                raise self._unclear(f"leaves the {field} of an answer without a mark")
            if inside and len(owners) in claimed and owners[-1] != turn:
                raise self._unclear("marks several turns as one answer")
            if inside:
                claimed.add(len(owners))
                owners[-1] = turn
        if inside:
            raise self._unclear("has a mark without an end")
        for piece, mark in found:
            if mark and piece != "" and owners[mark] not in self.assistant:
                raise self._unclear(f"marks {piece!r}, which is no answer")
            yield piece, self._kind(owners[mark]) if mark else OTHER

    def _by_turns(self, literals: list[str], numbers: list[int], form: Form) -> Iterator[tuple[str | int, int]]:
        """By what the template writes where a conversation begins and ends with a turn."""
        kinds = [[(0, OTHER)] for _ in literals]  # of each literal: from which character on it is what
        of_words = [OTHER] * len(numbers)
        for turn in self.assistant:
            places = [place for place, number in enumerate(numbers) if self.slots[number].turn == turn]
            first, last = places[0], places[-1]
            if places != list(range(first, last + 1)):
                raise self._unclear("mixes an answer with other turns")
            kind = self._kind(turn)
            kinds[first].append((self._begin(turn, literals[first], numbers[first], form), kind))
            for place in range(first + 1, last + 1):
                kinds[place] = [(0, kind)]
            kinds[last + 1] = [
                (0, kind),
                (self._end(turn, literals[first], literals[last + 1], numbers[last], form), OTHER),
            ]
            of_words[first : last + 1] = [kind] * (last + 1 - first)
        for place, literal in enumerate(literals):
            starts = [start for start, _ in kinds[place][1:]] + [len(literal)]
            for (start, kind), end in zip(kinds[place], starts, strict=True):
                yield literal[start:end], kind
            if place < len(numbers):
                yield numbers[place], of_words[place]

    def _begin(self, turn: int, before: str, number: int, form: Form) -> int:
        """Where the turn begins in `before`, what the template writes between the text before it and its own first."""
        prompt = self._prompt(turn, form)
        if prompt.strip() and prompt in before:
            return before.rindex(prompt) + len(prompt)
        if self.slots[number].field == "content":
            tags = split(self.messages[turn]["content"])[0][0].strip()  # before its first word
            if tags not in before:
                raise self._unclear(f"changes {tags!r} at the beginning of an answer")
            return before.rindex(tags) if tags else len(before)
        plain = {"role": "assistant", "content": WORD}  # tool calls begin where a content would
        text = self._try(form, [*self.messages[:turn], plain], self.tools)
        header = "" if text is None else split(text)[0][-2]
        return _common(before, header) if header else len(before)

    def _prompt(self, turn: int, form: Form) -> str:
        """The prompt that the template writes for an answer at this place, "" if it has none."""
        asked = turn > 0 and self.messages[turn - 1]["role"] != "assistant"
        for before in ([self.messages[:turn]] if asked else []) + [[_PROBE]]:
            without = self._try(form, before, self.tools)
            prompted = self._try(form, before, self.tools, prompt=True)
            if without is not None and prompted is not None and prompted.startswith(without):
                return prompted[len(without) :]
        return ""

    def _end(self, turn: int, before: str, after: str, number: int, form: Form) -> int:
        """Where the turn has ended in `after`, what the template writes between its last text and the next."""
        last = turn == len(self.messages) - 1
        ended = self.messages[: turn + 1]
        alone = after if last else self._after(number, ended, form)
        if alone is None:  # some templates want a content of the last turn alone
            alone = self._after(number, with_content(ended), form)
        if alone is None:  # some templates write no conversation without a user's turn
            alone = self._after(number, [_PROBE, *ended], form)
        following = self._after(number, [*self.messages, _PROBE], form) if last else after
        if alone is None:  # it does not write such a conversation: up to its first special token
            special = next((end for end in self.ending.finditer(after) if not end[0].isspace()), None)
            if special is None and after.strip() and self.slots[number].field == "tool call":
                raise self._unclear("writes no conversation that ends with these tool calls")
            return special.end() if special else 0
        if following is None or following.startswith(alone):
            return len(alone)
        # It writes a turn's end differently at the end of a conversation.
        middle = self._before_next(turn, following, form)
        rest = alone.removeprefix(middle)
        if not last and not middle.strip() and alone.strip():  # its end looks like what stands before the next turn
            raise self._unclear(f"writes {alone!r} after an answer at the end, but {following[:40]!r} between turns")
        if not self.ending.sub("", rest):  # nothing but special tokens, there
            return len(alone) if last else len(middle)
        if rest != alone and before.rstrip().endswith(rest.rstrip()):  # the prompt of a next answer, asked for or not
            return len(middle)
        raise self._unclear(f"writes {alone!r} after an answer at the end, but {following[:40]!r} between turns")

    def _before_next(self, turn: int, following: str, form: Form) -> str:
        """What of the text between a turn and the next is not what the template writes before such a turn."""
        role = "user" if turn == len(self.messages) - 1 else self.messages[turn + 1]["role"]
        text = self._try(form, [{"role": role, "content": WORD}], None)
        header = "" if text is None else split(text)[0][0]
        shared = _common(header[::-1], following[::-1])
        return following[: len(following) - shared] if shared else ""

    def _after(self, number: int, messages: Messages, form: Form) -> str | None:
        """What the template writes after the last time that it writes this word, up to the next."""
        text = self._try(form, messages, self.tools)
        if text is None:
            return None
        literals, numbers = split(text)
        places = [place for place, found in enumerate(numbers) if found == number]
        return literals[places[-1] + 1] if places else None

    def _try(self, form: Form, messages: Messages, tools: Any, *, prompt: bool = False) -> str | None:
        try:
            return self.template.render(form(messages), tools, prompt=prompt)
        except ERRORS:  # it is no conversation of the user's that is refused here
            return None

    def _unclear(self, what: str) -> DataError:
        return DataError(
            f"the chat template {what}, so the answers in {shown(self.conversation)} cannot be told from the rest",
            where=self.where,
            fix="use a template that marks answers with {% generation %} and {% endgeneration %}",
        )


def _refusal(conversation: Conversation, error: Exception, where: str) -> DataError:
    return DataError(
        f"the chat template refuses {shown(conversation)}: {type(error).__name__}: {error}",
        where=where,
        fix="bring the turns into the order and the shape that the template asks for",
    )


def shown(conversation: Conversation) -> str:
    turns = (f"{turn['role']}: {turn.get('content') or 'tool calls'}" for turn in conversation["messages"])
    return "the conversation " + repr(" / ".join(turns)[:120])


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
