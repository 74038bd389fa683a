"""What a recipe will do to its data, before any weight is loaded: the content of `mtft check`.

Stores are built (they are needed for training anyway) and the plan is made, so shares, epochs, examples and steps are
those of the run. Padding and micro-batches are those of some of its steps (lay_out.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.realized import realized_spans
from data_mixers.plan.replanned import ReplannedPlan
from mtft.data.batching.batches import BatchSource
from mtft.data.formats.task_reader import template_of
from mtft.data.planning import epoch_caps, make_plan, share_bounds
from mtft.data.store.token_store import TokenStore, open_stores
from mtft.data.summary.data_summary import DataSummary, TaskSummary
from mtft.data.summary.lay_out import lay_out
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import runs
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection

FROM_STORE = ("rows", "tokens", "longest", "truncated", "dropped", "skipped", "notes")  # as its stats have them
LOOKED_AT = 100_000  # examples of a task that are searched for held-out ones


def summarize_data(
    recipe: Recipe,
    tokenizer: Any,
    *,
    stores: Sequence[TokenStore] | None = None,
    held_out: Sequence[TokenStore | None] | None = None,
    plan: MixturePlan | ReplannedPlan | None = None,
    cache_dir: Path | None = None,
) -> DataSummary:
    """Describe the data of a recipe. Stores and plan are made where they are not given.

    Raises UserError or MixError for everything that training would refuse: bad rows, tasks with nothing to learn,
    shares beyond the epoch caps, examples that fit no micro-batch.
    """
    if stores is None:
        stores = open_stores(recipe, tokenizer, "train", cache_dir=cache_dir)
    if held_out is None:
        held_out = open_stores(recipe, tokenizer, "eval", cache_dir=cache_dir)
    plan = plan or make_plan(recipe, stores)
    source = BatchSource(
        stores,  # pyright: ignore[reportArgumentType]  (its lengths are a cached property)
        plan,
        micro_batch_tokens=recipe.train.rows_at_once,
        max_length=recipe.train.max_length,
        packing=recipe.train.packing,
        pad_id=0,
        unmixed=recipe.train.batch_style != "mixed",  # alternating steps hold one task anyway
    )
    table = plan.table()
    # tokens of the whole run, [K]: rows planned x the task's mean (exact over whole epochs)
    rows_K = np.array([entry["rows"] for entry in table], dtype=np.float64)
    played_K = rows_K * np.array([store.lengths.mean() for store in stores])
    learnt_K = rows_K * np.array([store.supervised.mean() for store in stores])
    tasks = tuple(
        TaskSummary(
            name=task.name,
            **{name: store.stats[name] for name in FROM_STORE},
            examples=store.num_examples,
            eval_examples=None if held is None else held.num_examples,
            prompt_tokens=store.stats["tokens"] - store.stats["supervised"],
            supervised_tokens=store.stats["supervised"],
            weighted_tokens=store.stats["weighted"],
            mean_length=store.stats["tokens"] / store.num_examples,
            asked_share=entry["asked"],
            realised_share=entry["realised"],
            token_share=float(played / played_K.sum()),
            supervised_share=float(learnt / learnt_K.sum()),
            epochs=entry["epochs"],
            examples_per_step=entry["rows"] / plan.steps,
            tokens_per_step=float(played / plan.steps),
            weight=task.weight,
            effective_weight=entry["realised"] * task.weight,
            sample=runs(tokenizer, store.example(0)),
            auxiliary=task.auxiliary,
            templates=_of_templates(recipe, task, store, tokenizer),
        )
        for task, store, held, entry, played, learnt in zip(recipe.tasks, stores, held_out, table, played_K, learnt_K)
    )
    laid_out = lay_out(source, plan, [entry["rows"] for entry in table], recipe.seed)
    summary = DataSummary(
        name=recipe.name,
        tasks=tasks,
        unit=plan.unit,
        steps=plan.steps,
        batch=plan.batch,
        examples=sum(entry["rows"] for entry in table),
        tokens=round(float(played_K.sum())),
        tokens_per_step=float(played_K.sum() / plan.steps),
        micro_batches_per_step=laid_out.micro_batches_per_step,
        packing=recipe.train.packing,
        batch_style=recipe.train.batch_style,
        padding_share=laid_out.padding_share,
        sampled=laid_out.sampled,
        spans=tuple(realized_spans(plan)),
        warnings=(),
    )
    written = "shares that are written out are played as they are (mixture.floors, caps, groups)"
    outside = [f"{line}: {written}" for line in share_bounds(recipe).violations(plan.mixture)]
    looked = [*_warnings(stores, summary, epoch_caps(recipe)), *_ends(tokenizer)]
    warnings = [*looked, *outside, *_leaks(stores, held_out)]
    return replace(summary, warnings=tuple(warnings))


def _of_templates(
    recipe: Recipe, task: TaskSection, store: TokenStore, tokenizer: Any
) -> tuple[list[tuple[str, bool]], ...]:
    """The first example of each of several templates. Looks at LOOKED_AT examples."""
    number = len(task.templates)
    found: dict[int, list[tuple[str, bool]]] = {}
    for i in range(min(len(store), LOOKED_AT) if number > 1 else 0):
        which = template_of(store.place(i), number, recipe.seed)
        if which not in found:
            found[which] = runs(tokenizer, store.example(i))
        if len(found) == number:
            break
    return tuple(found.get(which, []) for which in range(number)) if number > 1 else ()


def _warnings(stores: Sequence[TokenStore], summary: DataSummary, caps: dict[str, float]) -> list[str]:
    """What is legal, and often a mistake."""
    capped = any(task.epochs > 0.99 * caps[task.name] for task in summary.tasks if task.name in caps)
    warnings = [line for store in stores for line in store.warnings()]
    for task in summary.tasks:
        if task.asked_share == 0:
            warnings.append(f"{task.name}: its share is 0, so it is never trained")
        elif abs(task.asked_share - task.realised_share) > 0.01:
            why = "epoch caps" if capped else "a run of so few examples has whole ones only"
            why = "a task gets whole steps only" if summary.batch_style == "alternating" else why
            warnings.append(
                f"{task.name}: share {task.asked_share:.3f} asked, {task.realised_share:.3f} played ({why})"
            )
        if 0 < task.examples_per_step < 1 and summary.batch_style != "alternating":
            warnings.append(
                f"{task.name}: absent from {1 - task.examples_per_step:.0%} of the steps; raise train.batch_tokens"
            )
        if task.epochs > 4:
            warnings.append(f"{task.name}: every row is seen {task.epochs:.1f} times; mixture.max_epochs sets a limit")
        if task.supervised_tokens < 0.02 * task.tokens:
            warnings.append(f"{task.name}: only {task.supervised_tokens / task.tokens:.1%} of its tokens are learnt")
    if summary.padding_share > 0.2:
        way = (
            "lower train.max_length or raise train.micro_batch_tokens" if summary.packing else "set train.packing: true"
        )
        warnings.append(f"{summary.padding_share:.0%} of all positions are padding: {way}")
    return warnings


def _ends(tokenizer: Any) -> list[str]:
    """Where the model learns to stop, if that is not where its tokenizer says."""
    renderer = ChatRenderer(tokenizer)
    if strange := renderer.template.strange_tokens():
        return [
            f"the chat template writes {', '.join(map(repr, strange[:4]))}, which are no tokens of this tokenizer: "
            "it is the template of another model"
        ]
    ends = renderer.end_tokens
    if not ends or tokenizer.eos_token in ends:
        return []
    learnt = " and ".join(map(repr, ends))
    return [
        f"answers are learnt to end with {learnt}, and the tokenizer's end token is {tokenizer.eos_token!r}: the "
        "export's generation_config.json has them all, so that generation stops"
    ]


def _leaks(stores: Sequence[TokenStore], held_out: Sequence[TokenStore | None]) -> list[str]:
    """Held-out examples that some task trains on: their scores would say nothing. Looks at LOOKED_AT rows a task."""
    warnings = []
    for held in held_out:
        if held is None:
            continue
        tested = {held.example(i).input_ids.tobytes() for i in range(min(len(held), LOOKED_AT))}
        sizes = {len(ids) // 4 for ids in tested}
        for store in stores:
            same_size = np.flatnonzero(np.isin(store.lengths[:LOOKED_AT], list(sizes)))
            shared = tested & {store.example(int(i)).input_ids.tobytes() for i in same_size}
            if shared:
                share = f"{len(shared):,} of {len(tested):,} held-out examples"
                warnings.append(f"{held.task}: {share} are among the training rows of {store.task}")
    return warnings
