"""The parts of a merge that look at data: weights searched, gates trained, routers fitted, inputs measured.

mtft.merge loads no model: here it gets closures over one that is loaded (adapter_evaluator.py). Only rows of the part
`choose` are seen, those of `check` by the verdict of a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mtft.adapters.lora_factors import LoraAdapter
from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.data.batching.batch import PADDING
from mtft.evaluation.score_cache import Scores
from mtft.merge.from_recipe import merge_from_recipe, merge_section
from mtft.merge.search.weight_search import SearchResult, run_weight_search
from mtft.pipeline.stages import derived_recipes
from mtft.pipeline.stages.adapter_evaluator import AdapterEvaluator, prompt_mask
from mtft.recipe.schema.merge import GateTraining, WeightSearch
from mtft.recipe.schema.recipe import Recipe


def task_of(adapter: LoraAdapter, adapted: AdapterEvaluator) -> str | None:
    """The task that an adapter is for, by its name: TASK, or single-TASK as `mtft run` calls the folders."""
    return next((name for name in (adapter.name, adapter.name.removeprefix("single-")) if name in adapted.tasks), None)


def tasks_of(adapters: Sequence[LoraAdapter], adapted: AdapterEvaluator, what: str) -> dict[str, str]:
    """{adapter's name: its task}; UserError if one of them has none."""
    task_of_adapter = {adapter.name: task_of(adapter, adapted) for adapter in adapters}
    if lost := [name for name, task in task_of_adapter.items() if task is None]:
        known = ", ".join(adapted.tasks)
        do = f"name the adapter's folder after its task, as `mtft run` does; tasks with held-out rows: {known}"
        raise UserError(
            f"{what} needs each adapter's own rows, and {lost[0]!r} is no task", where="merge.adapters", do=do
        )
    return {name: task for name, task in task_of_adapter.items() if task is not None}


def search_weights(
    recipe: Recipe, how: WeightSearch, adapters: Sequence[LoraAdapter], adapted: AdapterEvaluator, folder: Path
) -> SearchResult:
    """Weights for `recipe.merge`, tried on the rows. Trials are kept in `folder`, by what they depend on."""
    if unknown := [task for task in how.prefer if task not in adapted.tasks]:
        known = ", ".join(adapted.tasks)
        raise UserError(f"there is no task {unknown[0]!r}", where="merge.search.prefer", do=f"tasks: {known}")
    base = adapted.scores(None, "choose")
    single: Scores = {}
    for adapter in adapters:
        if (task := task_of(adapter, adapted)) is not None:
            single |= adapted.scores(adapter.path, "choose", [task])

    def trial(part: str):
        def evaluate(weights: Sequence[float]) -> Scores:
            if not any(weights):
                return adapted.scores(None, part)
            section = derived_recipes.override_section(
                merge_section(recipe), weights=tuple(weights), min_energy=0.0, overwrite=False
            )
            with TemporaryDirectory() as scratch:
                out = Path(scratch) / "adapter"
                merge_from_recipe(
                    derived_recipes.override_section(recipe, merge=section), adapters, out, diagnostics=False
                )
                return adapted.scores(out, part)

        return evaluate

    return run_weight_search(
        [adapter.name for adapter in adapters],
        trial("choose"),
        how.by,
        base=_losses(base) if len(single) == len(base) else None,
        single=_losses(single) if len(single) == len(base) else None,
        check=trial("check"),
        worst=how.worst,
        prefer=how.prefer or None,
        budget=how.budget,
        ledger=folder / f"{_key(recipe, how, adapters)}.jsonl",
        seed=recipe.seed,
        auxiliary=recipe.auxiliary_tasks,
    )


def _losses(scores: Scores) -> dict[str, float]:
    return {task: task_scores.summary()["loss"] for task, task_scores in scores.items()}


def _key(recipe: Recipe, how: WeightSearch, adapters: Sequence[LoraAdapter]) -> str:
    """Of everything that a trial's losses depend on beside the weights: another preference finds the same trials."""
    section = merge_section(recipe).model_dump(
        mode="json", exclude={"search", "weights", "out", "overwrite", "adapters"}
    )
    tasks = [task.model_dump(mode="json", include={"name", "eval_data"}) for task in recipe.tasks]
    facts = [section, tasks, how.rows, recipe.model.path, recipe.seed, [adapter.sha256 for adapter in adapters]]
    return json_hash(facts)[:16]


def train_gates(recipe: Recipe, how: GateTraining, adapters: Sequence[LoraAdapter], adapted: AdapterEvaluator):
    """Trained gates (mtft.merge.learned.train_gates.GateResult).

    Each task's batches are spread evenly over a pass through all of them: none is seen only at its start.
    """
    from mtft.merge.learned.train_gates import GateBatch
    from mtft.merge.learned.train_gates import train_gates as train

    if unknown := [task for task in how.negate if task not in adapted.tasks]:
        raise UserError(f"there is no task {unknown[0]!r}", where="merge.gates.negate", do=", ".join(adapted.tasks))
    names = {task_of(adapter, adapted): adapter.name for adapter in adapters}
    made = []
    for task in adapted.tasks:
        role = "negate" if task in how.negate else "control" if how.negate else "target"
        label = names.get(task, task)
        made.append([GateBatch(adapted.inputs(b), b.labels_BT, label, role) for b in adapted.batches(task, "choose")])
    placed = [((i + 0.5) / len(batches), batch) for batches in made for i, batch in enumerate(batches)]
    in_turns = [batch for _, batch in sorted(placed, key=lambda pair: pair[0])]
    return train(
        adapted.model,
        adapters,
        in_turns,
        how.kind,
        steps=how.steps,
        learning_rate=how.learning_rate,
        seed=recipe.seed,
    )


def fit_router(kind: str, adapters: Sequence[LoraAdapter], adapted: AdapterEvaluator, seed: int):
    """A router on the base's last states of each adapter's own prompts."""
    from mtft.adapters.mlp_router import MlpRouter
    from mtft.adapters.routers import CentroidRouter
    from mtft.models.hidden_states import last_token_states

    states = {}
    with adapted.adapter(None) as model:
        for name, task in tasks_of(adapters, adapted, "the router").items():
            rows = [last_token_states(model, b.input_ids_BT, prompt_mask(b)) for b in adapted.batches(task, "choose")]
            states[name] = np.concatenate([x.double().cpu().numpy() for x in rows])
    return MlpRouter.fit(states, seed=seed) if kind == "mlp" else CentroidRouter.fit(states)


def measure_grams(adapters: Sequence[LoraAdapter], adapted: AdapterEvaluator, folder: Path) -> None:
    """RegMean's Gram matrices of each adapter on its own task's rows, with the adapter on."""
    from mtft.merge.engine.input_grams import save_grams

    tasks = tasks_of(adapters, adapted, "regmean")
    for adapter in adapters:
        with adapted.adapter(adapter.path) as network:
            inner = network.base_model.model
            modules = {name: inner.get_submodule(name) for name in adapter.modules}
            adapts_head = inner.get_output_embeddings() in modules.values()
            part = inner if adapts_head else inner.base_model  # logits are made only for the sake of their input

            def passes(task=tasks[adapter.name], part=part):
                for batch in adapted.batches(task, "choose"):
                    yield lambda batch=batch: part(**adapted.inputs(batch)), batch.segment_ids_BT != PADDING

            save_grams(modules, passes, folder, adapter.name)
