"""Conversations to text, with the characters that the model has to learn.

    before_i = template(messages[:i], add_generation_prompt=True)      what the model sees when it has to answer
    upto_i   = template(messages[:i + 1])                              what should stand there afterwards
    learnt_i = upto_i - before_i                                       for every assistant turn i

This is the prefix difference. It needs nothing from the template: `{% generation %}` blocks, which stock templates of
Llama, Qwen and Gemma do not have, are never looked at. The end-of-turn token is in the difference, so it is learnt.

Four kinds of template break the plain rule, and are handled here, aloud (`notes`):
- upto_i is no prefix of the whole conversation, because earlier turns are rendered in another way than the last one
  (Qwen3 drops old thinking, gpt-oss ends old turns otherwise): the conversation becomes several examples, each one
  with exactly the context that the model gets when it answers that turn.
- before_i is no prefix of upto_i, because the generation prompt opens a thought that the turn does not have
  (DeepSeek-R1): what both have in common is the prompt.
- a turn ends without a special token (GLM): each turn becomes an example of its own, with an end token appended.
- the template refuses or drops the system message (Gemma): it moves into the first user turn.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtft.common.errors import UserError
from mtft.data.formats.messages import Conversation, Message, RowError

# For models without a chat template. The generation prompt ends without a space, because most tokenizers put the space
# in front of a word into the word's token.
DEFAULT_TEMPLATE = """\
{%- if tools %}{{ 'Tools: ' + tools | tojson + '\n\n' }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ 'Assistant: ' + message.content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{{ (eos_token or '') + '\n\n' }}
{%- elif message.role == 'user' -%}
{{ 'User: ' + message.content + '\n\n' }}
{%- elif message.role in ('system', 'developer') -%}
{{ message.content + '\n\n' }}
{%- else -%}
{{ 'Tool: ' + message.content + '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""

NOTES = {
    "default_template": "the model has no chat template: the default one is used (User: ... Assistant: ...)",
    "special_in_text": "conversations hold special tokens in their own text (rendered by a template before?)",
    "split": "conversations became several examples: the template renders earlier assistant turns differently",
    "system_folded": "system messages moved into the first user turn: the chat template has no place for them",
    "eos_appended": "each turn became an example with an end token: the chat template ends turns without one",
    "opened": "answers lack what the template's generation prompt opens (a thought): at inference it will stand there",
    "reasoning_ignored": "conversations have reasoning that the chat template does not show, so it is not learnt",
    "tools_ignored": "conversations have tools that the chat template does not show",
}


REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which data carry an answer's thoughts


@dataclass(frozen=True)
class RenderedChat:
    """Text as the model reads it. `spans` are [start, end) characters to learn, in order and disjoint."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template. `notes` counts what had to be changed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.default = tokenizer.chat_template is None
        self.template: str | None = DEFAULT_TEMPLATE if self.default else None
        self.notes: Counter[str] = Counter()  # conversations, by what was done to them
        self._current_notes: set[str] = set()
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special = tuple({*tokenizer.all_special_tokens, *added})
        self._special = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")
        # A template writes its own BOS; where there is none, the tokenizer's habit decides. Never both.
        self.bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
        self._parts = False
        question = [{"role": "user", "content": "Zq7x"}]
        if not self._shows(question):
            self._parts = True  # templates of models with vision drop plain text: they want a list of parts
            if not self._shows(question):
                what = "the chat template of the model does not show what the user says"
                do = "mend tokenizer.chat_template, or delete it: then the default template is used"
                raise UserError(what, where="model.path", do=do)
        self._fold = not self._shows([{"role": "system", "content": "Zq7x"}, {"role": "user", "content": "a"}])
        call = {"type": "function", "function": {"name": "Zq7x", "arguments": {"a": "b"}}}
        tool_use = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        # some templates (DeepSeek) take the arguments as text, most as an object
        self._text_calls = not self._shows(tool_use) and self._shows(
            [_with_text_calls(message) for message in tool_use]
        )
        self._tools = self._shows([{"role": "user", "content": "a"}], ({"type": "function", "function": _PROBE},))

    def render(self, conversation: Conversation) -> list[RenderedChat]:
        """One example, or several where the template rewrites earlier turns. RowError if the template refuses."""
        if conversation.text is not None:
            text = self.bos + conversation.text + (self.tokenizer.eos_token or "")
            return [RenderedChat(text, ((len(self.bos), len(text)),))]
        self._current_notes = {"default_template"} if self.default else set()
        messages, tools = list(conversation.messages), conversation.tools
        if tools and not self._tools:
            self._current_notes.add("tools_ignored")
        if self._fold and messages[0]["role"] in ("system", "developer"):
            messages = _fold(messages)
            self._current_notes.add("system_folded")
        if any(self._special.search(message["content"]) for message in messages):
            self._current_notes.add("special_in_text")
        if self._text_calls:
            messages = [_with_text_calls(message) for message in messages]
        turns = [self._turn(messages, i, tools) for i, message in enumerate(messages) if message["role"] == "assistant"]
        self._check_shown(messages, turns)
        if messages[0]["role"] == "assistant":  # a greeting that answers nothing: context, not something to learn
            turns = turns[1:]
        examples = _group(turns, self.special, can_end=bool(self.tokenizer.eos_token))
        if len(examples) > 1:
            self._current_notes.add("split")
        examples = [self._finish(example) for example in examples]
        self.notes.update(self._current_notes)
        return examples

    def _check_shown(self, messages: list[Message], turns: list[tuple[str, int]]) -> None:
        """A call that the template drops would teach the model to answer with nothing."""
        answers = [message for message in messages if message["role"] == "assistant"]
        for message, (upto, start) in zip(answers, turns):
            for call in message.get("tool_calls", ()):
                if call.get("function", call)["name"] not in upto[start:] and start < len(upto):
                    raise RowError(
                        "the chat template does not show the assistant's tool calls: take a model whose template does"
                    )
            if any(message.get(key) and message[key] not in upto for key in REASONING):
                self._current_notes.add("reasoning_ignored")

    def _turn(self, messages: list[Message], i: int, tools: Any) -> tuple[str, int]:
        """(upto_i, where the learnt part starts in it)."""
        upto = self._apply(messages[: i + 1], tools)
        if i == 0:
            return upto, len(upto)
        before = self._apply(messages[:i], tools, generate=True)
        if upto.startswith(before):
            return upto, len(before)
        bare = self._apply(messages[:i], tools)
        if not upto.startswith(bare):
            raise RowError(
                f"the chat template changes what stands before assistant turn {i} when that turn is added, so it can't "
                "be said which tokens are the answer"
            )
        self._current_notes.add("opened")
        start = _common(upto, before)
        # an answer that happens to start like the rest of the generation prompt is still an answer
        content = messages[i]["content"].strip()
        for position in range(start, len(bare) - 1, -1) if content else ():
            if upto.startswith(content, position):
                return upto, position
        return upto, start

    def _finish(self, example: RenderedChat) -> RenderedChat:
        """End tokens: what follows one inside a span is layout, and the last span must have one."""
        text, spans = example.text, []
        for start, end in example.spans:
            body = text[start:end].rstrip()
            spans.append((start, start + len(body)) if body.endswith(self.special) else (start, end))
        if not text[: spans[-1][1]].endswith(self.special) and self.tokenizer.eos_token:
            self._current_notes.add("eos_appended")
            text = text[: spans[-1][1]] + self.tokenizer.eos_token
            spans[-1] = (spans[-1][0], len(text))
        return RenderedChat(text, tuple(spans))

    def _apply(self, messages: list[Message], tools: Any, *, generate: bool = False) -> str:
        from jinja2 import TemplateError

        if self._parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        return self.bos + text if self.default else text

    def _shows(self, messages: list[Message], tools: Any = None) -> bool:
        """Whether the template puts a probe (system message or tool) into the text at all."""
        try:
            return "Zq7x" in self._apply(messages, tools, generate=True)
        except RowError:
            return False


_PROBE = {"name": "Zq7x", "description": "probe", "parameters": {"type": "object", "properties": {}}}


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front of plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _fold(messages: list[Message]) -> list[Message]:
    system, rest = messages[0], messages[1:]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *rest]
    return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _with_text_calls(message: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        if "function" in call
        else {**call, "arguments": json.dumps(call["arguments"])}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def _group(turns: Sequence[tuple[str, int]], special: tuple[str, ...], *, can_end: bool) -> list[RenderedChat]:
    """As few examples as possible: the longest text takes all turns that stand in it as they are, then the next.

    can_end: an end token can be appended to an example. Then a turn that has none is no part of a longer one.
    """
    left, examples = list(turns), []
    while left:
        text = left[-1][0]
        ends = [_end_in(text, upto, start, special) for upto, start in left]
        if can_end:
            ends[:-1] = [
                end if end is not None and text[start:end].rstrip().endswith(special) else None
                for (_, start), end in zip(left[:-1], ends)
            ]
        spans = tuple((start, end) for (_, start), end in zip(left, ends) if end is not None)
        examples.append(RenderedChat(text, spans))
        left = [turn for turn, end in zip(left, ends) if end is None]
    return examples[::-1]


def _end_in(text: str, upto: str, start: int, special: tuple[str, ...]) -> int | None:
    """Where the turn that ends `upto` ends in the longer `text`; None if it does not stand there as it was."""
    if text.startswith(upto):
        return len(upto)
    # Phi-3 writes an EOS behind the last turn of all: up to the turn's own end token both are the same
    common = _common(text, upto)
    answer = upto[start:common]
    end = start + max((answer.rfind(token) + len(token) for token in special if token in answer), default=0)
    rest = upto[end:]
    for token in special:
        rest = rest.replace(token, "")
    return end if end > start and not rest.strip() else None


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
