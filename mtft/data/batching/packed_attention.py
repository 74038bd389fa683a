"""The promise that packed examples never see each other, kept in one place.

The trap (transformers 5): rows of several examples are kept apart only if the model gets `position_ids` that restart,
**no** `attention_mask`, and no cache. With an all-ones mask, or with `use_cache=True`, plain causal attention is used
instead, silently, and every example reads the ones before it. With flash attention the same arguments leak as soon as
a batch has more than one row; there the borders must be passed as cumulative lengths.

Models differ in what they do with positions, so packing is allowed for the families for which the test proves it
(mtft.common.packed_families), and for no others.
"""

from __future__ import annotations

from typing import Any

import torch

from mtft.common.device_copy import to_device
from mtft.common.packed_families import BY_POSITIONS
from mtft.data.batching.batch import Batch

# Frequencies that depend on the longest position of the whole batch would let one example change another.
_SHARED_ROPE = ("dynamic", "longrope")
_BY_POSITIONS = ("sdpa", "eager", "flex_attention")
_BY_LENGTHS = ("flash_attention_2", "flash_attention_3", "segments")  # segments: mtft.models.segment_attention


def packing_refusal(config: Any, attention: str) -> str | None:
    """Why a model must not be packed, or None if isolation is proven for it. For the warning of the fallback.

    config: the model's (text) config; attention: its attention implementation ("sdpa", "eager", ...).
    """
    if config.model_type not in BY_POSITIONS:
        return f"packing is not proven to keep examples apart for models of type {config.model_type!r}"
    if attention not in _BY_POSITIONS + _BY_LENGTHS:
        return f"packing is not proven to keep examples apart with attention {attention!r}"
    rope = config.to_dict().get("rope_parameters") or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    shared = kinds.intersection(_SHARED_ROPE)
    if shared:
        return f"the model's {shared.pop()} rotary positions depend on the whole batch"
    return None


def model_inputs(batch: Batch, attention: str, *, packed_ok: bool = True) -> dict[str, Any]:
    """Keyword arguments for `model(**...)` under which no example sees another, whatever else is in its row.

    attention: the model's attention implementation. packed_ok: `packing_refusal(...) is None`; a packed batch for
    another model is a ValueError, not a leak.
    """
    if not packed_ok and batch.packed:
        raise ValueError("this model must not get several examples in a row: see packing_refusal()")
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if not packed_ok:
        return inputs  # one example a row, padded on the right: what every causal model does by itself
    inputs["position_ids"] = batch.position_ids_BT
    if attention in _BY_LENGTHS:
        return inputs | _borders(batch)
    if attention not in _BY_POSITIONS and batch.packed:
        raise ValueError(f"packed rows are not isolated with attention {attention!r}")
    return inputs


def _borders(batch: Batch) -> dict[str, Any]:
    """Cumulative lengths over the flattened batch, for varlen flash attention. Padding joins what it follows."""
    device, position_BT = batch.position_ids_BT.device, batch.host.position_ids_BT
    starts = torch.nonzero((position_BT == 0).flatten(), as_tuple=False).flatten()
    cumulative = torch.cat([starts, torch.tensor([position_BT.numel()])]).to(torch.int32)
    longest = int(cumulative.diff().max())
    if device.type != "cpu":
        cumulative = to_device(cumulative, device)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }
