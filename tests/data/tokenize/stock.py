"""Chat templates as models ship them, read from the installed trl, on the toy tokenizer; and random conversations."""

import importlib.util
import json
import random
import re
from pathlib import Path

from tests.data.toy_examples import tokenizer

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
# the *_training variants are not stock: trl has marked answers in them by hand
STOCK = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))


def stock(name):
    """A tokenizer with a stock template and the special tokens that occur in it."""
    made = tokenizer((FOLDER / f"{name}.jinja").read_text())
    special = sorted({*re.findall(r"<\|\w+\|?>|<\w+\|>|<｜[^｜]*｜>|<\w+_of_(?:turn|utterance)>", made.chat_template)})
    made.add_special_tokens({"extra_special_tokens": special})
    return made


class Words:
    """Texts that occur once each, so that where one stands says which message it is of."""

    PIECES = (
        *("fox", "dog", "  two  spaces", "\n\nlines\n", "日本", "🙂", "é", '"quoted"', "{a: 1}", "</b>", "back\\slash"),
        *("{{ x }}", "'", "tab\t", "<b>", "\u2028", "# title", "1.5"),
    )

    def __init__(self, rng):
        self.rng, self.count = rng, 0

    def __call__(self):
        self.count += 1
        tail = "".join(self.rng.choice(self.PIECES) for _ in range(self.rng.randrange(4)))
        return f"w{self.count}z{tail}"

    def name(self):
        self.count += 1
        return f"f{self.count}z"


def random_row(rng: random.Random) -> dict:
    """A row of the format `messages`: roles, tools and calls, thinking, parts, empty texts, weights, in any order."""
    words = Words(rng)
    tools = [_tool(words, rng) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
    messages = []
    if rng.random() < 0.4:
        messages.append({"role": rng.choice(["system", "system", "developer"]), "content": words()})
    for _ in range(rng.choice([1, 1, 2, 3])):
        messages += _round(words, rng, tools)
    if rng.random() < 0.1:
        messages.insert(rng.randrange(len(messages)), {"role": "system", "content": words()})
    row = {"messages": [_dressed(message, rng) for message in messages]}
    if tools:
        row["tools"] = json.dumps(tools) if rng.random() < 0.3 else tools
    return row


def _round(words, rng, tools):
    """A question, perhaps calls and their results, and the answer."""
    yield {"role": "user", "content": "" if rng.random() < 0.03 else words()}
    for _ in range(rng.choice([0, 1, 1, 2]) if tools else 0):
        calls = [_call(words, rng, tools) for _ in range(rng.choice([1, 1, 1, 2]))]
        text = rng.choice(["", "", None, words()])
        yield _thinking({"role": "assistant", "content": text, "tool_calls": calls}, words, rng)
        for call in calls:
            name = call["function"]["name"]
            yield {"role": "tool", "content": words(), "tool_call_id": call["id"], "name": name}
    if not tools and rng.random() < 0.05:
        yield {"role": "assistant", "content": words()}
        yield {"role": "tool", "content": words()}
    answer = _thinking({"role": "assistant", "content": words()}, words, rng)
    if rng.random() < 0.1:
        answer |= rng.choice([{"weight": 0}, {"weight": 1}, {"train": False}, {"tool_calls": []}])
    yield answer


def _thinking(message, words, rng):
    kind = rng.random()
    if kind < 0.1 and message["content"]:
        return message | {"content": f"<think>{rng.choice(['', chr(10)])}{words()}\n</think>\n\n{message['content']}"}
    if kind < 0.2:
        return message | {rng.choice(["reasoning_content", "thinking", "reasoning"]): words()}
    return message


def _tool(words, rng):
    parameters = {"type": "object", "properties": {"q": {"type": "string"}, "n": {"type": "integer"}}}
    return {"type": "function", "function": {"name": words.name(), "description": words(), "parameters": parameters}}


def _call(words, rng, tools):
    arguments = rng.choice([{"q": words()}, {"q": words(), "n": rng.randrange(100)}, {}, {"q": {"deep": [words()]}}])
    function = {"name": rng.choice(tools)["function"]["name"], "arguments": arguments}
    if rng.random() < 0.3:
        function["arguments"] = json.dumps(arguments)
    return {"type": "function", "id": f"call{words.count:05d}", "function": function}


def _dressed(message, rng):
    """The same message in another spelling."""
    if message["content"] and rng.random() < 0.1:
        half = len(message["content"]) // 2
        parts = [message["content"][:half], message["content"][half:]]
        return message | {"content": [{"type": "text", "text": part} for part in parts]}
    return message
