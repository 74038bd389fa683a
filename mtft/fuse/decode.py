"""The decoding loop: alpha -> fused log-probabilities -> logits processors -> one token per row.

It stands behind `transformers`' generate, which prepares processors, stopping criteria and masks. Finished rows emit
padding and, when at most 3/4 of the rows are left, leave the caches; stopping criteria always see all rows, because
some keep state per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import logits_process as hf

from . import sampling
from .spec import Fused, FusionError, FusionSpec

if TYPE_CHECKING:
    from .model import FusedCausalLM

COMPACT = 0.75  # of the rows: at or below, finished rows leave the batch
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
    """Sees every generated token: for statistics and traces (trace.py)."""

    def step(
        self, rows: list[int], fused: Fused, tokens_N: Tensor, strong_NV: Tensor, experts: list[Tensor], base_NM: Tensor
    ) -> None: ...


@dataclass
class Request:
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
    alphas, rules = per_row("alpha", alpha, rows), per_row("alpha_rule", rule, rows)
    all_weights = per_row("expert_weights", list(weights or ()) if nested else None, rows)
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


def per_row(key: str, value: Any, rows: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * rows
    if not value or rows % len(value):
        raise FusionError(f"{key} has {len(value)} entries for {rows} rows", do="give one value, or one per prompt")
    return [entry for entry in value for _ in range(rows // len(value))]


def prepare(
    fused: FusedCausalLM,
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
) -> Request:
    """Check one call of generate; refuse what fusion can't do, saying what to use instead."""
    _refuse(config, synced_gpus, model_kwargs)
    rows = len(ids_BL)
    mask_BL = model_kwargs.get("attention_mask")
    _check_prompt(fused, ids_BL, mask_BL, config, "prompt")
    if small_ids is not None:
        small_ids = _expand(small_ids, rows)
        small_mask = None if small_mask is None else _expand(small_mask, rows)
        _check_prompt(fused, small_ids, small_mask, config, "expert prompt")
    eos = [i for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.flatten().tolist()]
    pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
    seeded = seed is not None
    seeds = [seed] if isinstance(seed, int) else seed
    if seeds is None:
        seeds = [int(torch.randint(0, 2**62, ()))]  # torch.manual_seed decides
    if not len(seeds) or rows % len(seeds):
        raise FusionError(f"seed has {len(seeds)} entries for {rows} rows", do="give one seed, or one per prompt")
    each = rows // len(seeds)
    return Request(
        ids_BL=ids_BL,
        mask_BL=mask_BL,
        processors=processors,
        criteria=criteria,
        config=config,
        pad=int(pad),
        specs=specs,
        seeds=[(int(s), sample) for s in seeds for sample in range(each)],
        seeded=seeded,
        compact=all(type(processor) in STATELESS for processor in processors),
        streamer=streamer,
        observer=observer,
        small_ids_BL=small_ids,
        small_mask_BL=small_mask,
    )


