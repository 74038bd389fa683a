"""Rows to conversations: one function a format, over roles (prompt, response, ...) that columns.py has looked up.

All formats end in the same thing, a `Conversation`. Two tasks may read the same rows in two ways: rationale and label
of Distilling Step-by-Step (Hsieh et al. 2023, arXiv 2305.02301) are {prompt: input, response: rationale} and
{prompt: input, response: label}.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtft.data.formats.messages import (
    Conversation,
    Message,
    RowError,
    as_messages,
    as_text,
    as_tools,
    history_turns,
    with_system,
)


@dataclass(frozen=True)
class RowFormat:
    """One way to read a row: the roles it needs, the roles it may have, and the function over them."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Conversation]


def _chat(column: str, **keys: str) -> Callable[[Mapping[str, Any]], Conversation]:
    """The reader of a list of turns. keys: what `role` and `content` are called in it."""

    def read(get: Mapping[str, Any]) -> Conversation:
        return _conversation(get, as_messages(get[column], column, **keys))

    return read


def _pair(get: Mapping[str, Any]) -> Conversation:
    prompt, response = get["prompt"], get["response"]
    if isinstance(prompt, list):  # conversational pairs: two lists of messages, of which the second is learnt
        prompt = [{**m, "train": False} if isinstance(m, dict) and _answers(m) else m for m in prompt]
        tail = response if isinstance(response, list) else [{"role": "assistant", "content": response}]
        return _conversation(get, as_messages([*prompt, *tail], "prompt + response"))
    turns = (_user(as_text(prompt, "prompt")), _assistant(as_text(response, "response", empty=False)))
    return _conversation(get, turns)


def _alpaca(get: Mapping[str, Any]) -> Conversation:
    prompt = as_text(get["instruction"], "instruction")
    if get.get("input") is not None and (more := as_text(get["input"], "input")).strip():
        prompt = f"{prompt}\n\n{more}"
    return _conversation(get, (_user(prompt), _assistant(as_text(get["output"], "output", empty=False))))


def _conversation(get: Mapping[str, Any], turns: Sequence[Message]) -> Conversation:
    """What may stand beside the turns: earlier ones, a system message, tools."""
    turns = (*history_turns(get.get("history"), "history"), *turns)
    return Conversation(with_system(get.get("system"), turns), as_tools(get.get("tools")))


def _plain(get: Mapping[str, Any]) -> Conversation:
    return Conversation((), text=as_text(get["text"], "text", empty=False))


def _classification(get: Mapping[str, Any]) -> Conversation:
    names = _names(get.get("label_names"))
    prompt = as_text(get["text"], "text")
    if names:
        prompt = f"{prompt}\n\nOptions: {', '.join(names)}"
    return _conversation(get, (_user(prompt), _assistant(_label(get["label"], names))))


def _multiple_choice(get: Mapping[str, Any]) -> Conversation:
    """Options get letters; the response is the letter of the right one."""
    choices, answer, given = get["choices"], get["answer"], None
    if isinstance(choices, dict):  # ARC: {"text": [...], "label": ["A", ...]}
        choices, given = choices.get("text"), choices.get("label")
    marks = list(string.ascii_uppercase) if given in (None, []) else _marks(given, choices)
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(marks):
        raise RowError("expected a list of 2 to 26 choices", "choices", choices)
    texts, marks = [as_text(choice, "choices") for choice in choices], marks[: len(choices)]
    if given and type(answer) is int and all(type(mark) is int for mark in given):
        answer = str(answer)  # choices that are numbered in the row are meant by their numbers
    meant = set()
    if isinstance(answer, str):
        meant |= {index for index, text in enumerate(texts) if text == answer}
        if len(meant) > 1:
            raise RowError("is the text of several choices", "answer", answer)
        meant |= {marks.index(answer)} if answer in marks else set()
        number = _whole(answer)
        if number is not None and number < len(texts) and answer not in marks:
            meant.add(number)
    if len(meant) > 1:
        raise RowError("is the text of one choice and the letter or number of another", "answer", answer)
    right = meant.pop() if meant else _index(answer, len(texts), "answer")
    lines = [f"{mark}. {text}" for mark, text in zip(marks, texts, strict=True)]
    prompt = "\n".join([as_text(get["question"], "question"), *lines])
    return _conversation(get, (_user(prompt), _assistant(marks[right])))


def _marks(given: object, choices: object) -> list[str]:
    """What the row calls its choices: one name each, no two the same."""
    marks = [str(mark) if type(mark) is int else mark for mark in given] if isinstance(given, list | str) else None
    if marks is None or not isinstance(choices, list) or len(marks) < len(choices):
        some = f"{len(marks)} labels for " if marks is not None else ""
        size = f"{len(choices)} choices" if isinstance(choices, list) else "the choices"
        raise RowError(f"expected a list with a label for each choice: {some}{size}", "choices", given)
    return _distinct([as_text(mark, "choices") for mark in marks], "choices", given)


def _distinct(names: list[str], column: str, value: object) -> list[str]:
    """The names, or RowError if one is blank or two are the same: which of them an answer means can't be known."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the name {twice[:40]!r} stands twice", column, value)
    if not all(map(str.strip, names)):
        raise RowError("a name is blank", column, value)
    return names


_BESIDE_TURNS = ("system", "tools")
_BESIDE_PAIRS = (*_BESIDE_TURNS, "history")
FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(("messages",), _BESIDE_TURNS, _chat("messages")),
    "sharegpt": RowFormat(("conversations",), _BESIDE_TURNS, _chat("conversations", role="from", content="value")),
    "chat_rounds": RowFormat(("chat_rounds",), _BESIDE_TURNS, _chat("chat_rounds")),
    "multiple_choice": RowFormat(("question", "choices", "answer"), ("system",), _multiple_choice),
    "alpaca": RowFormat(("instruction", "output"), ("input", *_BESIDE_PAIRS), _alpaca),
    "prompt_response": RowFormat(("prompt", "response"), _BESIDE_PAIRS, _pair),
    "classification": RowFormat(("text", "label"), ("label_names", "system"), _classification),
    "text": RowFormat(("text",), (), _plain),
}


def _answers(message: Mapping[str, Any]) -> bool:
    """Whether a turn is the assistant's and does not say itself whether it is learnt."""
    return message.get("role") == "assistant" and not message.keys() & {"weight", "train", "loss"}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _names(value: object) -> list[str] | None:
    if value is None or value == []:
        return None
    if isinstance(value, str):
        try:
            names = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
        except (ValueError, RecursionError) as error:
            raise RowError(f"expected JSON: {error}", "label_names", value) from None
        names = [str(name).strip() if isinstance(name, str | int | float) else name for name in names]
    else:
        names = value
    if not isinstance(names, list):
        raise RowError("expected a list of names", "label_names", value)
    return _distinct([as_text(name, "label_names") for name in names], "label_names", value)


def _label(value: object, names: list[str] | None) -> str:
    if isinstance(value, str) and (not names or value in names):
        return as_text(value, "label", empty=False)
    if names:
        return names[_index(value, len(names), "label")]
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError("expected a name or an integer", "label", value)
    return str(value)


def _index(value: object, size: int, column: str) -> int:
    if isinstance(value, str) and (number := _whole(value)) is not None:
        value = number
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError(f"expected an index below {size}, or a name", column, value)
    if not 0 <= value < size:
        raise RowError(f"index out of range: there are {size}", column, value)
    return value


def _whole(text: str) -> int | None:
    """The number that a text of decimal digits is. Python may refuse to convert more than 640 of them."""
    return int(text) if len(text) <= 640 and text.strip().isdecimal() else None
