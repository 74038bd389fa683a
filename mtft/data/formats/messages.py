"""A conversation, and the checks that every row passes on its way to one.

Messages come out in the spelling of OpenAI's and transformers' chat templates: roles `system`, `developer`, `user`,
`assistant`, `tool`; `content` a text; `tool_calls` [{"type": "function", "function": {"name", "arguments": object}}].
One key is ours, `train` of an assistant turn: False for context only, a number for how much its tokens count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtft.common.own_files import type_name
from mtft.data.readers.json_stream import unique_keys

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# Other names of roles: ShareGPT, MFTCoder, ms-swift, OpenAI's first function calls, Llama 3.1
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALLERS = ("function_call", "tool_call")  # roles of turns whose text is a call, as JSON
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which data carry an answer's thoughts
_ARGUMENTS = ("arguments", "parameters", "input")  # of a call: OpenAI, Llama 3.1, Anthropic
# Keys of a turn that say whether it is learnt. `weight` (OpenAI, mistral-finetune, axolotl) also says how much.
_LEARNT = ("weight", "train", "loss")
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # beside 0; a larger one is some other number, a time or an id
# Keys that would change what is learnt in a way that is not offered: never passed over in silence.
_SAY_WEIGHT = "say which turns are learnt with `weight` (0: not; 1: as ever; another: so much) of a turn"
_PICTURES = ("image", "images", "image_url", "video", "videos", "audio", "audios")
_REFUSED = {
    "loss_mask": _SAY_WEIGHT,
    "masked": _SAY_WEIGHT,
    **dict.fromkeys(("loss_scale", "mask", "training", "train_detail"), _SAY_WEIGHT),
    **dict.fromkeys(_PICTURES, "only text can be learnt here"),
}
# Columns of the same kind, of which one says what is learnt and the other is the opposite.
_REFUSED_COLUMNS = {
    **_REFUSED,
    **dict.fromkeys(
        ("rejected", "rejected_response", "rejected_messages", "chosen"), "preferences can't be learnt yet"
    ),
}


class RowError(ValueError):
    """A row that can't be used: what is wrong, in which column, and the value there."""

    def __init__(self, what: str, column: str | None = None, value: object = None) -> None:
        super().__init__(what)
        self.what, self.column, self.value = what, column, value


