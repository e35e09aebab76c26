"""Conversations: messages (role and content) and ShareGPT (from and value), in the one shape that chat templates take.

An example is JSON text: {"messages": [{"role", "content", ...}], "tools": [...] or null, "untrained": [turns of the
assistant that are not trained], "wanted": [[turn, field], ...], links that the template must write out}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from deca_ds.data.formats.calls import calls_of, check_links, parse_json, tools_of
from deca_ds.data.formats.fields import (
    CONVERSATIONS,
    LEAVE_OUT,
    ExampleRules,
    Field,
    Format,
    Use,
    check_fields,
    missing,
    text_of,
    value_of,
)
from deca_ds.data.formats.plain import KTO, MEDIA, NO_MEDIA, PREFERENCES, ROW_WEIGHTS, refuse_unwanted
from deca_ds.errors import DataError, MissingValueError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",  # its value is the call, or a list of calls, as JSON text
    "observation": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("weight", "train", "training", "trainable", "loss", "loss_mask")  # of a turn: 1 and true, or 0 and false

ROW_FIELDS = (
    Field(("system",), Use.RENDERED, "as the first turn, where the conversation has no system turn of its own"),
    Field(("tools",), Use.RENDERED, "given to the chat template: a list of functions, or that as JSON text"),
    Field(("system_prompt",), Use.REFUSED, "name it system"),
    KTO,
    PREFERENCES,
    NO_MEDIA,
    Field(("documents",), Use.REFUSED, "documents are not given to the chat template"),
    Field(("functions", "function_call"), Use.REFUSED, "write them as tools and tool_calls"),
    Field(("chat_template", "chat_template_kwargs"), Use.REFUSED, "the tokenizer's template is used as it is"),
    ROW_WEIGHTS,
)
TURN_SWITCHES = Field(
    SWITCHES, Use.OBEYED, "of the assistant: `0`, `false`: not trained; `1`, `true`: trained; anything else is refused"
)
TURN_REFUSED = (
    Field(
        ("mask", "masked", "train_detail", "training_detail", "loss_weight", "loss_scale"),
        Use.REFUSED,
        "whole turns are trained or not: use train",
    ),
    Field((*MEDIA, "input_audio"), Use.REFUSED, "the model is trained on text alone"),
    Field(("function_call",), Use.REFUSED, "write it as tool_calls"),
    Field(("refusal", "prefix"), Use.REFUSED, "write what is to be trained into the content", harmless=(False,)),
)


def _messages(row: Mapping[str, Any], rules: ExampleRules, place: str, unused: set[str]) -> dict[str, Any]:
    return _conversation(row, MESSAGES, _openai_turn, place, unused)


def _sharegpt(row: Mapping[str, Any], rules: ExampleRules, place: str, unused: set[str]) -> dict[str, Any]:
    return _conversation(row, SHAREGPT, _sharegpt_turn, place, unused)


def _conversation(
    row: Mapping[str, Any],
    format: Format,
    reader: Callable[[Mapping[str, Any], str], dict[str, Any]],
    place: str,
    unused: set[str],
) -> dict[str, Any]:
    """Read a row as an example of a conversation. reader: makes a message of a turn and its place."""
    refuse_unwanted(row, place, unused)
    column = format.turns
    turns = value_of(row, column, place)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        keys = ", ".join(f'"{key}": ...' for key in format.sample[column][0])
        raise DataError(f"column {column!r} is no list of messages", where=place, fix=f"write [{{{keys}}}]")
    messages: list[dict[str, Any]] = []
    untrained: list[int] = []
    if not missing(row.get("system")):
        messages.append({"role": "system", "content": text_of(row, "system", place)})
    for number, turn in enumerate(turns, 1):
        at = f"{place}, message {number}"
        unused |= {f"{column}[].{name}" for name in check_fields(turn, format.turn_fields, at)}
        message = reader(turn, at)
        if message["role"] == "system" and not message.get("content"):
            continue  # a blank system prompt is none
        if message["role"] == "system" and messages and not missing(row.get("system")):
            raise DataError("a system turn beside the row's field 'system'", where=at, fix="keep one of them")
        if not _is_trained(turn, message["role"], at):
            untrained.append(len(messages))
        messages.append(message)
    if not messages:
        raise MissingValueError(f"column {column!r} has no turn with a content", where=place, fix=LEAVE_OUT)
    tools = tools_of(row, place)
    example = {"messages": messages, "tools": tools, "untrained": untrained, "wanted": check_links(messages, place)}
    return {"conversation": json.dumps(example, ensure_ascii=False)}


def _openai_turn(turn: Mapping[str, Any], at: str) -> dict[str, Any]:
    role = text_of(turn, "role", at)
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}", where=at, fix=f"known roles: {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role}
    calls = turn.get("tool_calls")
    calls = parse_json(calls, at, "tool_calls") if isinstance(calls, str) and calls.strip() else calls
    if calls:
        if role != "assistant":
            raise DataError(f"tool_calls in a turn of the {role}", where=at, fix="only the assistant calls tools")
        message["tool_calls"] = calls_of(calls, at)
    content = _content(turn, role, bool(calls), at)
    if content:
        message["content"] = content
    elif not calls:
        message["content"] = ""  # of a tool that answers nothing, or of a blank system prompt
    reasoning = {name: turn[name] for name in REASONING if not missing(turn.get(name))}
    if reasoning:
        if role != "assistant" or len(set(map(str, reasoning.values()))) > 1:
            raise DataError(
                f"{' and '.join(reasoning)} in a turn of the {role}", where=at, fix="write one, for the assistant"
            )
        message["reasoning_content"] = text_of(turn, next(iter(reasoning)), at)
    for name in ("name", "tool_call_id"):
        if not missing(turn.get(name)):
            message[name] = text_of(turn, name, at)
    return message


def _content(turn: Mapping[str, Any], role: str, calls: bool, at: str) -> str:
    """Return a turn's content as text; it may be "" only beside tool calls, and in turns of tools and of the system."""
    content = turn.get("content") if calls or role == "system" else value_of(turn, "content", at)
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                shown = part.get("type") if isinstance(part, dict) else part
                raise DataError(
                    f"a part of the content is no text: {shown!r}"[:200],
                    where=at,
                    fix='the model is trained on text alone; write {"type": "text", "text": ...}',
                )
            others = [name for name in part if name not in ("type", "text") and not missing(part[name])]
            if others:
                raise DataError(f"the field {others[0]!r} in a part of the content", where=at, fix="remove it")
        content = "".join(part["text"] for part in content)
    if missing(content) and (calls or role == "system"):
        return ""
    return text_of({**turn, "content": content}, "content", at, blank=role == "tool")


