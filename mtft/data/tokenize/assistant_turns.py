"""What an assistant turn adds to the text, found by rendering twice, and the examples that hold all turns once.

    before_i = template(messages[:i], add_generation_prompt=True)      what the model sees when it has to answer
    upto_i   = template(messages[:i + 1])                              what should stand there afterwards
    learnt_i = upto_i - before_i                                       for every assistant turn i that is learnt

This is the prefix difference. It needs nothing from the template: `{% generation %}` blocks, which stock templates of
Llama, Qwen and Gemma do not have, are never looked at. The end-of-turn token is in the difference, so it is learnt.

Three kinds of template break the plain rule:
- upto_i is no prefix of the whole conversation, because earlier turns are rendered in another way than the last one
  (Qwen3 drops old thinking, gpt-oss ends old turns otherwise): the conversation becomes several examples, each one
  with exactly the context that the model gets when it answers that turn.
- before_i opens a thought that the turn does not have (DeepSeek-R1): the answer closes it first. Every other program
  that renders this template will open it too. What before_i shows as an empty thought stands in front of the answer.
- the new turn changes what stands before it (gpt-oss drops the analysis once a final answer follows): the example is
  before_i and the turn as the template writes it behind a single question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mtft.data.formats.messages import Message, RowError
from mtft.data.tokenize.template import PROBE, ChatTemplate

# what a generation prompt ends with when it opens a thought, or shows an empty one
_OPENED = re.compile(r"<([\w:]+)>\s*(</\1>\s*)?$")


class Turn(NamedTuple):
    """The text up to the end of an assistant turn. [start, len(text)) is the turn; index: of its message."""

    index: int
    text: str
    start: int


@dataclass(frozen=True)
class RenderedChat:
    """Text as the model reads it. `spans` are [start, end) characters to learn, in order and disjoint.

    `turns`: the index of the message that each span is learnt for (none for plain text).
    `weights`: [start, end) and weight of the pieces of all spans (turn_weights.py); none: 1 each. `row_weight`: of the
    row.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...] = ()
    weights: tuple[tuple[int, int, float], ...] = ()
    row_weight: float = 1.0


def find_turn(template: ChatTemplate, messages: Sequence[Message], i: int, tools: Any, notes: set[str]) -> Turn:
    """The turn of message i in the context that the model will see. RowError if the template mixes the two."""
    upto = _upto(template, messages[: i + 1], tools)
    before = template.apply(messages[:i], tools, generate=True)
    if upto.startswith(before):
        return Turn(i, upto, len(before))
    bare = template.apply(messages[:i], tools)
    opened = _OPENED.search(before)
    if opened and upto.startswith(before[: opened.start()]):
        return Turn(i, before + _in_thought(i, upto[opened.start() :], opened, notes), len(before))
    lead = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    alone = [*lead, {"role": "user", "content": PROBE}, messages[i]]
    if len(alone) <= i:
        _, text, start = find_turn(template, alone, len(alone) - 1, tools, notes)
        return Turn(i, before + text[start:], len(before))
    if upto.startswith(bare):
        notes.add("opened")
        return Turn(i, upto, _answer_start(messages[i]["content"].strip(), upto, bare, before))
    raise RowError(
        f"the chat template changes what stands before message {i + 1} (assistant) when that message is added, so it "
        "can't be said which tokens are the answer"
    )


def group_turns(turns: Sequence[Turn], special: tuple[str, ...], *, can_end: bool) -> list[RenderedChat]:
    """As few examples as possible: the longest text takes all turns that stand in it as they are, then the next.

    can_end: an end token can be appended to an example. Then a turn that has none is no part of a longer one.
    """
    left, examples = list(turns), []
    while left:
        text = left[-1].text
        ends = [_end_in(text, turn, special) for turn in left]
        if can_end:
            ends[:-1] = [
                end if end is not None and text[turn.start : end].rstrip().endswith(special) else None
                for turn, end in zip(left[:-1], ends)
            ]
        inside = [(turn, end) for turn, end in zip(left, ends) if end is not None]
        spans = tuple((turn.start, end) for turn, end in inside)
        examples.append(RenderedChat(text, spans, tuple(turn.index for turn, _ in inside)))
        left = [turn for turn, end in zip(left, ends) if end is None]
    return examples[::-1]


def end_turns(example: RenderedChat, special: tuple[str, ...], eos: str | None) -> tuple[RenderedChat, bool]:
    """What follows an end token inside a span is layout, and the last span must have one; True if it was appended."""
    text, spans = example.text, []
    for start, end in example.spans:
        body = text[start:end].rstrip()
        spans.append((start, start + len(body)) if body.endswith(special) else (start, end))
    append = bool(eos) and not text[: spans[-1][1]].endswith(special)
    if append and eos:
        text = text[: spans[-1][1]] + eos
        spans[-1] = (spans[-1][0], len(text))
    return RenderedChat(text, tuple(spans), example.turns), append


def _upto(template: ChatTemplate, messages: Sequence[Message], tools: Any) -> str:
    """The text of messages; thinking in the last content is put back where the template cuts it off."""
    text = template.apply(messages, tools)
    last = messages[-1]
    if not template.writes_thought(last) or last["content"].strip() in text:
        return text
    marked = template.apply([*messages[:-1], last | {"content": PROBE}], tools)
    return marked.replace(PROBE, last["content"]) if marked.count(PROBE) == 1 else text


def _in_thought(i: int, answer: str, opened: re.Match[str], notes: set[str]) -> str:
    """The answer behind a prompt that opens a thought. answer: what the template writes in place of that thought."""
    tag, closed = opened[1], opened[2]
    if answer.startswith(f"<{tag}>"):
        if closed:
            raise RowError(
                f"the chat template's prompt closes the thought before the answer begins, so the thinking of message "
                f"{i + 1} (assistant) would never be asked for: name a template that opens it in model.chat_template"
            )
        return answer.removeprefix(f"<{tag}>").lstrip()  # it has a thought, with other spaces around it
    notes.add("thought_closed")
    return answer if closed else f"\n</{tag}>\n\n{answer}"


def _answer_start(content: str, upto: str, bare: str, before: str) -> int:
    """Where the answer begins: behind what it has in common with the prompt, or at its own words."""
    start = common_length(upto, before)
    # an answer that happens to start like the rest of the generation prompt is still an answer
    for position in range(start, len(bare) - 1, -1) if content else ():
        if upto.startswith(content, position):
            return position
    return start


def _end_in(text: str, turn: Turn, special: tuple[str, ...]) -> int | None:
    """Where a turn ends in a longer text; None if it does not stand there as it was."""
    _, upto, start = turn
    if text.startswith(upto):
        return len(upto)
    # Phi-3 writes an EOS behind the last turn of all: up to the turn's own end token both are the same
    common = common_length(text, upto)
    answer = upto[start:common]
    end = start + max((answer.rfind(token) + len(token) for token in special if token in answer), default=0)
    rest = upto[end:]
    for token in special:
        rest = rest.replace(token, "")
    return end if end > start and not rest.strip() else None


def common_length(a: str, b: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves: a loop over characters is most of the time of long conversations
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[low:middle], low) else (low, middle - 1)
    return low