@dataclass(frozen=True)
class Conversation:
    """What a row says: messages that end with an assistant turn, or plain `text` of which every token is learnt.

    weight: how much the row counts; 0: it is not learnt.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    weight: float = 1.0


def as_text(value: object, column: str, *, empty: bool = True) -> str:
    """The value as a string that can be encoded; empty=False refuses blank text."""
    if not isinstance(value, str):
        raise RowError(f"expected text, found {type_name(type(value))}", column, value)
    if not empty and not value.strip():
        raise RowError("is empty", column, value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate: \ud800 in JSON, or bytes that CSV could not decode
        raise RowError(f"invalid UTF-8 at character {error.start + 1}", column, value) from None
    return value


def is_blank(value: object) -> bool:
    """Whether a cell says nothing: null, an empty list or object, blank text."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def is_empty_list(value: object) -> bool:
    """Whether a cell that should hold a list or an object holds nothing, also as JSON text (CSV)."""
    return is_blank(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def as_messages(value: object, column: str, **keys: str) -> tuple[Message, ...]:
    """`check_messages` for training: cut after the last turn that is learnt (nothing behind it is learnt or seen)."""
    messages = check_messages(value, column, **keys)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("there is no assistant turn to learn", column, value)
    learnt = [i for i in answers if messages[i].get("train", True)]
    if not learnt:
        raise RowError("no assistant turn is learnt: all have weight 0 (or train: false)", column, value)
    if learnt[-1] == 0:
        raise RowError("the conversation starts with the assistant's only turn: there is no prompt", column, value)
    return messages[: learnt[-1] + 1]


def check_messages(value: object, column: str, *, role: str = "role", content: str = "content") -> tuple[Message, ...]:
    """Messages of any roles in one spelling. role, content: what the keys are called (ShareGPT: from, value)."""
    messages: list[Message] = []
    calls_before = False
    for position, item in enumerate(_list(value, column, "messages" if role == "role" else "turns")):
        here = f"{column}[{position}]"
        if not isinstance(item, dict):
            raise RowError(f"expected an object with {role} and {content}", here, item)
        if role != "role":
            if not {role, content} <= item.keys():
                raise RowError(f"expected the keys {role!r} and {content!r}", here, item)
            rest = {key: part for key, part in item.items() if key not in (role, content)}
            if twice := rest.keys() & {"role", "content"}:
                raise RowError(
                    f"two keys say the same: {sorted(twice)[0]!r} beside {role!r} and {content!r}", here, item
                )
            item = {**rest, "role": item[role], "content": item[content]}
        try:
            message = _message(item, here)
        except RowError as error:  # say the user's key, not ours
            place = (error.column or "").replace(f"{here}.role", f"{here}.{role}")
            raise RowError(error.what, place.replace(f"{here}.content", f"{here}.{content}"), error.value) from None
        calls = item["role"] in _CALLERS
        if calls and calls_before:  # calls that were made at the same time, one turn each (ms-swift)
            if (one := _but_calls(messages[-1])) != (other := _but_calls(message)):
                raise RowError(f"calls of one turn, and their other keys differ: {one} and {other}", here, item)
            messages[-1] = {**messages[-1], "tool_calls": messages[-1]["tool_calls"] + message["tool_calls"]}
        else:
            messages.append(message)
        calls_before = calls
    return tuple(messages)


def as_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """Tools as JSON schemas, each {"type": "function", "function": {...}}: a list of objects, or its JSON text."""
    if is_empty_list(value):
        return None
    if isinstance(value, str):
        value = _json(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("expected a list of tool objects", "tools", value)
    wrapped = ({"type": "function", "function": tool} if "name" in tool else tool for tool in value)
    return tuple(wrapped) or None


def history_turns(value: object, column: str) -> tuple[Message, ...]:
    """Earlier turns [[prompt, response], ...], as LLaMA-Factory has them; their responses are learnt as well."""
    if is_empty_list(value):
        return ()
    turns: list[Message] = []
    for position, pair in enumerate(_list(value, column, "pairs of prompt and response")):
        here = f"{column}[{position}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("expected a pair of prompt and response", here, pair)
        turns.append({"role": "user", "content": as_text(pair[0], f"{here}[0]")})
        turns.append({"role": "assistant", "content": as_text(pair[1], f"{here}[1]", empty=False)})
    return tuple(turns)


def with_system(system: object, turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns with the system message of a column in front."""
    if is_blank(system):
        return tuple(turns)
    if turns and turns[0]["role"] in ("system", "developer"):
        raise RowError("there are two system messages: this column, and the first message", "system", system)
    return ({"role": "system", "content": as_text(system, "system")}, *turns)


def refused_column(column: str, value: object) -> str | None:
    """Why a column that no format reads can't be passed over: it would change what is learnt. None if it can be."""
    if is_empty_list(value):
        return None
    if column == "history":
        return "earlier turns are read beside prompt and response only: put them into the messages"
    if column == "weight":
        neutral = isinstance(value, int | float) and value == 1
        return None if neutral else "weights of rows are read where tasks.*.row_weight names their column"
    if column == "label" and value is False:
        return "it says that this answer is a bad one (KTO), and it would be learnt: leave such rows out"
    return _REFUSED_COLUMNS.get(column)


def _list(value: object, column: str, what: str) -> list[Any]:
    """A list with something in it, or its JSON text (CSV, or doubly encoded JSON)."""
    if isinstance(value, str):
        value = _json(value, column)
    if not isinstance(value, list) or not value:
        raise RowError(f"expected a list of {what}", column, value)
    return value


def _message(item: Mapping[str, Any], column: str) -> Message:
    """One message in our spelling."""
    message = {key: value for key, value in item.items() if value is not None}
    said = message.get("role")
    role = _OTHER_NAMES.get(said, said) if isinstance(said, str) else said
    if role in _CALLERS:
        message["tool_calls"] = _calls_of_text(message.pop("content", None), f"{column}.content")
        role = "assistant"
    if role not in ROLES:
        others = ", ".join(_OTHER_NAMES | dict.fromkeys(_CALLERS))
        what = f"role must be one of {', '.join(ROLES)} (or {others})"
        raise RowError(what, f"{column}.role", said if said is not None else item)
    message["role"] = role
    for key in _REFUSED.keys() & message.keys():
        if not is_empty_list(message[key]):
            raise RowError(f"is not read: {_REFUSED[key]}", f"{column}.{key}", message[key])
        del message[key]
    _take_train(message, column)
    calls = _take_calls(message, column)
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, f"{column}.content")
    if content is None and calls:
        content = ""
    # an assistant turn that only calls a tool has no text; every other assistant turn must say something
    message["content"] = as_text(content, f"{column}.content", empty=role != "assistant" or calls)
    for key in (*REASONING, "name"):
        if key in message:
            as_text(message[key], f"{column}.{key}")
    return message


def _take_train(message: Message, column: str) -> None:
    """Replaces `weight`, `train` and `loss` by our `train` where the turn counts otherwise than 1."""
    meant: dict[str, float] = {}
    for key in _LEARNT:
        if key not in message:
            continue
        value = message.pop(key)
        if key == "weight":
            meant[key] = float(value) if isinstance(value, bool) else as_weight(value, f"{column}.{key}")
        elif isinstance(value, bool | int | float) and value in (0, 1):
            meant[key] = float(value)
        else:
            raise RowError("a turn is learnt or not: expected False or True", f"{column}.{key}", value)
        if meant[key] and message["role"] != "assistant":
            raise RowError("only turns of the assistant can be learnt", f"{column}.{key}", value)
    if len({weight > 0 for weight in meant.values()}) > 1:
        raise RowError("the turn is said to be learnt and not to be", column)
    weight = meant.get("weight", min(meant.values(), default=1.0))
    if weight != 1 and message["role"] == "assistant":
        message["train"] = weight or False


def as_weight(value: object, column: str) -> float:
    """A weight of tokens or rows: a number from LEAST_WEIGHT to MOST_WEIGHT, or 0."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if number == 0 or LEAST_WEIGHT <= number <= MOST_WEIGHT:
        return float(number)
    what = f"expected a weight: 0, or a number from {LEAST_WEIGHT:f} to {MOST_WEIGHT:,.0f}"
    raise RowError(what, column, value)


def _take_calls(message: Message, column: str) -> bool:
    """Puts all calls under `tool_calls`, in one spelling; True if there are any."""
    calls, legacy = message.pop("tool_calls", None), message.pop("function_call", None)
    found: list[dict[str, Any]] = []
    if not is_empty_list(calls):
        calls = _json(calls, f"{column}.tool_calls") if isinstance(calls, str) else calls
        found += _calls(calls, f"{column}.tool_calls")
    if not is_empty_list(legacy):
        found += _calls([legacy], f"{column}.function_call")
    if found and message["role"] != "assistant":
        raise RowError("only the assistant calls tools", f"{column}.tool_calls", calls or legacy)
    if found:
        message["tool_calls"] = found
    return bool(found)


def _calls(value: object, column: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: OpenAI's logs hold JSON text there, which templates would quote."""
    if not isinstance(value, list):
        raise RowError("expected a list of tool calls", column, value)
    calls = []
    for position, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("expected an object with function.name", f"{column}[{position}]", call)
        here = f"{column}[{position}]"
        as_text(function["name"], f"{here}.function.name", empty=False)
        around = {key: call[key] for key in ("type", "id", "index") if call.get(key) is not None}
        said = [key for key in _ARGUMENTS if function.get(key) is not None]
        unknown = function.keys() - {"name", "type", "id", "index", *_ARGUMENTS}
        unknown |= call.keys() - {"function", "type", "id", "index", *(function if function is call else ())}
        if unknown or len(said) > 1:
            what = f"a call has keys that are not read: {', '.join(sorted(unknown) or said[1:])}"
            raise RowError(what, here, call)
        arguments = function[said[0]] if said else {}
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{here}.function.arguments")
        if not isinstance(arguments, dict):
            raise RowError("expected an object of arguments", f"{here}.function.arguments", arguments)
        try:
            json.dumps(arguments, allow_nan=False)
        except ValueError:
            raise RowError("holds a number that is no JSON (NaN, Infinity)", f"{here}.function.arguments") from None
        calls.append({"type": "function", **around, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _but_calls(message: Message) -> Message:
    return {key: part for key, part in message.items() if key != "tool_calls"}


def _calls_of_text(text: object, column: str) -> list[dict[str, Any]]:
    """The calls of a turn whose whole text is a call, or a list of calls."""
    value = _json(text, column) if isinstance(text, str) else text
    return _calls(value if isinstance(value, list) else [value], column)


def _joined(parts: Sequence[object], column: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError("only text can be learnt here: found another kind of content", column, part)
        texts.append(as_text(part.get("text"), column))
    return "".join(texts)


def _json(text: str, column: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise RowError(f"expected JSON: {error}", column, text) from None
