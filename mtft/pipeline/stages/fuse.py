"""The fuse stage: the small model's experts steer the strong model on the held-out rows.

<output.dir>/fuse/scores/         the fused model's held-out scores
<output.dir>/fuse/strong/         those of the strong model alone
<output.dir>/fuse/fusion.json     gap closed per task, alpha statistics, texts with each token's alpha
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtft.common.fingerprint import file_hash
from mtft.common.own_files import write_own
from mtft.evaluation.gap_closed import gap_closed
from mtft.evaluation.score_cache import Scores, load_or_score, measured_state
from mtft.pipeline.stages.stage_cache import adapter_state, model_state, run_cached_stage
from mtft.recipe.schema.fuse import FuseSection
from mtft.recipe.schema.recipe import Recipe

if TYPE_CHECKING:
    from mtft.fuse.fused_model import FusedCausalLM

SAMPLES = 3  # held-out prompts that are decoded for the report
SAMPLE_TOKENS = 48


def fuse_stage(
    recipe: Recipe, fuse: FuseSection, experts: Mapping[str, Path], tuned: Scores | None, *, data: str, fresh: bool
) -> tuple[Scores, Scores]:
    """Scores of the strong model alone and of the fused model.

    tuned: of the strong model's own tuning, if it was run. data: which held-out rows these are.
    """
    from mtft.evaluation.evaluate_recipe import evaluate

    folder = Path(recipe.output.dir) / "fuse"
    held_out = tuple(task.name for task in recipe.tasks if task.eval_data is not None)
    strong_recipe = recipe.model_copy(update={"model": fuse.strong})  # its tokenizer makes the rows
    inputs = {
        "fuse": fuse.model_dump(mode="json", exclude={"adapters"}),
        "experts": {name: adapter_state(path) for name, path in experts.items()},
        "models": {"strong": model_state(fuse.strong), "base": model_state(fuse.base or recipe.model)},
        "held_out": held_out,
        "rows": data,
        **measured_state(recipe),
    }
    named = {"strong": fuse.strong.chat_template, "base": (fuse.base or recipe.model).chat_template}
    if any(named.values()):  # what is in the files counts; without any, runs of earlier versions stand
        inputs["templates"] = {key: None if path is None else file_hash(Path(path)) for key, path in named.items()}

    def strong_alone() -> Scores:
        return load_or_score(folder / "strong", held_out, lambda: evaluate(strong_recipe))

    def work() -> None:
        from mtft.evaluation.heldout_loss import BatchLayout, score_tasks
        from mtft.fuse.decoding.score_text import AlphaStats, fused_scores
        from mtft.fuse.from_recipe import load_fusion

        alone = strong_alone()
        fused = load_fusion(recipe, list(experts.values()))
        stores, stats = _held_out(strong_recipe, fused), AlphaStats()
        layout = BatchLayout(recipe.train.rows_at_once, recipe.train.max_length, 0, packing=False)
        score = partial(fused_scores, fused, stats=stats)
        task_scores = score_tasks(score, stores, layout, device=fused.device)
        for task, scores in task_scores.items():
            scores.save(folder / "scores" / f"{task}.jsonl")
        content = {
            "rule": fuse.alpha_rule,
            "gap": _gaps(alone, task_scores, tuned or {}, recipe.seed),
            "alpha": stats.summary(),
            "samples": [_sample(fused, store) for store in stores[:SAMPLES] if store is not None],
        }
        write_own(folder / "fusion.json", content)

    run_cached_stage(folder, inputs, work, fresh=fresh)
    return strong_alone(), load_or_score(folder / "scores", held_out, dict)


def _gaps(alone: Scores, fused: Scores, tuned: Scores, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: strong, fused, tuned, gap with its interval, ratio}}."""
    return {
        task: {
            metric: asdict(gap_closed(alone[task], fused[task], tuned.get(task), metric=metric, seed=seed))
            for metric in fused[task].metrics
            if metric in alone[task].metrics
        }
        for task in fused
    }


def _held_out(recipe: Recipe, fused: FusedCausalLM) -> list[Any]:
    from mtft.data.store.token_store import open_stores

    return open_stores(recipe, fused.tokenizer, "eval")


class _Alphas:
    """Keeps the token and the alpha of each decoded position of one prompt."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, float]] = []

    def step(self, rows: list[int], fused: Any, tokens_N: Any, *_: Any) -> None:
        self.tokens.append((int(tokens_N[0]), float(fused.alpha_NT[0].sum())))


def _sample(fused: FusedCausalLM, store: Any) -> dict[str, Any]:
    """The first held-out prompt of a task, decoded greedily by the fused and by the strong model."""
    import torch

    ids, supervised = store.example(0)
    first = int(supervised.argmax())
    prompt = torch.tensor(ids[:first].astype("int64"), device=fused.device)[None]
    seen, options = _Alphas(), {"max_new_tokens": SAMPLE_TOKENS, "do_sample": False}
    fused.generate(input_ids=prompt, trace=seen, **options)
    strong: Any = fused.strong
    alone = strong.generate(input_ids=prompt, **options)[0, prompt.shape[1] :]
    tokenizer: Any = fused.tokenizer
    decode = tokenizer.decode
    return {
        "task": store.task,
        "prompt": decode(prompt[0]),
        "reference": decode(ids[first:].astype("int64"), skip_special_tokens=True),
        "strong": decode(alone, skip_special_tokens=True),
        "tokens": [{"text": decode([token]), "alpha": round(alpha, 4)} for token, alpha in seen.tokens],
    }
