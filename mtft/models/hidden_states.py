"""Hidden states of a causal language model: what routers are fitted on and asked with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def last_token_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """States [B, d] of the last layer at each row's last token that the mask lets through."""
    out = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    hidden_BTD = out.hidden_states[-1]
    if attention_mask is None:
        return hidden_BTD[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).argmax(dim=1)
    return hidden_BTD[torch.arange(len(last), device=last.device), last]
