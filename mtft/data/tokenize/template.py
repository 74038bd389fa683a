"""A tokenizer's chat template as a function, and what it has a place for.

Templates differ in what they show: a system message, a developer message, tools, calls with arguments as text or as
objects, thinking under one of three keys. What a template does not show is found by rendering a probe once, and the
messages are brought into the spelling it does show (`adapt`). Training and inference both go through here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtft.common.errors import UserError
from mtft.data.formats.messages import REASONING, Message, RowError
from mtft.data.formats.render_limit import RenderLimit, check_length
from mtft.data.tokenize.template_options import check_options

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

PROBE = "Zq7x"
_PROBE_TOOL = {"name": PROBE, "description": "probe", "parameters": {"type": "object", "properties": {}}}
# In data of R1 and QwQ the opening tag stood in the prompt, and is missing.
_THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)*?)</think>(.*)", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
# Keys that carry no words of a message, or that are always dealt with.
_PLUMBING = {"role", "content", "tool_calls", "tool_call_id", "id", "train", *REASONING}


# What control tokens look like in the templates of the main families.
_CONTROL = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<｜[^｜<>]+｜>")


class Thought(NamedTuple):
    """An answer that begins with <think>...</think>."""

    thinking: str
    answer: str


def inline_thought(content: str) -> Thought | None:
    """The thinking that stands in front of an answer, inside the answer's own text. None if there is none."""
    found = _THOUGHT.fullmatch(content) if "</think>" in content else None
    whole = found is not None and "</think>" not in found[2] and found[1].strip()
    return Thought(found[1], found[2]) if found is not None and whole else None


def without_empty_thought(content: str) -> str:
    """An answer without the empty <think></think> in front of it (Qwen3's way of not thinking)."""
    found = _EMPTY_THOUGHT.match(content)
    return content[found.end() :] if found and content[found.end() :] else content


