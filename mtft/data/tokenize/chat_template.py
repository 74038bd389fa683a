"""Conversations to text, with the characters that the model has to learn; and prompts, by the same code.

What is learnt is found by rendering twice (assistant_turns.py), with the tokenizer's own chat template (template.py).
A conversation is rendered whole, or refused with the message that would be lost (shown_whole.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from mtft.data.formats.messages import Conversation, Message, RowError
from mtft.data.notes import KEY
from mtft.data.tokenize.assistant_turns import RenderedChat, common_length, end_turns, find_turn, group_turns
from mtft.data.tokenize.shown_whole import ShownWhole, find_loss, find_loss_of_context, loss_error
from mtft.data.tokenize.template import PROBE, ChatTemplate
from mtft.data.tokenize.turn_weights import TurnWeights


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template. `notes` counts what had to be changed.

    options: what the template is given beside the messages (`tasks.*.chat_template_kwargs`); where: their key.
    thinking_weight: of the tokens of thoughts.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: Mapping[str, Any] | None = None,
        where: str = "chat_template_kwargs",
        *,
        thinking_weight: float = 1.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, options, where)
        self.special = self.template.special
        self.notes: Counter[str] = Counter()  # conversations, by what was done to them
        self._turn_weights = TurnWeights(self.template, thinking_weight)
        self._special = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")
        self._shown_whole = ShownWhole(lambda messages, tools: self._examples(messages, tools, set()))

    def render(self, conversation: Conversation) -> list[RenderedChat]:
        """One example, or several where the template rewrites earlier turns.

        Raises:
            RowError: If the template refuses the conversation, or does not show all of it.
        """
        if conversation.text is not None:
            return [replace(self._plain(conversation.text), row_weight=conversation.weight)]
        messages, tools = list(conversation.messages), conversation.tools
        notes = {"default_template"} if self.template.default else set()
        try:
            examples, context = self._examples(messages, tools, notes)
        except RowError as error:
            raise self._refused_at(messages, tools, error) from None
        if tools and not self.template.shows_tools:
            notes.add("tools_ignored")
        shown = tools if self.template.shows_tools else None
        loss = find_loss(messages, shown, examples, context) or self._shown_whole(messages, tools)
        if loss is not None:
            raise loss_error(loss, messages)
        if any(self._special.search(message["content"]) for message in messages):
            notes.add("special_in_text")
        if len(examples) > 1 and "eos_appended" not in notes:  # which says that each turn is one
            notes.add("split")
        notes |= {f"{KEY}{key}" for key in self.template.unread_keys(messages, tools)}
        self.notes.update(notes)
        return [
            replace(one, weights=self._turn_weights(messages, one), row_weight=conversation.weight) for one in examples
        ]

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """What the model reads when it has to answer these messages: as in training, up to the learnt part.

        Args:
            messages: In the spelling of `check_messages`.
            tools: JSON schemas in the spelling of `as_tools`.

        Raises:
            RowError: If the template refuses the messages, or does not show a message or a tool.
        """
        if tools and not self.template.shows_tools:
            raise RowError("the chat template shows no tools: take a model whose template does, or leave them out")
        adapted, _ = self.template.adapt(messages)
        text = self.template.apply(adapted, tools, generate=True)
        said = [(i, message) for i, message in enumerate(messages) if message["role"] != "assistant"]
        loss = find_loss_of_context(said, tools, text)
        if loss is not None:
            raise loss_error(loss, messages)
        return text

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The special tokens that an answer, and a call of a tool, are learnt to end with."""
        user = {"role": "user", "content": "a"}
        call = {"type": "function", "id": "call00001", "function": {"name": PROBE, "arguments": {"a": "b"}}}
        ends = []
        for answer in ({"content": PROBE}, {"content": "", "tool_calls": [call]}):
            turns = [user, {"role": "assistant", **answer}]
            try:
                ((example,), _) = self._examples(turns, None, set())
                later = self.template.apply([*turns, user])
            except RowError:
                continue
            learnt = example.text[slice(*example.spans[-1])]
            if PROBE not in learnt:
                continue
            # Phi-3 writes an EOS behind the last turn of all: what ends every turn is what ends it in the middle too
            behind, middle = (text[text.rindex(PROBE) :] for text in (learnt, later[: later.rindex("a")]))
            both = self._special.findall(behind[: common_length(behind, middle)])
            ends += (both or self._special.findall(behind))[-1:]
        return tuple(dict.fromkeys(ends))

    def _refused_at(self, messages: list[Message], tools: Any, error: RowError) -> RowError:
        """The refusal with the number of the first message that the template does not take."""
        if re.search(r"\bmessage \d", error.what):
            return error
        i = 0
        for i in range(len(messages)):
            try:
                adapted, _ = self.template.adapt(messages[: i + 1])
                self.template.apply(adapted, tools)
            except RowError as found:
                if found.what == error.what:
                    break
        return RowError(f"message {i + 1} ({messages[i]['role']}): {error.what}")

    def _examples(
        self, messages: list[Message], tools: Any, notes: set[str]
    ) -> tuple[list[RenderedChat], dict[int, str]]:
        """Examples with every learnt turn once, and the text of each answer that is context only."""
        adapted, changed = self.template.adapt(messages)
        notes |= changed
        moved = len(messages) - len(adapted)  # messages at the front that were put into one
        turns, context = [], {}
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0 or not message.get("train", True):  # a greeting answers nothing; a turn of weight 0
                context[i] = self.template.apply(adapted[: i - moved + 1], tools)
            else:
                turn = find_turn(self.template, adapted, i - moved, tools, notes)
                turns.append(turn._replace(index=i))
        eos = self.tokenizer.eos_token
        examples = []
        for example in group_turns(turns, self.special, can_end=bool(eos)):
            ended, appended = end_turns(example, self.special, eos)
            notes |= {"eos_appended"} if appended else set()
            examples.append(ended)
        return examples, context

    def _plain(self, text: str) -> RenderedChat:
        """Text with one BOS and one EOS, whatever stands in it already."""
        bos, eos = self.template.bos or "", self.tokenizer.eos_token or ""
        bos = "" if bos and text.startswith(bos) else bos
        eos = "" if eos and text.rstrip().endswith(eos) else eos
        return RenderedChat(bos + text + eos, ((len(bos), len(bos) + len(text) + len(eos)),))