def _refuse(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    past = model_kwargs.get("past_key_values")
    wishes = {
        "num_beams > 1": ((config.num_beams or 1) > 1, "do_sample=True with num_return_sequences, or greedy"),
        "penalty_alpha": (bool(config.penalty_alpha), "plausibility in FusionSpec"),
        "prompt lookup": (config.prompt_lookup_num_tokens is not None, "fused.generate without it"),
        "guidance_scale": (config.guidance_scale not in (None, 1), "alpha, which steers the model here"),
        "synced_gpus": (synced_gpus, "one process per model copy"),
        "past_key_values": (past is not None and past.get_seq_length() > 0, "the whole prompt as input_ids"),
        "a static cache": (isinstance(past, StaticCache), "the default cache"),
        "output_attentions": (bool(config.output_attentions), "the strong model alone"),
        "output_hidden_states": (bool(config.output_hidden_states), "the strong model alone"),
        "labels": (model_kwargs.get("labels") is not None, "fused.score"),
        "inputs_embeds": (model_kwargs.get("inputs_embeds") is not None, "input_ids"),
    }
    for name, (wanted, instead) in wishes.items():
        if wanted:
            raise FusionError(f"fused decoding does not take {name}", do=f"use {instead}")


def _check_prompt(
    fused: FusedCausalLM, ids_BL: Tensor, mask_BL: Tensor | None, config: GenerationConfig, name: str
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
    fused._checked(ids_BL)


def _expand(x_BL: Tensor, rows: int) -> Tensor:
    if rows % len(x_BL):
        raise FusionError(f"expert_input_ids has {len(x_BL)} rows for {rows}", do="give one per prompt")
    return x_BL.repeat_interleave(rows // len(x_BL), 0)


@torch.no_grad()
def direct(fused: FusedCausalLM, request: Request) -> Tensor | GenerateDecoderOnlyOutput:
    """One token per pass of all models."""
    tokens_BL, device = request.ids_BL, request.ids_BL.device
    rows = len(tokens_BL)
    finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
    active_A = torch.arange(rows, device=device)  # rows in the caches
    sides = fused.sides()
    logits = sides.read(tokens_BL, request.mask_BL, 1, request.small_ids_BL, request.small_mask_BL)
    kept = Kept(request, fused.vocab_size)
    position = 0
    while True:
        strong_AV, experts, base_AM = logits[0][:, -1], [expert[:, -1] for expert in logits[1]], logits[2][:, -1]
        active = active_A.tolist()
        step = fused.fuse(strong_AV, experts, base_AM, [request.specs[row] for row in active])
        scores_AV = step.logprobs_NV.to(device)
        if request.processors:  # some write into the scores they are given
            scores_AV = process(request, active, tokens_BL[active_A], scores_AV.clone())
        next_A = pick(request, scores_AV, active, [position] * len(active))
        next_B = torch.full((rows,), request.pad, dtype=torch.long, device=device)
        next_B[active_A] = torch.where(finished_B[active_A], request.pad, next_A)
        if request.observer is not None:
            live = (~finished_B[active_A]).nonzero().squeeze(-1)
            seen = select_fused(step, live) if len(live) < len(active) else step
            here = live.to(strong_AV.device)
            request.observer.step(
                active_A[live].tolist(),
                seen,
                next_A[live],
                strong_AV[here],
                [fused.over_strong_ids(expert[here]) for expert in experts],
                fused.over_strong_ids(base_AM[here]),
            )
        kept.add(active_A, scores_AV, step.logprobs_NV)
        tokens_BL = torch.cat([tokens_BL, next_B[:, None]], -1)
        if request.streamer is not None:
            request.streamer.put(next_B.cpu())
        finished_B = finished_B | request.criteria(tokens_BL, kept.scores)
        position += 1
        if bool(finished_B.all()):
            break
        open_A = (~finished_B[active_A]).nonzero().squeeze(-1)
        if request.compact and len(open_A) <= COMPACT * len(active_A):
            sides.select(open_A)
            active_A = active_A[open_A]
        # a finished row that stays reads padding that is never attended to: its positions must not grow
        idle_A = finished_B[active_A]
        mask_A1 = (~idle_A).long()[:, None] if bool(idle_A.any()) else None
        logits = sides.read(next_B[active_A][:, None], mask_A1)
    if request.streamer is not None:
        request.streamer.end()
    return kept.output(tokens_BL)


def process(request: Request, rows: list[int], ids_NL: Tensor, scores_NV: Tensor) -> Tensor:
    """The logits processors on some of the rows. They may write into scores_NV."""
    if len(rows) == len(request.ids_BL) and rows == sorted(set(rows)):
        return request.processors(ids_NL, scores_NV)
    some: Any = LogitsProcessorList(_for_rows(processor, rows) for processor in request.processors)
    return some(ids_NL, scores_NV)


def _for_rows(processor: hf.LogitsProcessor, rows: list[int]) -> hf.LogitsProcessor:
    """The one stateless processor that knows all rows: it skips each row's padding."""
    if isinstance(processor, hf.RepetitionPenaltyLogitsProcessor) and isinstance(
        processor.prompt_ignore_length, Tensor
    ):
        return hf.RepetitionPenaltyLogitsProcessor(processor.penalty, processor.prompt_ignore_length[rows])
    return processor


def pick(request: Request, scores_NV: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
    """The next token of each row: argmax, or the Gumbel draw of its (seed, sample, position)."""
    if not request.config.do_sample:
        return scores_NV.argmax(-1)
    keys = [sampling.key(*request.seeds[row], at) for row, at in zip(rows, positions, strict=True)]
    return sampling.sample(scores_NV, sampling.gumbel(keys, scores_NV.shape[-1], scores_NV.device))


def select_fused(fused: Fused, rows: Tensor) -> Fused:
    """Some rows of a Fused."""
    part = {name: value[rows.to(value.device)] for name, value in vars(fused).items() if name != "evaluations"}
    return Fused(**part, evaluations=fused.evaluations)


class Kept:
    """scores (after processors) and logits (before) of all rows, if generate was asked to return them."""

    def __init__(self, request: Request, width: int) -> None:
        config = request.config
        self.request, self.width = request, width
        wanted = bool(config.return_dict_in_generate)
        self.scores: Any = () if wanted and config.output_scores else None
        self.logits: Any = () if wanted and config.output_logits else None

    def add(self, rows_A: Tensor, scores_AV: Tensor, logprobs_AV: Tensor) -> None:
        if self.scores is not None:
            self.scores += (self._full(rows_A, scores_AV),)
        if self.logits is not None:
            self.logits += (self._full(rows_A, logprobs_AV),)

    def _full(self, rows_A: Tensor, values_AV: Tensor) -> Tensor:
        """All rows, as a copy; those that have left hold a certain padding token."""
        if len(rows_A) == len(self.request.ids_BL):
            return values_AV.clone()
        full_BV = values_AV.new_full((len(self.request.ids_BL), self.width), -torch.inf)
        full_BV[:, self.request.pad] = 0
        full_BV[rows_A] = values_AV.to(full_BV)
        return full_BV

    def output(self, tokens_BL: Any) -> Tensor | GenerateDecoderOnlyOutput:
        if not self.request.config.return_dict_in_generate:
            return tokens_BL
        return GenerateDecoderOnlyOutput(sequences=tokens_BL, scores=self.scores, logits=self.logits)
