"""Load the models of a fusion: a strong one (any precision), one small base, experts as rows of it or on their own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtft.adapters.lora_factors import LoraAdapter, read_adapter
from mtft.common.errors import MergeError
from mtft.fuse.alpha.spec import choose
from mtft.fuse.decoding.multi_lora import BASE, MultiLoraLayout, attach_multi_lora, multi_lora_refusal
from mtft.fuse.decoding.transposed_linear import transpose_lm_head
from mtft.fuse.fusion_plan import check_adapter, check_experts, check_safetensors
from mtft.fuse.tokenizers.probe_text import LINES
from mtft.models.adapters import check_base, check_covers, load_adapter
from mtft.models.loading import DTYPES, load_causal_lm, resolve_dtype


@dataclass
class WeakModel:
    """The small models. order[t] = (-1, row group of `model`) or (index in `own`, 0): where expert t is."""

    model: PreTrainedModel
    layout: MultiLoraLayout
    own: list[PreTrainedModel]
    order: list[tuple[int, int]]
    names: list[str]


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantise: str = "none",
    attention: str = "auto",
    revision: str = "main",
    adapter: str | Path | None = None,
) -> PreTrainedModel:
    """One causal language model from safetensors, in eval mode, without gradients. `adapter`: LoRA merged into it."""
    choose(quantise, ("none", "nf4", "int8"), "quantise")
    if isinstance(dtype, str):
        dtype = resolve_dtype(choose(dtype, ("auto", *DTYPES), "dtype"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_causal_lm(
        path, dtype=dtype, revision=revision, quantise=quantise, attention=attention, device=device
    )
    if adapter is not None:
        model = _own_expert(model, Path(adapter), quantised=quantise != "none", allow_base_mismatch=False)
    transpose_lm_head(model)
    return freeze(model)


def freeze(model: Any) -> Any:
    model.requires_grad_(False)
    return model.eval()


def load_weak_model(
    base: str | Path, experts: Sequence[str | Path], *, allow_base_mismatch: bool = False, **options
) -> WeakModel:
    """The small base with its experts: LoRA folders, or folders of whole fine-tuned models.

    LoRA experts become rows of the one base. What is no plain LoRA on linear layers (DoRA, modules_to_save, biases,
    embeddings, a whole model) is loaded as a model of its own, with one warning that says why.
    """
    check_experts(experts)
    model = load_model(base, **options)
    rows: list[LoraAdapter] = []
    own: list[PreTrainedModel] = []
    order: list[tuple[int, int]] = []
    for expert in map(Path, experts):
        adapter, reason = None, "it is a whole model"
        is_adapter = (expert / "adapter_config.json").is_file()
        if is_adapter:
            check_adapter(expert, base, allow_base_mismatch)
            if not allow_base_mismatch:
                check_base(expert, model)
            adapter, reason = _as_rows(expert, model)
        if adapter is not None:
            order.append((-1, len(rows)))
            rows.append(adapter)
            continue
        warnings.warn(
            f"expert {str(expert)!r} runs as a model of its own, not as rows of the base: {reason}", stacklevel=2
        )
        order.append((len(own), 0))
        alone: Any = load_model(base if is_adapter else expert, **options)
        if is_adapter:
            quantised = options.get("quantise", "none") != "none"
            alone = freeze(_own_expert(alone, expert, quantised, allow_base_mismatch))
        own.append(alone)
    layout = attach_multi_lora(model, rows) if rows else MultiLoraLayout(0)
    return WeakModel(model, layout, own, order, [str(expert) for expert in experts])


@torch.no_grad()
def argmax_agreement(
    strong: PreTrainedModel, weak: WeakModel, tokenizer: PreTrainedTokenizerBase, shared: int
) -> float:
    """Share of positions of the probe's whole lines where strong model and base have the same favourite token."""
    same = count = 0
    weak.layout.set((BASE,), 1)
    for line in LINES:
        ids_1L = torch.tensor([[token for token in tokenizer.encode(line) if token < shared]])
        if not ids_1L.numel():
            continue
        favourites = [model(ids_1L.to(model.device)).logits[0, :, :shared].argmax(-1) for model in (strong, weak.model)]
        same += int((favourites[0].cpu() == favourites[1].cpu()).sum())
        count += ids_1L.numel()
    return same / max(count, 1)


def _as_rows(expert: Path, model: nn.Module) -> tuple[LoraAdapter | None, str | None]:
    """(the adapter, None) if it can run as rows, else (None, the reason why not)."""
    try:
        adapter = read_adapter(expert)
    except MergeError as error:
        return None, error.what
    reason = multi_lora_refusal(adapter, model)
    if reason is None:
        check_covers(expert, set(adapter.modules), model)
    return (adapter if reason is None else None), reason


def _own_expert(model: PreTrainedModel, expert: Path, quantised: bool, allow_base_mismatch: bool) -> nn.Module:
    """`model` with the adapter: merged, but beside it where that would round quantised weights or is impossible."""
    check_safetensors(expert)
    tuned: Any = load_adapter(model, expert, any_base=allow_base_mismatch)
    if quantised or tuned.peft_config["default"].lora_bias:
        return tuned.get_base_model()
    return tuned.merge_and_unload()