class ChatTemplate:
    """The chat template of a tokenizer, or the default one (`default`). Raises UserError if it drops what users say.

    options: names that the template reads beside the messages, with their values; UserError, with the recipe's key
    `where`, for one that it does not read.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None = None, where: str = "chat_template_kwargs"
    ) -> None:
        self.tokenizer = tokenizer
        self.default = tokenizer.chat_template is None
        # A template writes its own BOS; where there is none, the tokenizer's habit decides. Never both.
        self.bos: str = tokenizer.bos_token if adds_bos(tokenizer) else ""
        default = ("{{- bos_token }}" if self.bos else "") + DEFAULT_TEMPLATE
        self.source: str = default if self.default else str(tokenizer.chat_template)
        self.options = {
            name: [*value] if isinstance(value, tuple) else value for name, value in (options or {}).items()
        }
        check_options(self.source, self.options, where)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special = tuple({*tokenizer.all_special_tokens, *added})
        self._read_keys: dict[tuple[Any, ...], bool] = {}
        self._parts = self._text_calls = self._null_content = False
        user = {"role": "user", "content": "a"}
        if not self._shows([user | {"content": PROBE}]):
            self._parts = True  # templates of models with vision drop plain text: they want a list of parts
            if not self._shows([user | {"content": PROBE}]):
                what = "the chat template of the model does not show what the user says" + self._why([user])
                do = "mend tokenizer.chat_template, or name another one in model.chat_template"
                raise UserError(what, where="model.path", do=do)
        self.shows_system = self._shows([{"role": "system", "content": PROBE}, user])
        # a template that writes any role's name has no developer role of its own: the model never saw one
        of_its_own = "developer" in self.source
        self.shows_developer = of_its_own and self._shows([{"role": "developer", "content": PROBE}, user])
        self.shows_tools = self._shows([user], ({"type": "function", "function": _PROBE_TOOL},))
        # keys of thinking that the template shows for the last turn
        self.reasoning = tuple(
            key for key in REASONING if self._shows([user, {"role": "assistant", "content": "b", key: PROBE}])
        )
        self.knows_thoughts = "</think>" in self.source
        self._probe_calls(user)

    def _probe_calls(self, user: Message) -> None:
        """Finds the spelling of calls that the template shows: content null, arguments as text."""
        call = {"type": "function", "id": "call00001", "function": {"name": PROBE, "arguments": {"a": "b"}}}
        turns = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
        for self._text_calls, self._null_content in ((False, False), (True, False), (False, True), (True, True)):
            if self._shows(turns):
                return
        self._text_calls = self._null_content = False

    def apply(self, messages: Sequence[Message], tools: Any = None, *, generate: bool = False) -> str:
        """The text of messages. generate: with the prompt for the next answer. RowError if the template refuses."""
        from jinja2 import TemplateError

        try:
            with RenderLimit():
                text: Any = self.tokenizer.apply_chat_template(
                    [self._spelled(message) for message in messages],
                    tools=list(tools) if tools else None,
                    chat_template=self.source if self.default else None,
                    add_generation_prompt=generate,
                    tokenize=False,
                    **self.options,
                )
            check_length(text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("invalid UTF-8 (half of a surrogate pair) in a call or a tool") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        except (ArithmeticError, RecursionError, MemoryError) as error:  # range(10**9), 'a' * 10**12
            raise RowError(f"the chat template fails: {type(error).__name__}: {error}") from error
        return text

    def adapt(self, messages: Sequence[Message]) -> tuple[list[Message], set[str]]:
        """Messages in the spelling that the template shows, and notes on what had to be changed for it."""
        notes: set[str] = set()
        found = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        if not self.shows_developer and any(message["role"] == "developer" for message in found):
            notes.add("developer_as_system")
            found = [m | {"role": "system"} if m["role"] == "developer" else m for m in found]
            while len(found) > 1 and found[0]["role"] == found[1]["role"] == "system":
                found[:2] = [found[0] | {"content": f"{found[0]['content']}\n\n{found[1]['content']}"}]
        if not self.shows_system and found[0]["role"] in ("system", "developer"):
            notes.add("system_folded")
            found = _fold(found)
        for i, message in enumerate(found):
            if message["role"] == "assistant":
                found[i] = self._with_thinking(message, notes)
        return found, notes

    def writes_thought(self, message: Message) -> bool:
        """Whether the thinking stands in the content, for a template that may cut it off."""
        return not self.reasoning and self.knows_thoughts and inline_thought(message["content"]) is not None

    def strange_tokens(self) -> list[str]:
        """Control tokens of another model's template: this tokenizer would cut them to pieces."""
        known = self.tokenizer.get_vocab()
        return sorted({token for token in _CONTROL.findall(self.source) if token not in known})

    def unread_keys(self, messages: Sequence[Message], tools: Any = None) -> set[str]:
        """Keys of messages that don't change the text: the template has no word for them.

        Each is asked for once a role and set of neighbours, by rendering without it.
        """
        found = set()
        for i, message in enumerate(messages):
            named = message.keys() - (_PLUMBING | {"name"} if message["role"] == "tool" else _PLUMBING)
            for key in named:
                asked = (key, message["role"], i == 0, *sorted(message.keys()))
                if asked not in self._read_keys:
                    self._read_keys[asked] = self._reads(messages, i, key, tools)
                if not self._read_keys[asked]:
                    found.add(key)
        return found

    def _reads(self, messages: Sequence[Message], i: int, key: str, tools: Any) -> bool:
        without = [m if j != i else {k: v for k, v in m.items() if k != key} for j, m in enumerate(messages)]
        texts = [self.apply(self.adapt(some)[0], tools) for some in (messages, without)]
        return texts[0] != texts[1]

    def _with_thinking(self, message: Message, notes: set[str]) -> Message:
        """Thinking under the key that the template knows; in the content where it knows none but cuts off thoughts."""
        content = message["content"]
        if content.lstrip().startswith("<think>") and "</think>" not in content:
            raise RowError("an answer opens a thought, <think>, and never closes it")
        if not self.reasoning and not self.knows_thoughts:
            return message  # to this template a thought is text like any other
        if (rest := without_empty_thought(content)) != content:
            notes.add("empty_thought")
            message = message | {"content": rest}
        said = next((key for key in REASONING if message.get(key)), None)
        if self.reasoning:
            thought = None if said else inline_thought(message["content"])
            if thought is not None:
                notes.add("thinking_passed")
                return message | {self.reasoning[0]: thought.thinking.strip(), "content": thought.answer.lstrip()}
            if said and said not in self.reasoning:
                rest = {key: value for key, value in message.items() if key != said}
                return rest | {self.reasoning[0]: message[said]}
        elif (thought := inline_thought(message["content"])) is not None and not content.lstrip().startswith("<think>"):
            return message | {"content": f"<think>\n{thought.thinking.strip()}\n</think>\n\n{thought.answer.lstrip()}"}
        elif said:
            notes.add("thinking_written")
            rest = {key: value for key, value in message.items() if key != said}
            return rest | {"content": f"<think>\n{message[said].strip()}\n</think>\n\n{message['content']}"}
        return message

    def _spelled(self, message: Message) -> Message:
        """The message as this template takes calls and contents."""
        if message.get("tool_calls"):
            if self._text_calls:
                message = message | {"tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            if self._null_content and not message["content"]:
                message = message | {"content": None}
        if self._parts and message["content"] is not None:
            message = message | {"content": [{"type": "text", "text": message["content"]}]}
        return message

    def _why(self, messages: list[Message]) -> str:
        """The error of the template, if that is why it shows nothing."""
        try:
            self.apply(messages, generate=True)
        except RowError as error:
            return f": {error.what}"
        return ""

    def _shows(self, messages: list[Message], tools: Any = None) -> bool:
        """Whether the template puts a probe into the text at all."""
        try:
            generate = messages[-1]["role"] != "assistant"
            return PROBE in self.apply(messages, tools, generate=generate)
        except RowError:
            return False


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front of plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _fold(messages: list[Message]) -> list[Message]:
    system, rest = messages[0], messages[1:]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *rest]
    return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}
