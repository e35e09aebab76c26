"""Where in a conversation's text the assistant's turns stand, from what the chat template itself writes.

A conversation is rendered once with every text in it replaced by a word of its own. What the template writes around
these words is the layout of all conversations of that shape; the actual texts, put in the place of the words, must give
exactly what the template makes of the actual conversation. So every character of the rendered text is known to be the
template's or that of one field, whatever the fields hold, and a text that the template leaves out is found.

Where the template marks answers with {% generation %}, these marks say what is trained, and must enclose the
assistant's texts and no others. Else turns.py finds where each turn begins and ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from deca_ds.data.template import BEGIN, END, ERRORS, ChatTemplate
from deca_ds.data.turns import PROBE, Turns, UnclearError
from deca_ds.data.words import (
    FORMS,
    LEFT_OUT,
    OTHER,
    TRAINED,
    WRITTEN_PART,
    Form,
    Masked,
    Pieces,
    Spans,
    mask,
    match,
    split,
)
from deca_ds.errors import DataError

Conversation = Mapping[str, Any]
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
        self.special = re.compile("|".join([r"\s+", *map(re.escape, sorted(special, key=len, reverse=True))]))
        self.layouts: dict[tuple[bool, str], Layout] = {}

    def render(self, conversation: Conversation, place: str) -> tuple[str, Spans, Spans]:
        """Return the text, the spans of it that are trained, and those of the assistant's turns that are not to be.

        Raises DataError with the place for a conversation that the template refuses, or does not write as it is.
        """
        where = f"{place}; {_TEMPLATE}"
        for tags in (False, True):  # a template may look for tags in a content, and write it differently for them
            masked = mask(conversation, tags=tags)
            layout = self.layouts.get((tags, masked.shape))
            if layout is None:
                layout = self._find_layout(masked, conversation, where)
                if len(self.layouts) >= _KEPT:
                    self.layouts.clear()
                self.layouts[tags, masked.shape] = layout
            try:
                text = self.template.render(layout.form(conversation["messages"]), conversation["tools"])
            except ERRORS as error:
                raise _refusal(conversation, error, where) from error
            spans = match(layout.pieces, masked.texts, text)
            if spans is not None:
                return text, spans[TRAINED], spans[LEFT_OUT]
        raise DataError(
            f"the chat template changes the texts of {shown(conversation)}, so nothing shows which parts are answers",
            where=where,
            fix="use a template that writes texts as they are, or remove the row",
        )

    def notes(self) -> list[str]:
        """Say what the user should know of the template."""
        try:
            text = self.template.render([PROBE, {"role": "assistant", "content": "Zq00000qZ"}], marked=True)
        except ERRORS:
            return []
        after = split(text)[0][-1]
        if not after.replace(END, "").strip():
            return ["the chat template writes nothing behind the last answer: its end is not trained"]
        left = after[after.rfind(END) + 1 :].split()
        if END not in after or not left:
            return []
        return [f"the chat template's marks leave out what ends an answer ({left[0][:40]}): it is not trained"]

    def _find_layout(self, masked: Masked, conversation: Conversation, where: str) -> Layout:
        """Find the layout of all conversations of this shape."""
        literals, numbers, form = self._write(masked, conversation, where)
        pieces: Iterable[tuple[str | int, int]]
        if not self.answers_only and not masked.untrained:
            plain = [literal.replace(BEGIN, "").replace(END, "") for literal in literals]
            pieces = [(piece, OTHER) for pair in zip_longest(plain, numbers, fillvalue="") for piece in pair]
        elif self.template.marks_answers:
            pieces = _by_marks(masked, literals, numbers)
        else:
            pieces = Turns(self.template, masked, form, self.special).pieces(literals, numbers)
        try:
            return Layout([piece for piece in pieces if piece[0] != ""], form)
        except UnclearError as unclear:
            raise DataError(
                f"the chat template {unclear}, so nothing shows which parts of {shown(conversation)} are answers",
                where=where,
                fix="use a template that marks answers with {% generation %} and {% endgeneration %}",
            ) from None

    def _write(self, masked: Masked, conversation: Conversation, where: str) -> tuple[list[str], list[int], Form]:
        """Return the literals of the template, the numbers of the words between them, and the form in which it writes
        all words."""
        refused: DataError | None = None
        lost: DataError | None = None
        for form in FORMS:
            try:
                text = self.template.render(form(masked.messages), masked.tools, marked=True)
            except ERRORS as error:
                refused = refused or _refusal(conversation, error, where)
                continue
            if WRITTEN_PART.search(text):
                continue
            literals, numbers = split(text)
            left = next((n for n, slot in enumerate(masked.slots) if not slot.optional and n not in numbers), None)
            if left is not None:
                lost = lost or _lost(masked, left, where)
                continue
            self._check_tools(text, masked, form, where)
            return literals, numbers, form
        told = lost or refused
        assert told is not None
        raise told

    def _check_tools(self, text: str, masked: Masked, form: Form, where: str) -> None:
        if not masked.tools:
            return
        names = [tool["function"]["name"] for tool in masked.tools]
        try:
            without = self.template.render(form(masked.messages))
        except ERRORS:
            without = None
        if without == text.replace(BEGIN, "").replace(END, "") or not all(name in text for name in names):
            raise DataError(
                f"the chat template does not write the tools ({', '.join(names)})"[:300],
                where=where,
                fix="use a template that writes them, or remove the field 'tools'",
            )


def _by_marks(masked: Masked, literals: Sequence[str], numbers: Sequence[int]) -> Iterator[tuple[str | int, int]]:
    """Yield pieces (see `Pieces`) by the marks {% generation %}. Raises UnclearError unless these enclose the
    assistant's texts and no others."""
    found: list[tuple[str | int, int]] = []  # pieces, each with the number of the mark that it is in, or 0
    owners = [-1]  # whose turn each mark is in
    answers = masked.answers
    inside, turn, claimed = False, -1, set[int]()
    for literal, number in zip(literals, [*numbers, None], strict=True):
        for part in re.split(f"([{BEGIN}{END}])", literal):
            if part in (BEGIN, END):
                if inside == (part == BEGIN):
                    raise UnclearError("has marks within marks")
                inside = not inside
                owners += [turn] * inside
            else:
                found.append((part, inside * (len(owners) - 1)))
        if number is None:
            break
        turn, field = masked.slots[number].turn, masked.slots[number].field
        found.append((number, inside * (len(owners) - 1)))
        if inside and turn not in answers:
            raise UnclearError(f"marks a turn of the {masked.messages[turn]['role']} as an answer")
        if not inside and turn in answers and not masked.slots[number].optional:
            raise UnclearError(f"leaves the {field} of an answer without a mark")
        if inside and len(owners) in claimed and owners[-1] != turn:
            raise UnclearError("marks several turns as one answer")
        if inside:
            claimed.add(len(owners))
            owners[-1] = turn
    if inside:
        raise UnclearError("has a mark without an end")
    for piece, mark in found:
        if mark and piece != "" and owners[mark] not in answers:
            raise UnclearError(f"marks {piece!r}, which is no answer")
        yield piece, masked.kind(owners[mark]) if mark else OTHER


def _lost(masked: Masked, number: int, where: str) -> DataError:
    slot = masked.slots[number]
    role = masked.messages[slot.turn]["role"]
    return DataError(
        f"the chat template does not write the {slot.field} of a turn of the {role}: {masked.texts[number][:60]!r}",
        where=where,
        fix="use a template that writes it, or remove it from the data",
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
