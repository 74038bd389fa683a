"""Hidden states of a causal language model: what routers are fitted on and asked with."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor


@torch.no_grad()
def last_token_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """States [B, d] of the last layer at each row's last token that the mask lets through.

    The body alone is asked: no logits are made, and of the layers only the last one's states are kept.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if bare.base_model is bare:  # Llama4ForCausalLM does not say which of its parts is the body
        hidden_BTD = bare(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    else:
        hidden_BTD = bare.base_model(**inputs).last_hidden_state
    if attention_mask is None:
        return hidden_BTD[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).argmax(dim=1)
    return hidden_BTD[torch.arange(len(last), device=last.device), last]