def _sharegpt_turn(turn: Mapping[str, Any], at: str) -> dict[str, Any]:
    given = text_of(turn, "from", at)
    role = SHAREGPT_ROLES.get(given)
    if role is None:
        raise DataError(f"unknown role {given!r}", where=at, fix=f"known roles: {', '.join(SHAREGPT_ROLES)}")
    if given == "function_call":
        value = value_of(turn, "value", at)
        calls = parse_json(value, at, "the value of a function_call") if isinstance(value, str) else value
        return {"role": role, "tool_calls": calls_of(calls if isinstance(calls, list) else [calls], at)}
    if role == "system" and missing(turn.get("value")):
        return {"role": role, "content": ""}
    return {"role": role, "content": text_of(turn, "value", at, blank=role == "tool")}


def _is_trained(turn: Mapping[str, Any], role: str, at: str) -> bool:
    said = {name: turn[name] for name in SWITCHES if turn.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1) or isinstance(value, str):
            raise DataError(
                f"the field {name!r} is {value!r}"[:200], where=at, fix="a turn is trained (1, true) or not (0, false)"
            )
        if value and role != "assistant":
            raise DataError(
                f"the field {name!r} asks to train a turn of the {role}",
                where=at,
                fix="only the assistant's are trained",
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise DataError(f"{' and '.join(said)} contradict each other", where=at, fix="keep one of them")
    return all(said.values())


_TRAINED = "the assistant's turns and what ends them"
MESSAGES = Format(
    name="messages",
    sample={"messages": [{"role": "user", "content": "2 and 3?"}, {"role": "assistant", "content": "5"}]},
    trained=_TRAINED,
    fields=(Field(("messages",), Use.RENDERED, "turn by turn, by the chat template"), *ROW_FIELDS),
    turn_fields=(
        Field(("role",), Use.RENDERED, f"{', '.join(ROLES)}; any other is refused"),
        Field(("content",), Use.RENDERED, "text, or a list of parts that are text; any other part is refused"),
        Field(REASONING, Use.RENDERED, "of the assistant"),
        Field(("tool_calls",), Use.RENDERED, "of the assistant; arguments as an object, or that as JSON text"),
        Field(
            ("tool_call_id",),
            Use.RENDERED,
            "where the template writes it; it may not where answers come in the order of the calls",
        ),
        Field(("name",), Use.RENDERED, "a template need not write the name of the function that was called"),
        TURN_SWITCHES,
        *TURN_REFUSED,
    ),
    columns=lambda rules: ("messages",),
    tables=False,
    turns="messages",
    features=CONVERSATIONS,
    example=_messages,
)
SHAREGPT = Format(
    name="sharegpt",
    sample={"conversations": [{"from": "human", "value": "2 and 3?"}, {"from": "gpt", "value": "5"}]},
    trained=_TRAINED,
    fields=(Field(("conversations",), Use.RENDERED, "turn by turn, by the chat template"), *ROW_FIELDS),
    turn_fields=(
        Field(("from",), Use.RENDERED, f"{', '.join(SHAREGPT_ROLES)}; any other is refused"),
        Field(("value",), Use.RENDERED, "text; of a function_call the call, or a list of calls, as JSON text"),
        TURN_SWITCHES,
        *TURN_REFUSED,
        Field(("tool_calls", "tool_call_id", "name", *REASONING), Use.REFUSED, "use data.format=messages"),
    ),
    columns=lambda rules: ("conversations",),
    tables=False,
    turns="conversations",
    features=CONVERSATIONS,
    example=_sharegpt,
)
