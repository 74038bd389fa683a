"""Whether a rendered conversation holds every text of every message, and every learnt answer where it is learnt.

Templates leave out what they have no place for, without a word: a second system message, a tool's result, the text
beside a call, thinking. `find_loss` looks for each text in the rendering. A short text ("a") may stand there by
chance, so `ShownWhole` also renders the conversation with a marker in place of every text, once for each shape of
conversation, and looks for the markers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mtft.data.formats.messages import REASONING, Message, RowError
from mtft.data.tokenize.assistant_turns import RenderedChat
from mtft.data.tokenize.template import inline_thought, without_empty_thought

SHAPES = 4096  # of conversations whose result is remembered


class Loss(NamedTuple):
    """What is not shown: a kind of text of the message with this index; None: of the tools."""

    message: int | None
    what: str


Render = Callable[[list[Message], Any], tuple[list[RenderedChat], dict[int, str]]]


def find_loss(
    messages: Sequence[Message], tools: Any, examples: Sequence[RenderedChat], context: dict[int, str]
) -> Loss | None:
    """The first text that is lost. context: for answers that are not learnt, the text that ends with them."""
    for example in examples:
        last = max(example.turns)
        before = [(i, message) for i, message in enumerate(messages[:last]) if message["role"] != "assistant"]
        if (loss := find_loss_of_context(before, tools, example.text)) is not None:
            return loss
        for index, (start, end) in zip(example.turns, example.spans):
            if (what := _lost(_texts(messages[index]), example.text[start:end])) is not None:
                return Loss(index, what)
    learnt = Counter(index for example in examples for index in example.turns)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index in context:  # thinking of earlier turns is what templates leave out on purpose
            said = (text for text in _texts(message) if text[0] != "thinking")
            if (what := _lost(said, context[index])) is not None:
                return Loss(index, what)
        elif learnt[index] != 1:
            return Loss(index, "answer")
    return None


def find_loss_of_context(messages: Sequence[tuple[int, Message]], tools: Any, text: str) -> Loss | None:
    """The first of these messages (with their indices), or the tools, that the text does not show."""
    needed: Counter[str] = Counter()
    for index, message in messages:
        for what, words in _texts(message):
            needed[words] += 1
            if not _shows(text, words, needed[words]):
                return Loss(index, what)
    for tool in tools or ():
        function = tool.get("function", tool)
        for words in (function.get("name"), function.get("description")):
            if isinstance(words, str) and not _shows(text, words.strip(), 1):
                return Loss(None, f"tool {function.get('name')!r}")
    return None


def loss_error(loss: Loss, messages: Sequence[Message]) -> RowError:
    """The loss in words: number and role of the message, first words of what is lost."""
    if loss.message is None:
        do = "take a model whose template shows tools, or leave them out: name the columns to read in tasks.*.format"
        return RowError(f"the chat template shows nothing of the {loss.what}: {do}")
    message = messages[loss.message]
    words = next((words for what, words in _texts(message) if what == loss.what), "")
    short = words if len(words) <= 40 else f"{words[:37]}..."
    of = "" if loss.what == "text" else f"{loss.what} of "
    which = f"{of}message {loss.message + 1} ({message['role']})"
    do = "model.chat_template names another template"
    return RowError(f"the chat template shows nothing of {which}: {short!r} would be lost ({do})")


class ShownWhole:
    """Renders each shape of conversation once with markers for texts, and finds what the template leaves out."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._known: dict[object, Loss | None] = {}

    def __call__(self, messages: Sequence[Message], tools: Any) -> Loss | None:
        """What is lost of every conversation of this shape."""
        shape = (tools is not None, *(_shape(message) for message in messages))
        if shape not in self._known:
            if len(self._known) >= SHAPES:
                self._known.clear()
            self._known[shape] = self._marked(messages, tools)
        return self._known[shape]

    def _marked(self, messages: Sequence[Message], tools: Any) -> Loss | None:
        numbers = iter(range(10**6))
        marked = [_with_markers(message, numbers) for message in messages]
        try:
            examples, context = self._render(marked, tools)
        except RowError:  # the template looks at the words themselves: they are judged by `find_loss`
            return None
        return find_loss(marked, None, examples, context)


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything that a message says."""
    thought = inline_thought(message["content"]) if message["role"] == "assistant" else None
    if thought is not None:
        yield "thinking", thought.thinking.strip()
    words = message["content"] if thought is None else thought.answer
    if message["role"] == "assistant":
        words = without_empty_thought(words)
    if words.strip():
        yield "text", words.strip()
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            yield "thinking", message[key].strip()
    for call in message.get("tool_calls", ()):
        yield "tool call", call["function"]["name"]
        for leaf in _leaves(call["function"].get("arguments")):
            yield "tool call", leaf


def _leaves(value: object) -> Iterator[str]:
    """Keys and values of arguments, as they may be written in any notation."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _lost(texts: Iterator[tuple[str, str]], shown: str) -> str | None:
    """The kind of the first text that does not stand in `shown` as often as it is said."""
    needed: Counter[str] = Counter()
    for what, words in texts:
        needed[words] += 1
        if not _shows(shown, words, needed[words]):
            return what
    return None


def _shows(text: str, words: str, times: int) -> bool:
    """Whether the words stand in the text so often: as they are, or inside JSON."""
    if text.count(words) >= times:
        return True
    spellings = {json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]}
    return any(text.count(spelling) >= times for spelling in spellings)


def _shape(value: object) -> object:
    """What a template may look at in a message beside its words."""
    if isinstance(value, bool):
        return value
    if isinstance(value, dict):
        role = value.get("role")
        return (role if isinstance(role, str) else None, *((key, _shape(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_shape(item) for item in value)
    if isinstance(value, str):
        return bool(value.strip()) + (inline_thought(value) is not None)
    return type(value)


def _with_markers(message: Message, numbers: Iterator[int]) -> Message:
    """The message with markers for all its texts; thinking inside a content stays where it is."""

    def marker() -> str:
        return f"Mk{next(numbers)}xq"

    def marked(value: object) -> object:
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        return marker() if isinstance(value, str) and value.strip() else value

    found = dict(message)
    if message["content"].strip():
        inside = message["role"] == "assistant" and inline_thought(message["content"]) is not None
        found["content"] = f"<think>\n{marker()}\n</think>\n\n{marker()}" if inside else marker()
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            found[key] = marker()
    if "tool_calls" in message:
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": marked(call["function"].get("arguments"))}}
            for call in message["tool_calls"]
        ]
    return found
