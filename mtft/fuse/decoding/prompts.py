"""From a request's prompt or messages to token ids.

`prompt` is taken as it stands (a completion); `messages` go through the model's chat template, or through the house's
default one when the tokenizer has none, exactly as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from mtft.data.tokenize.template import DEFAULT_TEMPLATE, adds_bos
from mtft.fuse.alpha.spec import FusionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Any = None, messages: Any = None) -> list[int]:
    """Token ids of a text, a list of ids, or a conversation. FusionError for anything else."""
    if (prompt is None) == (messages is None):
        raise FusionError("a request needs either prompt or messages", do='give {"prompt": "..."}')
    if messages is not None:
        return tokenizer.encode(_render(tokenizer, messages), add_special_tokens=False)
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        if not prompt or not ids:
            raise FusionError("the prompt is empty", do="give at least one character")
        return ids
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return prompt
    raise FusionError(f"prompt is {type(prompt).__name__}", do="give a text or a list of token ids")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Any) -> str:
    fits = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not fits or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise FusionError("messages is no list of {role, content}", do='give [{"role": "user", "content": "..."}]')
    default = tokenizer.chat_template is None
    try:
        text: Any = tokenizer.apply_chat_template(
            messages, chat_template=DEFAULT_TEMPLATE if default else None, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise FusionError(
            f"the chat template refuses the messages: {error}", do="check roles and their order"
        ) from error
    return f"{tokenizer.bos_token}{text}" if default and adds_bos(tokenizer) else text


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(ids [B, L], mask [B, L])."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
