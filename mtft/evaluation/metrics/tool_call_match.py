"""tool_call_match: does an answer call the tools that the reference calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.json_answers import parse_json, same_json
from mtft.evaluation.metrics.text_matches import column
from mtft.evaluation.metrics.tool_calls import ToolCall, tool_calls


@dataclass(frozen=True)
class ToolCallMatch(Metric):
    """Share of the rows whose answer makes the calls of the reference, each once and no other; where the reference
    calls nothing, those whose answer calls nothing.

    arguments  compare them too, as JSON: 1 equals 1.0, and the order of keys does not count
    ordered    the calls must come in the reference's order

    Both texts are read in the same way (mtft/evaluation/metrics/tool_calls.py has the formats), so a row whose last
    turn has `tool_calls` of which none can be read in its text is refused.
    """

    NAME = "tool_call_match"
    AGGREGATE = "share"
    NEEDS_ROW = True

    arguments: bool = True
    ordered: bool = False

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column([self._right(answer) for answer in answers])

    def _right(self, answer: Answer) -> bool:
        asked, given = tool_calls(answer.reference), tool_calls(answer.text)
        if not any(call.name is not None for call in asked) and _calls_in(answer.row):
            shown = clipped(answer.reference, 80)
            what = f"the row's last turn has tool_calls, and in its text none can be read: {shown!r}"
            do = "see docs/tasks.md for the formats; another model.chat_template writes another one"
            raise UserError(what, where=answer.where, do=do)
        if len(asked) != len(given):
            return False
        if self.ordered:
            return all(map(self._same, asked, given))
        left = list(given)
        for call in asked:
            place = next((i for i, other in enumerate(left) if self._same(call, other)), None)
            if place is None:
                return False
            del left[place]
        return True

    def _same(self, a: ToolCall, b: ToolCall) -> bool:
        if a.name != b.name:
            return False
        return same_json(a.arguments, b.arguments) if self.arguments or a.name is None else True


def _calls_in(row: Mapping[str, Any]) -> bool:
    """Whether the last turn of a row in OpenAI's format calls tools."""
    messages = row.get("messages")
    if isinstance(messages, str):
        messages = parse_json(messages)
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, Mapping) and bool(last.get("tool_calls"))
