"""`mtft fuse generate` and `mtft fuse score`: JSONL to JSONL, resumable (resumable_jsonl.py).

generate   {"prompt" | "messages", id?, max_tokens?, alpha?, alpha_rule?, expert_weights?, seed?, trace?}
        -> {index, id, text, finish_reason, tokens, alpha_mean, clipped_share, trace?}    or    {index, id, error}
score      {"prompt" | "messages", "response", id?, alpha?, alpha_rule?, expert_weights?}
        -> {index, id, logprob, tokens, greedy, alpha_mean, kl_mean}                      or    {index, id, error}

logprob is null where the fused model rules a token of the response out (`plausibility`).
`prompt` is continued as it stands; `messages` go through the chat template. A row's default seed is (run seed, index).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from data_mixers.common.suggest import did_you_mean
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.batch.resumable_jsonl import BatchSummary, Row, check_paths, read_requests, run_buckets
from mtft.fuse.decoding.generate_request import request_spec
from mtft.fuse.decoding.gumbel_sampling import key
from mtft.fuse.decoding.prompts import encode_prompt, left_pad
from mtft.fuse.decoding.score_text import score as score_text
from mtft.fuse.decoding.token_trace import Observers, RowStats, TokenTrace
from mtft.fuse.from_recipe import fingerprint, fuse_section, load_fusion
from mtft.fuse.fused_model import FusedCausalLM
from mtft.recipe.schema.recipe import Recipe

STEER = ("alpha", "alpha_rule", "expert_weights")
GENERATE = ("prompt", "messages", "id", "max_tokens", "seed", "trace", *STEER)
SCORE = ("prompt", "messages", "response", "id", *STEER)


def generate(
    recipe: Recipe,
    source: str | Path,
    target: str | Path,
    *,
    fused: FusedCausalLM | None = None,
    overwrite: bool = False,
) -> BatchSummary:
    """Answer every row of `source` into `target`. Bad rows become {"error"} lines and are counted in `failed`."""
    section = fuse_section(recipe)
    sampling: dict[str, Any] = {"do_sample": False}
    if section.temperature > 0:
        sampling = {"do_sample": True, "temperature": section.temperature, "top_p": section.top_p, "top_k": 0}
    if section.speculative != "off":
        sampling["speculative"] = section.speculative

    def prepare(model: FusedCausalLM, index: int, row: Row) -> int:
        _check_keys(row, GENERATE)
        row["_ids"] = encode_prompt(model.tokenizer, row.get("prompt"), row.get("messages"))
        row["_max"] = _whole_number("max_tokens", row.get("max_tokens", section.max_new_tokens), 1)
        row["_spec"] = _row_spec(model, row)
        row["_seed"] = _whole_number("seed", row["seed"], 0) if "seed" in row else key(recipe.seed, index, 0)
        length = len(row["_ids"]) + row["_max"]
        if length > model.context:
            raise FusionError(
                f"the prompt has {len(row['_ids'])} tokens: with max_tokens {row['_max']} it goes past the smaller "
                f"context of {model.context}"
            )
        return length

    def work(model: FusedCausalLM, rows: list[Row]) -> list[Row]:
        return generate_bucket(model, rows, sampling)

    return _run("generate", recipe, Path(source), Path(target), fused, overwrite, prepare, work)


def score(
    recipe: Recipe,
    source: str | Path,
    target: str | Path,
    *,
    fused: FusedCausalLM | None = None,
    overwrite: bool = False,
) -> BatchSummary:
    """Log-probability of every row's response given its prompt, under the fused model."""

    def prepare(model: FusedCausalLM, index: int, row: Row) -> int:
        _check_keys(row, SCORE)
        row["_ids"] = encode_prompt(model.tokenizer, row.get("prompt"), row.get("messages"))
        if not isinstance(row.get("response"), str) or not row["response"]:
            raise FusionError("response is missing or empty", do='give {"prompt": "...", "response": "..."}')
        row["_response"] = model.tokenizer.encode(row["response"], add_special_tokens=False)
        row["_spec"] = _row_spec(model, row)
        length = len(row["_ids"]) + len(row["_response"])
        if length > model.context:
            raise FusionError(f"prompt and response have {length} tokens, the smaller context holds {model.context}")
        return length

    return _run("score", recipe, Path(source), Path(target), fused, overwrite, prepare, score_bucket)


