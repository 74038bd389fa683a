"""What every use of a fused model shares: the models, fresh caches, fused positions, routed prompts.

Decoding (decoding/, speculative/), scoring and the server take a `FusionCore`; fused_model.py makes it a causal
language model with `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mtft.fuse.alpha.buffers import FusionBuffers
from mtft.fuse.alpha.per_row import fuse_rows
from mtft.fuse.alpha.spec import FusionError, FusionOutput, FusionSpec
from mtft.fuse.decoding.mapped_state import MappedModels
from mtft.fuse.decoding.model_state import CachedModel, CachedModels, ModelLogits
from mtft.fuse.decoding.multi_lora import BASE
from mtft.fuse.decoding.prompts import end_of_turn
from mtft.fuse.expert_routing import PromptRouter
from mtft.fuse.fusion_plan import MERGE_FIRST, NO_ROUTER, check_rolled_back, check_width
from mtft.fuse.load_models import WeakModel
from mtft.fuse.speculative.draft_length import DraftLength
from mtft.fuse.tokenizers.token_map import TokenMap

MAX_LOGIT_BYTES = 256 << 20


class FusionCore:
    """A strong model, a small base with its experts, and the spec that fuses them.

    shared: how many of the first ids the small models know; vocab_size: ids of the strong tokenizer. All logits are
    cut to these (never to a padded width).
    """

    def __init__(
        self,
        strong: PreTrainedModel,
        weak: WeakModel,
        tokenizer: PreTrainedTokenizerBase | None,
        spec: FusionSpec,
        *,
        vocab_size: int,
        shared: int | None = None,
        name: str = "fused",
        max_logit_bytes: int = MAX_LOGIT_BYTES,
        token_map: TokenMap | None = None,
        router: PromptRouter | None = None,
        small_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.strong, self.weak, self.spec = strong, weak, spec
        self.tokenizer: Any = tokenizer  # None only in code that never touches text
        self.vocab_size, self.shared = vocab_size, vocab_size if shared is None else shared
        # whose chat template the small models' prompts have
        self.small_tokenizer: Any = small_tokenizer or (tokenizer if token_map is None else token_map.small)
        self.token_map = token_map  # the small models have another tokenizer; then `shared` counts its ids
        self.name_or_path, self.max_logit_bytes = name, max_logit_bytes
        self.last_draft_length: DraftLength | None = None  # of the last speculative call: acceptance and times
        # the last `auto` one by number of rows: what it has learnt serves the next
        self.draft_lengths: dict[int, DraftLength] = {}
        self._buffers = FusionBuffers()
        self.experts = len(weak.order)
        spec.check_experts(self.experts)
        if router is not None and token_map is not None:
            raise FusionError("a router reads the small model's own tokens", do="use weights: active with tokens: map")
        self.router = router
        smalls: list[Any] = [weak.model, *weak.own]
        for model, needed in ((strong, self.vocab_size), *((small, self.shared) for small in smalls)):
            head: Any = model.get_output_embeddings()
            check_width(str(model.name_or_path), head.weight.shape[0], needed)
        for small in smalls if token_map is not None else ():
            check_rolled_back(str(small.name_or_path), small.config)
        self.known = min(small.get_input_embeddings().weight.shape[0] for small in smalls)
        self.small_context = min(small.config.get_text_config().max_position_embeddings for small in smalls)
        self.config = copy.deepcopy(strong.config)
        self.config.vocab_size = self.vocab_size
        strong_context = strong.config.get_text_config().max_position_embeddings
        self.config.max_position_embeddings = min(strong_context, self.small_context)

    @property
    def device(self) -> torch.device:
        return self.strong.device

    @property
    def dtype(self) -> torch.dtype:
        return self.strong.dtype

    @property
    def generation_config(self) -> GenerationConfig:
        return self.strong.generation_config

    @property
    def context(self) -> int:
        """Positions that all models can read."""
        return self.config.max_position_embeddings

    @property
    def end_ids(self) -> set[int]:
        """The ids that end a text: generation_config may list several; and the chat template's end of turn."""
        ends = self.generation_config.eos_token_id
        listed = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        return listed | self._turn_end

    @cached_property
    def _turn_end(self) -> set[int]:
        """What a chat template ends answers with: generation_config may list the tokenizer's eos only."""
        end = end_of_turn(self.tokenizer) if self.tokenizer is not None and self.tokenizer.chat_template else None
        return set() if end is None else {end}

    def cached_models(self) -> CachedModels:
        """Fresh caches for one decode."""
        rows = [group for index, group in self.weak.order if index < 0]
        known = self.known if self.known < self.vocab_size else None  # None: no id is strange to the small models
        cut: dict[str, Any] = {"width": self.shared, "known": known, "substitute": self._substitute()}
        strong = CachedModel(self.strong, (0,), width=self.vocab_size)
        weak = CachedModel(self.weak.model, (*rows, BASE), layout=self.weak.layout, **cut)
        own = [CachedModel(model, (0,), **cut) for model in self.weak.own]
        if self.token_map is None:
            return CachedModels(strong, weak, own, self.weak.order)
        return MappedModels(strong, weak, own, self.weak.order, self.token_map, self.small_context)

    def route_prompts(self, specs: Sequence[FusionSpec], ids_BL: Tensor, mask_BL: Tensor | None) -> list[FusionSpec]:
        """The specs of these prompts, with weights in the place of `weights: router`."""
        if all(spec.weights != "router" for spec in specs):
            return list(specs)
        if self.router is None:
            raise FusionError(NO_ROUTER, do=MERGE_FIRST)
        if self.known < self.vocab_size:
            ids_BL = ids_BL.masked_fill(ids_BL >= self.known, self._substitute())
        return self.router.specs(self.weak, ids_BL, mask_BL, specs)

    def to_strong_vocabulary(self, logits: ModelLogits) -> ModelLogits:
        """Small models with another tokenizer: their log-probabilities at the strong ids that they can say."""
        if self.token_map is None:
            return logits
        token_map = self.token_map

        def spread(x_NM: Tensor) -> Tensor:
            return token_map.spread(torch.log_softmax(x_NM.float(), -1), -torch.inf)

        return ModelLogits(logits.strong, [spread(x_NM) for x_NM in logits.experts], spread(logits.base))

    def full_logprobs(self, logits: Tensor) -> Tensor:
        """Log-probabilities [..., V] of one model alone, over all ids of the strong vocabulary."""
        return self.pad_to_vocabulary(torch.log_softmax(logits.float(), -1))

    def pad_to_vocabulary(self, scores: Tensor) -> Tensor:
        """Scores [..., M] of a small model over all V ids; it gives the ids that it lacks no chance."""
        return torch.nn.functional.pad(scores, (0, self.vocab_size - scores.shape[-1]), value=-torch.inf)

    def _substitute(self) -> int:
        """What a small model reads in place of an id that it does not have."""
        known = [None] if self.tokenizer is None else [self.tokenizer.unk_token_id, self.tokenizer.eos_token_id]
        return next((token for token in known if token is not None and token < self.shared), 0)

    def fuse(
        self, strong_NV: Tensor, experts_TNM: Sequence[Tensor], base_NM: Tensor, specs: Sequence[FusionSpec]
    ) -> FusionOutput:
        """Fuse N positions, each with its own spec (equal specs are solved together).

        The answer's logprobs_NV stand in memory that the next call writes over: copy what must last.
        """
        return fuse_rows(strong_NV, experts_TNM, base_NM, specs, self._buffers, self.token_map)

    def positions_at_once(self, element_size: int = 4) -> int:
        """How many positions keep all [*, V] buffers, at most 2T + 8 of them, under max_logit_bytes."""
        return max(1, self.max_logit_bytes // ((2 * self.experts + 8) * self.vocab_size * element_size))

    def check_ids(self, input_ids: Tensor, known: int | None = None) -> Tensor:
        """known: ids that there are; by default those of the strong tokenizer."""
        known = self.vocab_size if known is None else known
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise FusionError(
                f"input_ids has shape {list(input_ids.shape)}: an empty prompt", do="give at least one token"
            )
        if int(input_ids.max()) >= known or int(input_ids.min()) < 0:
            raise FusionError(f"input_ids holds an id outside of 0 ... {known - 1}", do="use the strong tokenizer")
        return input_ids
