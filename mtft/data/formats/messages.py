"""A conversation, and the checks that every row passes on its way to one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# ShareGPT, MFTCoder and their relatives
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class RowError(ValueError):
    """A row that can't be used: what is wrong, in which column, and the value there."""

    def __init__(self, what: str, column: str | None = None, value: object = None) -> None:
        super().__init__(what)
        self.what, self.column, self.value = what, column, value


@dataclass(frozen=True)
class Conversation:
    """What a row says: messages that end with an assistant turn, or plain `text` of which every token is learnt."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None


def as_text(value: object, column: str, *, empty: bool = True) -> str:
    """The value as a string that can be encoded; empty=False refuses blank text."""
    if not isinstance(value, str):
        raise RowError(f"expected text, found {type(value).__name__}", column, value)
    if not empty and not value.strip():
        raise RowError("is empty", column, value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate: \ud800 in JSON, or bytes that CSV could not decode
        raise RowError(f"invalid UTF-8 at character {error.start + 1}", column, value) from None
    return value


def as_messages(value: object, column: str) -> tuple[Message, ...]:
    """Checked messages, cut after the last assistant turn (nothing behind it is learnt or seen)."""
    value = _list(value, column, "messages")
    messages = [_message(item, f"{column}[{position}]") for position, item in enumerate(value)]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise RowError("there is no assistant turn to learn", column, value)
    if last == 0:
        raise RowError("the conversation starts with the assistant's only turn: there is no prompt", column, value)
    return tuple(messages[: last + 1])


def from_sharegpt(value: object, column: str, *, role: str, content: str) -> tuple[Message, ...]:
    """Messages of a list with other names: from/value (ShareGPT), human/bot (MFTCoder)."""
    turns = []
    for position, item in enumerate(_list(value, column, "turns")):
        here = f"{column}[{position}]"
        if not isinstance(item, dict):
            raise RowError("expected an object", here, item)
        if not {role, content} <= item.keys():
            raise RowError(f"expected the keys {role!r} and {content!r}", here, item)
        name = item[role] if not isinstance(item[role], str) else _OTHER_NAMES.get(item[role], item[role])
        turns.append({"role": name, "content": item[content]})
    return as_messages(turns, column)


def as_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """Tools as JSON schemas: a list of objects, or its JSON text."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        value = _json(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("expected a list of tool objects", "tools", value)
    return tuple(value)


def _list(value: object, column: str, what: str) -> list[Any]:
    """A list with something in it, or its JSON text (CSV, or doubly encoded JSON)."""
    if isinstance(value, str):
        value = _json(value, column)
    if not isinstance(value, list) or not value:
        raise RowError(f"expected a list of {what}", column, value)
    return value


def _message(item: object, column: str) -> Message:
    if not isinstance(item, dict):
        raise RowError("expected an object with role and content", column, item)
    message = {key: value for key, value in item.items() if value is not None}  # Arrow writes None for absent keys
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"role must be one of {', '.join(ROLES)}", f"{column}.role", role if role is not None else item)
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, f"{column}.content")
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if calls:
        message["tool_calls"] = _calls(message["tool_calls"], f"{column}.tool_calls")
    if content is None and calls:
        content = ""
    # an assistant turn that only calls a tool has no text; every other assistant turn must say something
    message["content"] = as_text(content, f"{column}.content", empty=role != "assistant" or calls)
    return message


def _calls(value: object, column: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: OpenAI's logs hold JSON text there, which templates would quote."""
    if not isinstance(value, list):
        raise RowError("expected a list of tool calls", column, value)
    calls = []
    for position, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("expected an object with function.name", f"{column}[{position}]", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{column}[{position}].function.arguments")
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def _joined(parts: Sequence[object], column: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError("only text can be learnt here: found another kind of content", column, part)
        texts.append(as_text(part.get("text"), column))
    return "".join(texts)


def _json(text: str, column: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"expected JSON: {error}", column, text) from None
