"""Which kinds of models of the installed transformers could be packed: a tiny random one of each is tried.

    python scripts/find_packable.py              all causal models that can be built tiny (about two minutes)
    python scripts/find_packable.py llama phi3   these

Of each: the losses and gradients of packed examples beside those of the same examples alone, under the model's own
attention; by positions (sdpa, eager) and by borders (segments). Printed is what differs from
mtft/common/packed_families.py: `add` passes and is not there, `remove` is there and does not pass. A family is added by
hand, with its tests: a config may have parts (a cap, a sink, a chunk) that a tiny one does not show.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mtft.common.packed_families import BY_BORDERS, BY_POSITIONS
from mtft.data.batching.batches import collate
from mtft.data.batching.packed_attention import model_inputs
from mtft.models.segment_attention import NAME, register
from tests.models.tiny_families import examples, settings

LARGEST = 20_000_000  # parameters: what doesn't become small is not tried
CLOSE = 1e-5
ROW = examples([9, 14, 7])


def losses_and_gradients(model: Any, attention: str, *, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.set_attn_implementation(attention)
    model.zero_grad()
    found = []
    for batch in [collate([ROW], 0)] if packed else [collate([[one]], 0) for one in ROW]:
        inputs = model_inputs(batch, attention) if packed else {"input_ids": batch.input_ids_BT, "use_cache": False}
        logits = model(**inputs).logits.float().transpose(1, 2)
        nll_BT = torch.nn.functional.cross_entropy(logits, batch.labels_BT, reduction="none")
        (nll_BT.sum() / 27).backward()
        found.append(nll_BT.detach()[0])
    return torch.cat(found), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def passes(family: str) -> dict[str, bool] | str:
    """{"positions", "borders": whether}, or why it could not be tried."""
    config = AutoConfig.for_model(family, **settings(family))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        return f"{size:,} parameters"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    own = model.config._attn_implementation
    alone, slopes = losses_and_gradients(model, own, packed=False)

    def same(attention: str) -> bool:
        try:
            found, gradients = losses_and_gradients(model, attention, packed=True)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            return False
        if gradients.keys() != slopes.keys() or (found - alone).abs().max() > CLOSE:
            return False
        return all((gradients[name] - slope).abs().max() < CLOSE for name, slope in slopes.items())

    return {"positions": same(own), "borders": model._can_set_attn_implementation() and same(NAME)}


def main(families: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    register()
    wrong = 0
    for family in families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            found = passes(family)
        except Exception as error:  # noqa: BLE001  what configs of other people raise has no end
            found = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        if isinstance(found, str):
            print(f"{family:28s} not tried: {found}", flush=True)
            continue
        for how, known in (("positions", BY_POSITIONS), ("borders", BY_BORDERS)):
            if found[how] != (family in known):
                print(f"{family:28s} {'add' if found[how] else 'REMOVE'}: by {how}", flush=True)
                wrong += not found[how]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