def _run(
    kind: str,
    recipe: Recipe,
    source: Path,
    target: Path,
    fused: FusedCausalLM | None,
    overwrite: bool,
    prepare: Callable[[FusedCausalLM, int, Row], int],
    work: Callable[[FusedCausalLM, list[Row]], list[Row]],
) -> BatchSummary:
    """All rows, in buckets. prepare: checks a row and adds what work needs; returns its cost."""
    section = fuse_section(recipe)
    check_paths(source, target, overwrite)
    identity = f"{kind} {fingerprint(recipe)}"
    model = load_fusion(recipe) if fused is None else fused
    jobs = read_requests(source, partial(prepare, model))
    return run_buckets(jobs, target, identity, partial(work, model), bucket=section.batch_size)


def generate_bucket(model: FusedCausalLM, rows: Sequence[Row], sampling: dict[str, Any]) -> list[Row]:
    """Answers of prepared rows (_ids, _max, _spec, _seed), decoded together."""
    ids_BL, mask_BL = left_pad([row["_ids"] for row in rows], 0, model.device)
    limit = RowLimit([row["_max"] for row in rows], ids_BL.shape[1])
    stats = RowStats(len(rows))
    trace = TokenTrace((i for i, row in enumerate(rows) if row.get("trace")), model.tokenizer)
    out_BL = model.generate(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=max(limit.limits),
        stopping_criteria=[limit],
        specs=[row["_spec"] for row in rows],
        seed=[row["_seed"] for row in rows],
        trace=Observers(stats, trace),
        **sampling,
    )
    answers = []
    for i, row in enumerate(rows):
        tokens = out_BL[i, ids_BL.shape[1] :][: stats.tokens[i]].tolist()
        answer = {
            "text": model.tokenizer.decode(tokens, skip_special_tokens=True),
            "finish_reason": "stop" if tokens and tokens[-1] in model.end_ids else "length",
            "tokens": len(tokens),
            **stats.summary(i),
        }
        answers.append(answer | ({"trace": trace.tokens[i]} if row.get("trace") else {}))
    return answers


def score_bucket(model: FusedCausalLM, rows: Sequence[Row]) -> list[Row]:
    """Scores of prepared rows (_ids, _response, _spec)."""
    ids_BL, mask_BL = left_pad([row["_ids"] + row["_response"] for row in rows], 0, model.device)
    responses = [slice(ids_BL.shape[1] - len(row["_response"]), None) for row in rows]
    score_mask_BL = torch.zeros_like(mask_BL)
    for i, response in enumerate(responses):
        score_mask_BL[i, response] = 1
    scores = score_text(model, ids_BL, mask_BL, score_mask_BL, specs=[row["_spec"] for row in rows])
    return [
        {
            "logprob": float(scores.logprob_BL[i, response].sum()),
            "tokens": len(rows[i]["_response"]),
            "greedy": bool(scores.greedy_BL[i, response].all()),
            "alpha_mean": float(scores.alpha_BL[i, response].mean()),
            "kl_mean": float(scores.kl_BL[i, response].mean()),
        }
        for i, response in enumerate(responses)
    ]


class RowLimit(StoppingCriteria):
    """A length limit of its own for every row."""

    def __init__(self, limits: Sequence[int], prompt: int) -> None:
        self.limits, self.prompt = list(limits), prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self.limits, device=input_ids.device) <= input_ids.shape[1] - self.prompt


def _row_spec(model: FusedCausalLM, row: Row) -> FusionSpec:
    """The model's spec with what the row asks for. FusionError if it makes no sense."""
    weights = row.get("expert_weights")
    if not (weights is None or (isinstance(weights, list) and all(isinstance(w, int | float) for w in weights))):
        raise FusionError(f"expert_weights is {weights!r}", do="give a list of numbers, one per expert")
    return request_spec(model, row.get("alpha"), row.get("alpha_rule"), weights)


def _check_keys(row: Row, known: tuple[str, ...]) -> None:
    for name in row:
        if name not in known:
            raise FusionError(f"unknown key {name!r}{did_you_mean(name, known)}")


def _whole_number(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FusionError(f"{name} is {value!r}: must be a whole number >= {least}")
    return value
