"""FusedCausalLM: a strong model, a small base and its experts, used like one causal language model.

    fused = FusedCausalLM.load("strong-7b", "small-1b", ["adapters/sql"], FusionSpec())
    fused.generate(**fused.tokenizer("...", return_tensors="pt"), max_new_tokens=64)
    fused.score(input_ids_BL, attention_mask_BL)          # log-probabilities of given text

No weight of any model is touched. alpha at a position depends only on the tokens before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.modeling_outputs import CausalLMOutput

from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding import score_text
from mtft.fuse.decoding.decode import decode_step_by_step
from mtft.fuse.decoding.generate_request import GenerateRequest, Observer, expand_per_row, row_specs
from mtft.fuse.expert_routing import PromptRouter
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.fusion_plan import FusionPlan, plan_fusion
from mtft.fuse.load_models import argmax_agreement, load_model, load_weak_model
from mtft.fuse.speculative.speculative import speculative_decode

STRANGERS = 0.3  # share of equal favourites below which load warns; a guess, no study gives one


class FusedCausalLM(FusionCore):
    """The fused model. `load` is the usual way in; the constructor takes models that are loaded already."""

    @classmethod
    def load(
        cls,
        strong: str | Path,
        base: str | Path,
        adapters: Sequence[str | Path],
        spec: FusionSpec | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        quantization: str | None = None,
        tokens: str | None = None,
        base_dtype: str | torch.dtype | None = None,
        base_device: str | torch.device | None = None,
        base_quantization: str | None = None,
        strong_adapter: str | Path | None = None,
        router: str | Path | None = None,
        attention: str = "auto",
        base_attention: str | None = None,
        allow_base_mismatch: bool = False,
        revision: str = "main",
        base_revision: str = "main",
        plan: FusionPlan | None = None,
    ) -> FusedCausalLM:
        """Load all models. adapters: PEFT LoRA folders on `base` (or folders of whole fine-tuned models).

        dtype auto | fp32 | bf16 | fp16; quantization none | nf4 | int8 of the strong model. base_* default to the
        strong model's, except that the base is not quantised. tokens: see vocabulary_match.py. router: a file of
        `mtft merge` for weights: router (expert_routing.py). plan: of an earlier plan_fusion with the same arguments.
        Raises FusionError, before any weight is read where tokenizers and configs tell.
        """
        spec = FusionSpec() if spec is None else spec
        if plan is None:
            plan = plan_fusion(
                strong,
                base,
                adapters,
                spec,
                tokens=tokens,
                routed=router is not None,
                allow_base_mismatch=allow_base_mismatch,
                revision=revision,
                base_revision=base_revision,
            )
        prompt_router = None if router is None else PromptRouter(router, adapters)
        if (coverage := plan.coverage()) is not None:
            warnings.warn(coverage, stacklevel=2)
        strong_model = load_model(
            strong,
            dtype=dtype,
            device=device,
            quantise=quantization or "none",
            attention=attention,
            revision=revision,
            adapter=strong_adapter,
        )
        weak = load_weak_model(
            base,
            adapters,
            allow_base_mismatch=allow_base_mismatch,
            dtype=base_dtype or dtype,
            device=base_device or device,
            quantise=base_quantization or "none",
            attention=base_attention or attention,
            revision=base_revision,
        )
        tokenizer, token_map = plan.tokenizer, plan.token_map
        share = 1.0 if token_map is not None else argmax_agreement(strong_model, weak, tokenizer, plan.shared)
        if share < STRANGERS:
            warnings.warn(
                f"strong model and base have the same favourite token at {share:.0%} of the positions of a probe text: "
                "so different a base can make the fused model worse than either; compare them on your own data",
                stacklevel=2,
            )
        name = f"{strong} + {', '.join(map(str, adapters))}"
        ids: dict[str, Any] = {"vocab_size": plan.vocab_size, "shared": plan.shared, "token_map": token_map}
        ids["small_tokenizer"] = plan.small_tokenizer
        return cls(strong_model, weak, tokenizer, spec, name=name, router=prompt_router, **ids)

    def eval(self) -> FusedCausalLM:
        """All models are in eval mode already; here because evaluation tools call it."""
        return self

    def tie_weights(self) -> None:
        """Nothing to do; here because evaluation tools call it."""

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutput:
        """.logits [B, L, V] = fused log-probabilities at the last `logits_to_keep` positions (0: all)."""
        refused = sorted(name for name, value in kwargs.items() if value not in (None, False))
        if refused:
            raise FusionError(
                f"forward does not take {', '.join(refused)}", do="use score() for losses, generate() to decode"
            )
        if self.spec.weights == "router":
            raise FusionError("a router needs to know where the prompt ends", do="use score() or generate()")
        (rows, length), models = self.check_ids(input_ids).shape, self.cached_models()
        kept = min(logits_to_keep or length, length)
        dtype = torch.promote_types(self.dtype, torch.float32)
        out_BLV = torch.empty(rows, kept, self.vocab_size, dtype=dtype, device=self.device)
        # What is returned is all that holds every position: the models' own logits are made for some at a time.
        step = self.positions_at_once(out_BLV.element_size())
        columns = max(1, step // rows)
        start = 0
        while start < length:
            # the first pass reads the context too, whose logits are never made
            stop = min(start + columns + (length - kept if start == 0 else 0), length)
            mask_BC = None if attention_mask is None else attention_mask[:, start:stop]
            keep = stop - max(start, length - kept)
            logits = models.read(input_ids[:, start:stop], mask_BC, keep)
            flat = logits.map(lambda x_BCV: x_BCV.flatten(0, 1))
            fused_NV = torch.empty_like(flat.strong, dtype=dtype)
            for part in (slice(first, first + step) for first in range(0, len(fused_NV), step)):
                logits_N = flat.map(lambda x_NV, part=part: x_NV[part])
                fused_NV[part] = self.fuse(*logits_N, [self.spec] * len(logits_N.strong)).logprobs_NV
            end = stop - (length - kept)
            out_BLV[:, end - keep : end] = fused_NV.unflatten(0, (rows, keep))
            start = stop
        return CausalLMOutput(logits=out_BLV)

    __call__ = forward

    def generate(self, *args: Any, streamer: Any = None, tokenizer: Any = None, **kwargs: Any) -> Any:
        """As `transformers`' generate of the strong model, with `decode` as the decoding loop.

        Beside its arguments: alpha, alpha_rule, expert_weights (for all rows, or one per row), seed (one number, or one
        per prompt), speculative, trace, expert_input_ids and expert_attention_mask (see decode).
        """
        # transformers hands neither the streamer nor the tokenizer of stop_strings on to a custom loop
        stops = kwargs.pop("stop_strings", None)
        if stops is not None:
            criteria = StopStringCriteria(tokenizer=tokenizer or self.tokenizer, stop_strings=stops)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criteria])
        loop = self.decode if streamer is None else partial(self.decode, streamer=streamer)
        strong: Any = self.strong  # transformers' stubs do not know generate
        return strong.generate(*args, custom_generate=loop, streamer=streamer, **kwargs)

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        *,
        alpha: float | Sequence[float] | None = None,
        alpha_rule: str | Sequence[str] | None = None,
        expert_weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
        specs: Sequence[FusionSpec] | None = None,
        seed: int | Sequence[int] | None = None,
        speculative: int | str | None = None,
        trace: Observer | None = None,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop, for `strong.generate(custom_generate=fused.decode)`. Returns what generate returns.

        alpha, alpha_rule, expert_weights: change the model's spec for all rows, or for each (a list, one entry per
        prompt); a bare alpha means alpha_rule fixed. specs: a whole FusionSpec per prompt instead. seed: of sampling.
        speculative: drafts per round, or auto (speculative.py); the output is the same.
        trace: an observer (token_trace.py). expert_input_ids: another prompt for the small models, left-padded.
        """
        if model is not self.strong:
            raise FusionError("decode was given another model than the strong one", do="call fused.generate")
        rows = len(input_ids)
        if specs is None:
            per_row = row_specs(self.spec, rows, self.experts, alpha, alpha_rule, expert_weights)
        else:
            per_row = expand_per_row("specs", list(specs), rows)
        request = GenerateRequest(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs | {"synced_gpus": synced_gpus},
            specs=per_row,
            seed=seed,
            small_prompt=None if expert_input_ids is None else (expert_input_ids, expert_attention_mask),
            streamer=streamer,
            observer=trace,
        )
        if speculative is None or speculative is False:
            return decode_step_by_step(self, request)
        return speculative_decode(self, request, speculative)

    def score(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor | None = None,
        score_mask_BL: Tensor | None = None,
        *,
        chunk: int | None = None,
    ) -> score_text.TextScore:
        """Log-probability of given text under the fused model (see score_text.score)."""
        return score_text.score(self, self.check_ids(input_ids_BL), attention_mask_BL, score_mask_BL, chunk=chunk)
