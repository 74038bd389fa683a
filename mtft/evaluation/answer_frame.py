"""What a chat template writes around the words of an answer: gpt-oss's channels, an empty thought, `<|END_RESPONSE|>`.

Found by rendering probes, so metrics compare the words of answers and references alone, in every template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtft.data.formats.messages import Conversation, RowError
from mtft.data.tokenize.assistant_turns import RenderedChat
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.template import PROBE, Thought, inline_thought, without_empty_thought
from mtft.evaluation.prompts import HeldOutPrompt

_THOUGHT = "Kv3w"


@dataclass(frozen=True)
class AnswerFrame:
    """Texts without their outer spaces; "" for what the template does not write.

    asked   what the prompt ends with, behind the user's words (with its spaces)
    before  in front of an answer without a thought
    opens   in front of a thought;  closes: between a thought and its answer
    after   behind an answer, up to its end token;  special: tokens that no answer's words hold
    """

    asked: str = ""
    before: str = ""
    opens: str = ""
    closes: str = ""
    after: str = ""
    special: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, ends: Sequence[int], options: Mapping[str, Any] | None = None) -> AnswerFrame:
        """ends: tokens that end an answer. options: what the template is given beside the messages."""
        renderer = ChatRenderer(tokenizer, options)
        plain = _rendered(renderer, {})
        if plain is None:
            return cls()
        start, end = plain.spans[-1]
        before, _, after = plain.text[start:end].partition(PROBE)
        for token in filter(None, tokenizer.convert_ids_to_tokens(list(ends))):
            after = after.split(token)[0]
        frame = cls(
            plain.text[:start].rpartition(PROBE)[2], before.strip(), after=after.strip(), special=renderer.special
        )
        thinking = _rendered(renderer, {"reasoning_content": _THOUGHT})
        if thinking is None:
            return frame
        opens, _, rest = thinking.text[slice(*thinking.spans[-1])].partition(_THOUGHT)
        return replace(frame, opens=opens.strip(), closes=rest.partition(PROBE)[0].strip())

    def read(self, text: str) -> Thought:
        """An answer as its thought, "" if there is none, and its words."""
        text = text.strip().removesuffix(self.after)
        if self.closes and text.startswith(self.opens) and self.closes in text:
            thinking, _, answer = text.removeprefix(self.opens).partition(self.closes)
            return Thought(thinking.strip(), answer.strip())
        text = without_empty_thought(text.removeprefix(self.before))
        thinking, answer = inline_thought(text) or ("", text)
        return Thought(thinking.strip(), answer.strip())

    def asks_for_thought(self, prompt: HeldOutPrompt, tokenizer: Any) -> HeldOutPrompt:
        """The prompt without a thought at its end, where thinking_weight: 0 leaves it; the reference begins with it."""
        text = tokenizer.decode(prompt.prompt.tolist(), skip_special_tokens=False)
        shown, asked, thought = text.rpartition(self.asked or text)
        said = thought.strip().removeprefix(self.opens)
        if (said == thought.strip() and self.opens) or not said or any(token in said for token in self.special):
            return prompt
        start, low, high = len(shown + asked), 0, len(prompt.prompt)
        while low < high:
            middle = (low + high) // 2
            before = tokenizer.decode(prompt.prompt[:middle].tolist(), skip_special_tokens=False)
            low, high = (low, middle) if len(before) >= start else (middle + 1, high)
        return replace(prompt, prompt=prompt.prompt[:low], reference=np.append(prompt.prompt[low:], prompt.reference))


def _rendered(renderer: ChatRenderer, thought: Mapping[str, str]) -> RenderedChat | None:
    """A question and its answer; None if the template does not take them."""
    turns = ({"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE, **thought})
    try:
        return renderer.render(Conversation(turns))[-1]
    except RowError:
        return None
