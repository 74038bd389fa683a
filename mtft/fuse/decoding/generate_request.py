"""One call of generate, checked: what fusion can't do is refused here, saying what to use instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import logits_process as hf

from mtft.fuse.alpha.spec import FusionError, FusionOutput, FusionSpec

if TYPE_CHECKING:
    from mtft.fuse.fusion_core import FusionCore

# They look at each row's ids and scores only, and keep nothing from call to call, so rows may leave.
STATELESS = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)


class Observer(Protocol):
    """Sees every generated token: for statistics and traces (token_trace.py)."""

    def step(
        self,
        rows: list[int],
        fused: FusionOutput,
        tokens_N: Tensor,
        strong_NV: Tensor,
        experts: list[Tensor],
        base_NM: Tensor,
    ) -> None: ...


@dataclass
class GenerateRequest:
    """One call of generate, checked."""

    ids_BL: Tensor
    mask_BL: Tensor | None
    processors: Any  # LogitsProcessorList and StoppingCriteriaList, whose types know LongTensor and 1-tuples only
    criteria: Any
    config: GenerationConfig
    pad: int
    specs: list[FusionSpec]
    seeds: list[tuple[int, int]]  # (seed, sample) of each row
    seeded: bool
    compact: bool
    streamer: Any = None
    observer: Observer | None = None
    small_ids_BL: Tensor | None = None
    small_mask_BL: Tensor | None = None


def row_specs(spec: FusionSpec, rows: int, experts: int, alpha: Any, rule: Any, weights: Any) -> list[FusionSpec]:
    """The spec of every row: `alpha`, `rule` and `weights` for all rows, or a list, one entry per row (or prompt)."""
    nested = weights is not None and len(weights) and not isinstance(weights[0], (int, float))
    alphas, rules = expand_per_row("alpha", alpha, rows), expand_per_row("alpha_rule", rule, rows)
    all_weights = expand_per_row("expert_weights", list(weights or ()) if nested else None, rows)
    specs = []
    for row in range(rows):
        change: dict[str, Any] = {}
        if alphas[row] is not None:
            change["alpha"] = tuple(alphas[row]) if isinstance(alphas[row], (list, tuple)) else alphas[row]
            change["alpha_rule"] = "fixed"  # a constant was asked for; a rule beside it wins
        if rules[row] is not None:
            change["alpha_rule"] = rules[row]
        row_weights = all_weights[row] if nested else weights
        if row_weights is not None:
            change |= {"weights": "user", "user_weights": tuple(float(w) for w in row_weights)}
        specs.append(replace(spec, **change) if change else spec)
        specs[-1].check_experts(experts)
    return specs


def expand_per_row(key: str, value: Any, rows: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * rows
    if not value or rows % len(value):
        raise FusionError(f"{key} has {len(value)} entries for {rows} rows", do="give one value, or one per prompt")
    return [entry for entry in value for _ in range(rows // len(value))]


def prepare_request(
    fused: FusionCore,
    ids_BL: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    *,
    synced_gpus: bool,
    streamer: Any,
    specs: list[FusionSpec],
    seed: int | Sequence[int] | None,
    observer: Observer | None,
    small_ids: Tensor | None,
    small_mask: Tensor | None,
    model_kwargs: dict[str, Any],
) -> GenerateRequest:
    """Check one call of generate; refuse what fusion can't do, saying what to use instead."""
    _refuse(config, synced_gpus, model_kwargs)
    rows = len(ids_BL)
    mask_BL = model_kwargs.get("attention_mask")
    _check_prompt(fused, ids_BL, mask_BL, config, "prompt")
    if small_ids is not None:
        small_ids = _expand(small_ids, rows)
        small_mask = None if small_mask is None else _expand(small_mask, rows)
        _check_prompt(fused, small_ids, small_mask, config, "expert prompt")
    small = (ids_BL, mask_BL) if small_ids is None else (small_ids, small_mask)
    eos = [i for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.flatten().tolist()]
    pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
    seeded = seed is not None
    seeds = [seed] if isinstance(seed, int) else seed
    if seeds is None:
        seeds = [int(torch.randint(0, 2**62, ()))]  # torch.manual_seed decides
    if not len(seeds) or rows % len(seeds):
        raise FusionError(f"seed has {len(seeds)} entries for {rows} rows", do="give one seed, or one per prompt")
    each = rows // len(seeds)
    return GenerateRequest(
        ids_BL=ids_BL,
        mask_BL=mask_BL,
        processors=processors,
        criteria=criteria,
        config=config,
        pad=int(pad),
        specs=fused.route_prompts(specs, *small),
        seeds=[(int(s), sample) for s in seeds for sample in range(each)],
        seeded=seeded,
        compact=all(type(processor) in STATELESS for processor in processors),
        streamer=streamer,
        observer=observer,
        small_ids_BL=small_ids,
        small_mask_BL=small_mask,
    )


def _refuse(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    past = model_kwargs.get("cache")
    unsupported = {
        "num_beams > 1": ((config.num_beams or 1) > 1, "do_sample=True with num_return_sequences, or greedy"),
        "penalty_alpha": (bool(config.penalty_alpha), "plausibility in FusionSpec"),
        "prompt lookup": (config.prompt_lookup_num_tokens is not None, "fused.generate without it"),
        "guidance_scale": (config.guidance_scale not in (None, 1), "alpha, which steers the model here"),
        "synced_gpus": (synced_gpus, "one process per model copy"),
        "a filled cache": (past is not None and past.get_seq_length() > 0, "the whole prompt as input_ids"),
        "a static cache": (isinstance(past, StaticCache), "the default cache"),
        "output_attentions": (bool(config.output_attentions), "the strong model alone"),
        "output_hidden_states": (bool(config.output_hidden_states), "the strong model alone"),
        "labels": (model_kwargs.get("labels") is not None, "fused.score"),
        "inputs_embeds": (model_kwargs.get("inputs_embeds") is not None, "input_ids"),
    }
    for name, (requested, instead) in unsupported.items():
        if requested:
            raise FusionError(f"fused decoding does not take {name}", do=f"use {instead}")


def _check_prompt(
    fused: FusionCore, ids_BL: Tensor, mask_BL: Tensor | None, config: GenerationConfig, name: str
) -> None:
    if ids_BL.shape[1] == 0 or (mask_BL is not None and bool((mask_BL.sum(-1) == 0).any())):
        raise FusionError(f"an empty {name}", do="give at least one token per row")
    if mask_BL is not None and bool((mask_BL[:, -1] == 0).any()):
        raise FusionError(f"the {name} is padded on the right", do="set tokenizer.padding_side = 'left'")
    longest = ids_BL.shape[1] if mask_BL is None else int(mask_BL.sum(-1).max())
    if longest > fused.context:
        raise FusionError(
            f"the {name} has {longest} tokens, the smaller context holds {fused.context}", do="shorten the prompt"
        )
    fused.check_ids(ids_BL)


def _expand(x_BL: Tensor, rows: int) -> Tensor:
    if rows % len(x_BL):
        raise FusionError(f"expert_input_ids has {len(x_BL)} rows for {rows}", do="give one per prompt")
    return x_BL.repeat_interleave(rows // len(x_BL), 0)
