"""`mtft fuse generate` and `mtft fuse score`: rows in, JSONL out, resumable (resumable_jsonl.py).

generate   {"prompt" | "messages", id?, max_tokens?, alpha?, alpha_rule?, expert_weights?, seed?, trace?}
        -> {index, id, text, finish_reason, tokens, alpha_mean, clipped_share, trace?}
score      {"prompt" | "messages", "response", id?, alpha?, alpha_rule?, expert_weights?}, or a row of training:
           {"messages"} that end in an answer, {"conversations"}, {"instruction", "output"}
        -> {index, id, logprob, strong_logprob, base_logprob, expert_logprobs, tokens, small_tokens, greedy, alpha_mean,
            kl_mean, clipped_share}
and {index, id, line, error} for a row that can't be used.

A logprob is null where the model rules a token of the response out, or has no such token (`plausibility`, other
vocabularies). `prompt` is continued as it stands; `messages` go through the chat templates. Of a row of training the
tokens are scored that training learns, the end of the turn among them. A row's default seed is (run seed, index).
All rows are checked before a weight is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from data_mixers.common.suggest import closest_match, did_you_mean
from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import RowError
from mtft.data.readers.row_files import short
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.batch.request_rows import Row, read_requests
from mtft.fuse.batch.resumable_jsonl import BatchSummary, Say, output_of, resume, run_buckets
from mtft.fuse.decoding.generate_request import request_spec
from mtft.fuse.decoding.gumbel_sampling import is_greedy, key
from mtft.fuse.decoding.prompts import Prompt, encode_answer, encode_prompt, left_pad, pad_small_prompts
from mtft.fuse.decoding.score_text import score as score_text
from mtft.fuse.decoding.small_scores import score_small_models
from mtft.fuse.decoding.token_trace import Observers, RowStats, TokenTrace
from mtft.fuse.from_recipe import fingerprint, fuse_section, input_files, load_fusion, plan_recipe
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.fusion_plan import FusionPlan
from mtft.recipe.schema.recipe import Recipe

STEER = ("alpha", "alpha_rule", "expert_weights")
GENERATE = ("prompt", "messages", "id", "max_tokens", "seed", "trace", *STEER)
UNREAD = 10  # columns that are told of
TRAINING = ("messages", "sharegpt", "alpaca")  # formats of training rows that `score` takes
COLUMNS = {name: (*FORMATS[name].needs, *FORMATS[name].may) for name in TRAINING}
SCORE = ("prompt", "response", "id", *STEER, *dict.fromkeys(column for names in COLUMNS.values() for column in names))

Models = FusionPlan | FusedCausalLM  # what a row is checked against: a plan is enough


def generate(
    recipe: Recipe,
    source: str | Path,
    target: str | Path,
    *,
    fused: FusedCausalLM | None = None,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    say: Say | None = None,
) -> BatchSummary:
    """Answer every row of `source` into `target`. Bad rows become {"error"} lines and are counted in `failed`.

    inputs: files that the output may not be, beside those of the recipe. say: is told of the progress.
    """
    section = fuse_section(recipe)
    sampling: dict[str, Any] = {"do_sample": False}
    if not is_greedy(section.temperature):
        sampling = {"do_sample": True, "temperature": section.temperature, "top_p": section.top_p, "top_k": 0}
    if section.speculative != "off":
        sampling["speculative"] = section.speculative

    def prepare(models: Models, index: int, row: Row) -> int:
        _check_keys(row, GENERATE)
        prompt = row["_prompt"] = encode_prompt(models, row.get("prompt"), row.get("messages"))
        row["_max"] = _whole_number("max_tokens", row.get("max_tokens", section.max_new_tokens), 1)
        row["_spec"] = _row_spec(models, row)
        row["_seed"] = _whole_number("seed", row["seed"], 0) if "seed" in row else key(recipe.seed, index, 0)
        longest = max(len(prompt.ids), len(prompt.small_ids or ()))
        if longest + row["_max"] > models.context:
            raise FusionError(
                f"the prompt has {longest} tokens: with max_tokens {row['_max']} it goes past the smaller "
                f"context of {models.context}"
            )
        return len(prompt.ids) + row["_max"]

    def check(models: Models) -> None:
        if section.max_new_tokens >= models.context:
            raise FusionError(
                f"no prompt leaves room for {section.max_new_tokens} tokens: the smaller context holds "
                f"{models.context}",
                where="fuse.max_new_tokens",
                do="ask for fewer",
            )

    def work(model: FusedCausalLM, rows: list[Row]) -> list[Row]:
        return generate_bucket(model, rows, sampling)

    paths = Path(source), Path(target), inputs
    return _run("generate", recipe, paths, fused, overwrite, say, check, prepare, work)


def score(
    recipe: Recipe,
    source: str | Path,
    target: str | Path,
    *,
    fused: FusedCausalLM | None = None,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    say: Say | None = None,
) -> BatchSummary:
    """Log-probability of every row's response given its prompt, under the fused model and each of its models.

    inputs: files that the output may not be, beside those of the recipe. say: is told of the progress.
    """
    unread: dict[str, int] = {}

    def prepare(models: Models, index: int, row: Row) -> int:
        for name in row:
            if name not in SCORE:
                if closest_match(name, SCORE):
                    _check_keys(row, SCORE)
                unread[name] = unread.get(name, 0) + 1
        row["_prompt"], row["_response"] = _prompt_and_response(models, row)
        row["_spec"] = _row_spec(models, row)
        longest = max(len(row["_prompt"].ids), len(row["_prompt"].small_ids or ())) + len(row["_response"])
        if longest > models.context:
            raise FusionError(f"prompt and response have {longest} tokens, the smaller context holds {models.context}")
        return longest

    def check(models: Models) -> None:
        if unread:
            names = ", ".join(f"{name} ({count} rows)" for name, count in islice(unread.items(), UNREAD))
            more = f" and {len(unread) - UNREAD:,} more" if len(unread) > UNREAD else ""
            warnings.warn(f"columns that are not read: {names}{more}; read are {', '.join(SCORE)}", stacklevel=2)

    paths = Path(source), Path(target), inputs
    return _run("score", recipe, paths, fused, overwrite, say, check, prepare, score_bucket)


def _run(
    kind: str,
    recipe: Recipe,
    paths: tuple[Path, Path, Iterable[Path]],
    fused: FusedCausalLM | None,
    overwrite: bool,
    say: Say | None,
    check: Callable[[Models], None],
    prepare: Callable[[Models, int, Row], int],
    work: Callable[[FusedCausalLM, list[Row]], list[Row]],
) -> BatchSummary:
    """All rows, in buckets. paths: rows, output, other inputs. prepare: checks a row and adds what work needs; returns
    its cost. check: of them all.
    """
    section = fuse_section(recipe)
    source, target, inputs = paths
    with output_of(source, target, inputs=[*inputs, *input_files(recipe)], overwrite=overwrite) as answers:
        identity = f"{kind} {fingerprint(recipe)}"
        plan = plan_recipe(recipe) if fused is None else None
        models: Models = fused or plan  # pyright: ignore[reportAssignmentType]  (one of them is there)
        jobs = read_requests(source, partial(prepare, models))
        check(models)
        done = resume(jobs, answers, identity, overwrite=overwrite)
        if fused is None and any(job.error is None and job.index not in done for job in jobs):
            fused = load_fusion(recipe, plan=plan)

        def work_on(rows: list[Row]) -> list[Row]:
            if fused is None:
                raise RuntimeError("a row without a model")
            return work(fused, rows)

        return run_buckets(jobs, answers, done, work_on, bucket=section.batch_size, say=say)


def _prompt_and_response(models: Models, row: Row) -> tuple[Prompt, list[int]]:
    """In strong ids. A row of training is rendered and encoded as training does it."""
    if "response" in row:
        prompt = encode_prompt(models, row.get("prompt"), row.get("messages"))
        if not isinstance(row["response"], str) or not row["response"]:
            raise FusionError("response is empty or no text", do='give {"prompt": "...", "response": "..."}')
        return prompt, models.tokenizer.encode(row["response"], add_special_tokens=False)
    name = next((name for name in TRAINING if set(FORMATS[name].needs) <= row.keys()), None)
    turns = row.get("messages")
    ends = not isinstance(turns, list) or _is_answer(turns)
    if name is None or not ends:
        raise FusionError(
            "response is missing", do='give {"prompt": "...", "response": "..."}, or messages that end in an answer'
        )
    try:
        conversation = FORMATS[name].read({column: row[column] for column in COLUMNS[name] if column in row})
    except RowError as error:
        raise FusionError(f"{error.column}: {error.what}" if error.column else error.what) from error
    return encode_answer(models, conversation)


def _is_answer(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"


def generate_bucket(model: FusedCausalLM, rows: Sequence[Row], sampling: dict[str, Any]) -> list[Row]:
    """Answers of prepared rows (_prompt, _max, _spec, _seed), decoded together."""
    prompts = [row["_prompt"] for row in rows]
    ids_BL, mask_BL = left_pad([prompt.ids for prompt in prompts], 0, model.device)
    small_BL, small_mask_BL = pad_small_prompts(model, prompts, model.device) or (None, None)
    limit = RowLimit([row["_max"] for row in rows], ids_BL.shape[1])
    stats = RowStats(len(rows))
    trace = TokenTrace((i for i, row in enumerate(rows) if row.get("trace")), model.tokenizer)
    out_BL = model.generate(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        expert_input_ids=small_BL,
        expert_attention_mask=small_mask_BL,
        eos_token_id=sorted(model.end_ids) or None,
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
    """Scores of prepared rows (_prompt, _response, _spec)."""
    prompts, answers = [row["_prompt"] for row in rows], [row["_response"] for row in rows]
    texts = [prompt.ids + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids_BL, mask_BL = left_pad(texts, 0, model.device)
    responses = [slice(ids_BL.shape[1] - len(row["_response"]), None) for row in rows]
    score_mask_BL = torch.zeros_like(mask_BL)
    for i, response in enumerate(responses):
        score_mask_BL[i, response] = 1
    small_prompt = pad_small_prompts(model, prompts, model.device)
    specs = [row["_spec"] for row in rows]
    scores = score_text(model, ids_BL, mask_BL, score_mask_BL, specs=specs, small_prompt=small_prompt)
    small = score_small_models(model, prompts, answers)
    return [
        {
            "logprob": float(scores.logprob_BL[i, response].sum()),
            "strong_logprob": float(scores.strong_BL[i, response].sum()),
            "base_logprob": float(small.base_B[i]),
            "expert_logprobs": small.experts_TB[:, i].tolist(),
            "tokens": len(answers[i]),
            "small_tokens": small.tokens[i],
            "greedy": bool(scores.greedy_BL[i, response].all()),
            "alpha_mean": float(scores.alpha_BL[i, response].mean()),
            "kl_mean": float(scores.kl_BL[i, response].mean()),
            "clipped_share": float(scores.clipped_BL[i, response].double().mean()),
        }
        for i, response in enumerate(responses)
    ]


class RowLimit(StoppingCriteria):
    """A length limit of its own for every row."""

    def __init__(self, limits: Sequence[int], prompt: int) -> None:
        self.limits, self.prompt = list(limits), prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self.limits, device=input_ids.device) <= input_ids.shape[1] - self.prompt


def _row_spec(models: Models, row: Row) -> FusionSpec:
    """The model's spec with what the row asks for. FusionError if it makes no sense."""
    weights = row.get("expert_weights")
    if not (weights is None or (isinstance(weights, list) and all(isinstance(w, int | float) for w in weights))):
        raise FusionError(f"expert_weights is {weights!r}", do="give a list of numbers, one per expert")
    return request_spec(models, row.get("alpha"), row.get("alpha_rule"), weights)


def _check_keys(row: Row, known: tuple[str, ...]) -> None:
    for name in row:
        if name not in known:
            raise FusionError(
                f"unknown key {short(name)}{did_you_mean(name, known)}; a row may have {', '.join(known)}"
            )


def _whole_number(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FusionError(f"{name} is {value!r}: must be a whole number >= {least}")
    return value
