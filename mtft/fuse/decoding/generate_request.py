"""One call of generate, checked: what fusion can't do is refused here, saying what to use instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, StaticCache
from transformers.generation import logits_process as hf

from mtft.fuse.alpha.spec import FusionError, FusionOutput, FusionSpec, is_number
from mtft.fuse.decoding.gumbel_sampling import is_greedy
from mtft.fuse.decoding.model_state import PaddedIds

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


class Steered(Protocol):
    """What steering a request depends on: of a fused model, or of its plan."""

    @property
    def spec(self) -> FusionSpec: ...
    @property
    def experts(self) -> int: ...


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
        /,
    ) -> None: ...


class GenerateRequest:
    """One call of generate, checked: what fusion can't do is refused, saying what to use instead.

    seeds: (seed, sample) of each row. compact: rows may leave. small_prompt: the small models' own, if they have one.
    """

    def __init__(
        self,
        fused: FusionCore,
        ids_BL: Tensor,
        processors: Any,  # LogitsProcessorList and StoppingCriteriaList, whose types know LongTensor and 1-tuples only
        criteria: Any,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *,
        specs: list[FusionSpec],
        seed: int | Sequence[int] | None,
        small_prompt: PaddedIds | None,
        streamer: Any,
        observer: Observer | None,
    ) -> None:
        _refuse(config, model_kwargs)
        self.ids_BL, self.mask_BL = ids_BL, model_kwargs.get("attention_mask")
        self.processors: Any = processors
        self.criteria, self.config = criteria, config
        self.streamer, self.observer = streamer, observer
        self.sample = bool(config.do_sample) and not is_greedy(config.temperature)
        if config.do_sample and not self.sample:  # it would make all scores -inf
            self.processors = LogitsProcessorList(
                p for p in processors if not isinstance(p, hf.TemperatureLogitsWarper)
            )
        rows = len(ids_BL)
        _check_prompt(fused, ids_BL, self.mask_BL, "prompt")
        if small_prompt is not None:
            small_prompt = _expand_prompt(*small_prompt, rows)
            _check_prompt(fused, *small_prompt, "expert prompt", small=True)
        self.small_prompt = small_prompt
        self.specs = fused.route_prompts(specs, *(small_prompt or (ids_BL, self.mask_BL)))
        # without a seed torch.manual_seed decides
        seeds = [int(torch.randint(0, 2**62, ()))] if seed is None else [seed] if isinstance(seed, int) else list(seed)
        row_seeds = expand_per_row("seed", seeds, rows)
        self.seeds = [(int(row_seed), row % (rows // len(seeds))) for row, row_seed in enumerate(row_seeds)]
        self.seeded = seed is not None
        eos = [c.eos_token_id.flatten().tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
        self.end_ids: list[int] = list(chain(*eos))
        pad = config.pad_token_id
        self.pad = int(pad if pad is not None else (self.end_ids or [0])[0])
        self.compact = all(type(processor) in STATELESS for processor in processors)


def row_specs(spec: FusionSpec, rows: int, experts: int, alpha: Any, rule: Any, weights: Any) -> list[FusionSpec]:
    """The spec of every row: `alpha`, `rule` and `weights` for all rows, or a list, one entry per row (or prompt)."""
    nested = weights is not None and len(weights) and not isinstance(weights[0], (int, float))
    alphas, rules = expand_per_row("alpha", alpha, rows), expand_per_row("alpha_rule", rule, rows)
    all_weights = expand_per_row("expert_weights", list(weights or ()), rows) if nested else [weights] * rows
    specs = []
    for row_alpha, row_rule, row_weights in zip(alphas, rules, all_weights, strict=True):
        change: dict[str, Any] = {}
        if row_alpha is not None:  # a constant was asked for; a rule beside it wins
            one = tuple(row_alpha) if isinstance(row_alpha, (list, tuple)) else row_alpha
            change = {"alpha": one, "alpha_rule": "fixed"}
        if row_rule is not None:
            change["alpha_rule"] = row_rule
        if row_weights is not None:
            if not all(map(is_number, row_weights)):
                raise FusionError("expert_weights holds what is no finite number", do="use numbers >= 0")
            change |= {"weights": "user", "user_weights": tuple(map(float, row_weights))}
        specs.append(replace(spec, **change) if change else spec)
        specs[-1].check_experts(experts)
    return specs


def request_spec(fused: Steered, alpha: Any, rule: Any, weights: Any) -> FusionSpec:
    """The model's spec with what one request asks for; `alpha` may be a list, one entry per expert."""
    alpha = tuple(alpha) if isinstance(alpha, list) else alpha
    return row_specs(fused.spec, 1, fused.experts, alpha, rule, weights)[0]


def expand_per_row(key: str, value: Any, rows: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * rows
    if not value or rows % len(value):
        raise FusionError(f"{key} has {len(value)} entries for {rows} rows", do="give one value, or one per prompt")
    return [entry for entry in value for _ in range(rows // len(value))]


def _expand_prompt(ids_BL: Tensor, mask_BL: Tensor | None, rows: int) -> PaddedIds:
    def expand(x_BL: Tensor) -> Tensor:
        return torch.stack(expand_per_row("expert_input_ids", list(x_BL), rows))

    return expand(ids_BL), None if mask_BL is None else expand(mask_BL)


def _refuse(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    past = model_kwargs.get("cache")
    unsupported = {
        "num_beams > 1": ((config.num_beams or 1) > 1, "do_sample=True with num_return_sequences, or greedy"),
        "penalty_alpha": (bool(config.penalty_alpha), "plausibility in FusionSpec"),
        "prompt lookup": (config.prompt_lookup_num_tokens is not None, "fused.generate without it"),
        "guidance_scale": (config.guidance_scale not in (None, 1), "alpha, which steers the model here"),
        "synced_gpus": (bool(model_kwargs.get("synced_gpus")), "one process per model copy"),
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


def _check_prompt(fused: FusionCore, ids_BL: Tensor, mask_BL: Tensor | None, name: str, *, small: bool = False) -> None:
    mapped = small and fused.token_map is not None
    if mapped and mask_BL is not None:  # a row without tokens has no prompt of its own (mapped_state.py)
        own_B = mask_BL.sum(-1) > 0
        ids_BL, mask_BL = ids_BL[own_B], mask_BL[own_B]
        if not len(ids_BL):
            return
    if ids_BL.shape[1] == 0 or (mask_BL is not None and bool((mask_BL.sum(-1) == 0).any())):
        raise FusionError(f"an empty {name}", do="give at least one token per row")
    if mask_BL is not None and bool((mask_BL[:, -1] == 0).any()):
        raise FusionError(f"the {name} is padded on the right", do="set tokenizer.padding_side = 'left'")
    longest = ids_BL.shape[1] if mask_BL is None else int(mask_BL.sum(-1).max())
    if longest > fused.context:
        raise FusionError(
            f"the {name} has {longest} tokens, the smaller context holds {fused.context}", do="shorten the prompt"
        )
    fused.check_ids(ids_BL, fused.shared if mapped else None)
