"""How much each learnt character counts: the weight of its turn, times that of thinking where it is a thought.

A thought is what stands in front of an answer inside of thinking tags, however the template writes them
(<think>...</think>, gpt-oss's analysis channel). It begins where the turn's learnt part begins, with its opening tag,
and ends with its own last word. The closing tag counts as the answer does, so that a model that learns no thoughts
learns to end them. An empty thought is no thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mtft.data.formats.messages import REASONING, Message, RowError
from mtft.data.tokenize.assistant_turns import RenderedChat, find_turn
from mtft.data.tokenize.template import PROBE, ChatTemplate, inline_thought

Piece = tuple[int, int, float]  # characters [start, end) and their weight


class TurnWeights:
    """The weights of a rendered conversation. thinking: of thoughts, beside that of their turn."""

    def __init__(self, template: ChatTemplate, thinking: float = 1.0) -> None:
        self.template, self.thinking = template, thinking

    def __call__(self, messages: Sequence[Message], example: RenderedChat) -> tuple[Piece, ...]:
        """Pieces that are the example's spans together; none if all weights are 1."""
        pieces: list[Piece] = []
        for index, (start, end) in zip(example.turns, example.spans, strict=True):
            weight = float(messages[index].get("train", 1.0))
            answer = start
            if self.thinking != 1 and (thought := thought_of(messages[index])):
                answer = start + self._end(thought, example.text[start:end], index)
                pieces.append((start, answer, weight * self.thinking))
            pieces.append((answer, end, weight))
        return () if all(weight == 1 for _, _, weight in pieces) else tuple(pieces)

    def _end(self, thought: str, shown: str, index: int) -> int:
        """Where the thought ends in a turn's learnt text, behind the opening tag if that is there."""
        body = shown.lstrip()
        opening = next((tag for tag in self._openings if body.startswith(tag)), "")
        found = shown.find(thought, len(shown) - len(body) + len(opening))
        if found < 0:
            do = "set tasks.*.thinking_weight: 1"
            raise RowError(f"where the thinking of message {index + 1} (assistant) ends in the text isn't found: {do}")
        return found + len(thought)

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """What thoughts may begin with: as the template writes a thought that it is given, and in a content."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        shown = []
        for key in self.template.reasoning[:1]:
            try:
                _, text, start = find_turn(self.template, [turns[0], turns[1] | {key: PROBE}], 1, None, set())
            except RowError:
                continue
            before, probe, _ = text[start:].partition(PROBE)
            shown += [before.strip()] if probe else []
        return (*filter(None, shown), "<think>")


def thought_of(message: Message) -> str:
    """The thinking of an answer: under a key of its own, or in front of its content; "" if there is none."""
    said = next((message[key] for key in REASONING if message.get(key)), "").strip()
    inline = None if said else inline_thought(message["content"])
    return said if inline is None else inline.thinking.strip()
