"""Tools, calls of them, and which call a tool's turn answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deca_ds.data.formats.fields import encodable, missing
from deca_ds.data.strict_json import parse
from deca_ds.errors import DataError

_CALL = 'write [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'


def calls_of(calls: Any, at: str) -> list[dict[str, Any]]:
    """Return tool calls as chat templates expect them: arguments as an object. Raises DataError for anything else."""
    if not isinstance(calls, list):
        raise DataError(f"tool_calls is a {type(calls).__name__}, no list", where=at, fix=_CALL)
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or missing(function["name"]):
            raise DataError(f"a tool call without a function's name: {call!r}"[:200], where=at, fix=_CALL)
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = parse_json(arguments, at, "the arguments of a tool call") if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise DataError(f"the arguments of a tool call are no object: {arguments!r}"[:200], where=at, fix=_CALL)
        known = {"function", "id", "type", "index", "name", "arguments", "parameters"}
        others = [
            name for name in {**call, **function} if name not in known and not missing(({**call, **function})[name])
        ]
        if others:
            raise DataError(f"the field {others[0]!r} in a tool call", where=at, fix=_CALL)
        one = {"type": "function", "function": {"name": function["name"], "arguments": _encodable(arguments)}}
        made.append(({"id": str(call["id"])} if not missing(call.get("id")) else {}) | one)
    return made


def tools_of(row: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """Return the tools that a row describes, as chat templates expect them; None for none. Raises DataError for
    anything else."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, place, "the field 'tools'") if tools.strip() else None
    if not tools:
        return None
    fix = 'write [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]'
    if not isinstance(tools, list):
        raise DataError(f"the field 'tools' is a {type(tools).__name__}, no list", where=place, fix=fix)
    made = []
    for tool in tools:
        tool = {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"a tool without a function's name: {tool!r}"[:200], where=place, fix=fix)
        made.append(_encodable(tool))
    return made


def check_links(messages: Sequence[Mapping[str, Any]], place: str) -> list[list[Any]]:
    """Return [turn, field] of the names and ids that a template must write, because nothing else in the text tells
    them.

    Whose answer a tool's turn is follows from the order of the calls before it, and so does the name of its function:
    a template need not repeat either. Raises DataError for an answer to no call.
    """
    wanted: list[list[Any]] = []
    open_calls: list[Mapping[str, Any]] = []
    for place_of_turn, message in enumerate(messages):
        if message["role"] != "tool":
            open_calls = list(message.get("tool_calls", ()))
            wanted += [[place_of_turn, name] for name in ("name", "tool_call_id") if name in message]
            continue
        at = f"{place}, message {place_of_turn + 1}"
        matching: Sequence[int] = range(len(open_calls))
        ids = [call.get("id") for call in open_calls]
        if "tool_call_id" in message and any(ids):
            matching = [index for index in matching if ids[index] == message["tool_call_id"]]
            if not matching:
                raise DataError(
                    f"tool_call_id {message['tool_call_id']!r} is that of no call before", where=at, fix="name the call"
                )
        names = [call["function"]["name"] for call in open_calls]
        if "name" in message and names[(matching or [0])[0] : (matching or [0])[0] + 1] != [message["name"]]:
            wanted.append([place_of_turn, "name"])
        if "tool_call_id" in message and list(matching)[:1] != [0]:
            wanted.append([place_of_turn, "tool_call_id"])
        if matching:
            del open_calls[matching[0]]
    return wanted


def parse_json(text: str, at: str, what: str) -> Any:
    """Parse JSON in a row. what: the text is, for the message. Raises DataError where it is no JSON."""
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{what} cannot be read as JSON ({error}): {text[:60]!r}", where=at, fix="repair or remove the row"
        ) from error


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {encodable(str(key)): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value
