"""From a request's prompt or messages to token ids, of the strong model and of the small ones.

`prompt` is taken as it stands (a completion). `messages` go through a chat template: each tokenizer's own, or the
house's default one where it has none, by the code that renders training's rows. So an expert reads the prompt that it
was trained on, whatever the strong model's template is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mtft.data.formats.messages import RowError, as_tools, check_messages
from mtft.data.tokenize.assistant_turns import RenderedChat
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import encode
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.request_values import check_text, check_values

if TYPE_CHECKING:
    from mtft.data.formats.messages import Conversation


class Tokenizers(Protocol):
    """What prompts need to know of a fusion: a plan (fusion_plan.py) has it before any weight is read."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def small_tokenizer(self) -> Any: ...
    @property
    def token_map(self) -> Any: ...  # a TokenMap, or None where the tokenizers are equal
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Prompt:
    """Token ids of the strong model. small_ids: the small models' own prompt; None: they read the same text."""

    ids: list[int]
    small_ids: list[int] | None = None


def render_prompt(tokenizer: Any, messages: Any, tools: Any = None) -> str:
    """Messages as the text that the model answers. The one place in this room where messages become text.

    Any spelling of rows is one of requests too: parts of a content, calls, a developer's message. FusionError for what
    is none, and for what the template does not show.
    """
    try:
        return _renderer(tokenizer).prompt(check_messages(messages, "messages"), as_tools(tools))
    except RowError as error:
        where = f"{error.column}: " if error.column else ""
        raise FusionError(f"{where}{error.what}", do='give [{"role": "user", "content": "..."}]') from error


def encode_prompt(models: Tokenizers, prompt: Any = None, messages: Any = None) -> Prompt:
    """Token ids of a text, a list of ids, or a conversation. FusionError for anything else."""
    if (prompt is None) == (messages is None):
        raise FusionError("a request needs either prompt or messages", do='give {"prompt": "..."}')
    if messages is not None:
        return _encode_messages(models, messages)
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        ids = models.tokenizer.encode(prompt)
        if not prompt or not ids:
            raise FusionError("the prompt is empty", do="give at least one character")
        return Prompt(ids)
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        if min(prompt) < 0 or max(prompt) >= models.vocab_size:
            raise FusionError(f"the prompt holds an id outside of 0 ... {models.vocab_size - 1}")
        return Prompt(prompt)
    raise FusionError(f"prompt is {type(prompt).__name__}", do="give a text or a list of token ids")


def encode_answer(models: Tokenizers, conversation: Conversation) -> tuple[Prompt, list[int]]:
    """(prompt, answer in strong ids) of a conversation's last turn: the very tokens that training would learn."""
    ids, answer = _last_turn(models.tokenizer, conversation)
    own = ids if models.small_tokenizer is models.tokenizer else _last_turn(models.small_tokenizer, conversation)[0]
    return _with_own(models, ids, own), answer


def special_ids(tokenizer: Any) -> set[int]:
    """All control tokens; transformers' `all_special_ids` leaves out those that only templates use."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added}


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer: what the chat template writes behind one, else the tokenizer's eos."""
    ends = _renderer(tokenizer).end_tokens
    return tokenizer.convert_tokens_to_ids(ends[0]) if ends else tokenizer.eos_token_id


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(ids [B, L], mask [B, L])."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_small_prompts(
    models: Tokenizers, prompts: Sequence[Prompt], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor] | None:
    """The small models' prompts of a batch, None where all read the strong model's.

    With a token map a row without a prompt of its own is empty: then the small models read the strong one's text.
    """
    if all(prompt.small_ids is None for prompt in prompts):
        return None
    shared = models.token_map is None
    return left_pad([prompt.small_ids or (prompt.ids if shared else []) for prompt in prompts], 0, device)


def _encode_messages(models: Tokenizers, messages: Any) -> Prompt:
    check_values({"messages": messages})
    ids, own = (
        tokenizer.encode(render_prompt(tokenizer, messages), add_special_tokens=False)
        for tokenizer in (models.tokenizer, models.small_tokenizer)
    )
    return _with_own(models, ids, own)


def _with_own(models: Tokenizers, ids: list[int], own: list[int]) -> Prompt:
    return Prompt(ids, None if models.token_map is None and own == ids else own)


def _last_turn(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """(ids before, ids of the last answer with its end of turn), as training renders and encodes them."""
    try:
        example = _renderer(tokenizer).render(conversation)[-1]
    except RowError as error:
        raise FusionError(error.what) from error
    start, end = example.spans[-1]
    encoded = encode(tokenizer, [RenderedChat(example.text[:end], ((start, end),))])[0]
    ids, first = encoded.input_ids.tolist(), int(encoded.supervised.argmax())
    if first == 0:
        raise FusionError("the conversation has no prompt before its answer")
    return ids[:first], ids[first:]


@lru_cache(maxsize=4)
def _renderer(tokenizer: Any) -> ChatRenderer:
    return ChatRenderer(tokenizer)
