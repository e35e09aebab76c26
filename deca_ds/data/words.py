"""Conversations with a word in the place of each text, texts put back in the place of the words, and the forms in which
templates want contents and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OTHER, TRAINED, LEFT_OUT = range(3)  # what a character is: no answer's, a trained one's, or one's that is not to be
WORD = "Zq99999qZ"  # one that stands for no text
WRITTEN_PART = re.compile(r"""["']type["']: ["']text["']""")  # in a text, a list of parts instead of their texts
Pieces = Sequence[tuple["str | int", int]]  # literal text and the numbers of texts, each OTHER, TRAINED or LEFT_OUT
Messages = list[dict[str, Any]]
Form = Callable[[Messages], Messages]
Spans = list[tuple[int, int]]  # of characters: first, and the one after the last
_WORD = re.compile(r"Zq(\d{5})qZ")  # nine letters and digits, which is what Mistral's templates want of an id
_TAG = re.compile(r"(\s*(?:<[^<>]{1,40}>|\[/?[A-Z_ ]{2,40}\])\s*)")  # what templates may look for in a content


@dataclass(frozen=True)
class Slot:
    """A text of a conversation: of which turn and field. optional: the template need not write it."""

    turn: int
    field: str
    optional: bool


@dataclass(frozen=True)
class Masked:
    """A conversation with a word in the place of each text. slots, texts: what each word stands for. untrained: turns
    of the assistant that are not to be trained. shape: the same for conversations that differ in their texts alone."""

    messages: Messages
    tools: Any
    untrained: Sequence[int]
    slots: Sequence[Slot]
    texts: Sequence[str]
    shape: str

    @property
    def answers(self) -> list[int]:
        """The assistant's turns."""
        return [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]

    def kind(self, turn: int) -> int:
        """Return what the characters of an answer are: TRAINED or LEFT_OUT."""
        return LEFT_OUT if turn in self.untrained else TRAINED


class _Words:
    """The words of a conversation, numbered, and what each stands for."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.texts: list[str] = []

    def mask(self, value: Any, turn: int, field: str, optional: bool = False) -> Any:
        """Return `value` with a word in the place of each text in it that is not blank."""
        if isinstance(value, dict):
            return {key: self.mask(item, turn, field, optional) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mask(item, turn, field, optional) for item in value]
        if not isinstance(value, str) or not value.strip():
            return value
        self.slots.append(Slot(turn, field, optional))
        self.texts.append(value)
        return f"Zq{len(self.slots) - 1:05}qZ"

    def mask_between_tags(self, content: Any, turn: int) -> Any:
        """Return a content of which tags stay where they are, with the blanks around them."""
        parts = _TAG.split(content)
        if not any(map(str.strip, parts[::2])):  # there is nothing but tags
            return self.mask(content, turn, "content")
        return "".join(part if place % 2 else self.mask(part, turn, "content") for place, part in enumerate(parts))

    def mask_call(self, call: Mapping[str, Any], turn: int) -> dict[str, Any]:
        """Return a tool call, whose id the template need not write."""
        named = {"id": self.mask(call["id"], turn, "id of a tool call", True)} if "id" in call else {}
        return {**named, "type": call["type"], "function": self.mask(call["function"], turn, "tool call")}


def mask(conversation: Mapping[str, Any], *, tags: bool) -> Masked:
    """Put a word in the place of each text. tags: let tags stay where they are in a content, with the blanks around
    them."""
    words = _Words()
    wanted = [tuple(link) for link in conversation["wanted"]]
    messages = []
    for turn, message in enumerate(conversation["messages"]):
        masked = {"role": message["role"]}
        for field, value in message.items():
            if field == "role":
                continue
            if field == "content" and tags:
                masked[field] = words.mask_between_tags(value, turn)
            elif field == "tool_calls":
                masked[field] = [words.mask_call(call, turn) for call in value]
            else:
                optional = field in ("name", "tool_call_id") and (turn, field) not in wanted
                masked[field] = words.mask(value, turn, field, optional)
        messages.append(masked)
    shape = json.dumps({**conversation, "messages": messages}, ensure_ascii=False)
    return Masked(messages, conversation["tools"], conversation["untrained"], words.slots, words.texts, shape)


def split(text: str) -> tuple[list[str], list[int]]:
    """Return the literals of a rendered text, and the numbers of the words between them."""
    parts = _WORD.split(text)
    return parts[::2], [int(number) for number in parts[1::2]]


def match(pieces: Pieces, texts: Sequence[str], text: str) -> tuple[Spans, ...] | None:
    """Return the spans of each kind, if `text` is the pieces with the texts in the place of their numbers; else
    None."""
    spans: tuple[Spans, ...] = ([], [], [])
    position = 0
    for place, (piece, kind) in enumerate(pieces):
        if isinstance(piece, int):
            following = pieces[place + 1][0] if place + 1 < len(pieces) else ""
            following = following if isinstance(following, str) else ""
            found = next((one for one in _spellings(texts[piece]) if text.startswith(one + following, position)), None)
            if found is None:
                return None
        elif not text.startswith(piece, position):
            return None
        else:
            found = piece
        end = position + len(found)
        if spans[kind] and spans[kind][-1][1] == position:
            spans[kind][-1] = (spans[kind][-1][0], end)
        elif end > position:
            spans[kind].append((position, end))
        position = end
    return spans if position == len(text) else None


def _spellings(text: str) -> Iterator[str]:
    """Yield the forms in which a template may write a text: as it is, without blanks at its ends, as a JSON string."""
    yield text
    for blanks in (None, "\n"):
        yield text.strip(blanks)
        yield text.lstrip(blanks)
        yield text.rstrip(blanks)
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]


def _as_is(messages: Messages) -> Messages:
    return messages


def _content_as_parts(messages: Messages) -> Messages:
    """Write contents as lists of parts, for templates that expect these. Others may print the list: WRITTEN_PART."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if turn.get("content") else turn
        for turn in messages
    ]


def _arguments_as_text(messages: Messages) -> Messages:
    """Write the arguments of tool calls as JSON text, for templates that print them as they are given."""

    def call(one: dict[str, Any]) -> dict[str, Any]:
        function = one["function"]
        return {**one, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**turn, "tool_calls": [call(one) for one in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in messages
    ]


def with_content(messages: Messages) -> Messages:
    """Give every turn a content, for templates that want it."""
    return [{"content": "", **turn} for turn in messages]


def _with_content_and_arguments_as_text(messages: Messages) -> Messages:
    return _arguments_as_text(with_content(messages))


FORMS: tuple[Form, ...] = (
    _as_is,
    with_content,
    _content_as_parts,
    _arguments_as_text,
    _with_content_and_arguments_as_text,
)
