"""lm-evaluation-harness on a fused model: the model type `mtft_fused`.

    python -m mtft.fuse.lm_eval_model run --model mtft_fused \\
        --model_args strong=BIG,base=SMALL,adapter=DIR,alpha_rule=jeffreys --tasks arc_easy,gsm8k

takes lm-eval's own arguments: lm-eval scans no entry points, so this module registers the type and then hands over.
`HFLM(pretrained=fused, tokenizer=fused.tokenizer)` works as well; this class scores through `FusedCausalLM.score`,
which never makes a [batch, length, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.fused_model import FusedCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "+"  # between several adapters: lm-eval's --model_args splits at commas
AUTO_BATCH = 8
SPEC_OPTIONS = [field.name for field in fields(FusionSpec)]
LOAD_OPTIONS = ("dtype", "device", "quantization", "strong_adapter", "router")

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (cache key, context ids, continuation ids)


class FusedLM(cast("type[Any]", HFLM)):  # the decorator that registers HFLM hides its type, as it would hide ours
    """A fused model for lm-eval. Options: strong, base, adapter (A+B for two), FusionSpec's, and LOAD_OPTIONS."""

    def __init__(
        self,
        strong: str | None = None,
        base: str | None = None,
        adapter: str | None = None,
        *,
        fused: FusedCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        spec_options, load_options = (
            {name: options.pop(name) for name in names if name in options} for names in (SPEC_OPTIONS, LOAD_OPTIONS)
        )
        if fused is None:
            if not (strong and base and adapter):
                raise FusionError(
                    "mtft_fused needs strong, base and adapter", do="--model_args strong=...,base=...,adapter=..."
                )
            spec = FusionSpec(**spec_options)
            fused = FusedCausalLM.load(strong, base, adapter.split(SEPARATOR), spec, **load_options)
        size = AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        tokenizer = tokenizer or fused.tokenizer
        options |= {"pretrained": fused, "tokenizer": tokenizer, "backend": "causal"}
        super().__init__(batch_size=size, max_length=max_length, **options)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy?) of each continuation; contexts that are too long are cut on the left."""
        size = override_bs or self.batch_size
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), i))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for i, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                answers[i], key = answer, requests[i][0]
                if key is not None:  # None: part of a rolling score, which is cached as a whole
                    self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        longest = max(map(len, rows))
        ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BL, wanted_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL)
        for i, (row, (_, _, continuation)) in enumerate(zip(rows, requests, strict=True)):
            ids_BL[i, : len(row)] = torch.tensor(row)
            mask_BL[i, : len(row)] = 1
            wanted_BL[i, len(row) - len(continuation) : len(row)] = 1
        score = self.model.score(*(x.to(self.device) for x in (ids_BL, mask_BL, wanted_BL)))
        wanted_BL = wanted_BL.bool().to(self.device)
        greedy_B = (score.greedy_BL | ~wanted_BL).all(-1)
        return list(zip(score.logprob_BL.sum(-1).tolist(), greedy_B.tolist(), strict=True))


register_model("mtft_fused")(FusedLM)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
