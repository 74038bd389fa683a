"""The parts of a merge that look at data: weights searched, gates trained, routers fitted, inputs measured.

mtft.merge loads no model: here it gets closures over one that is loaded (adapted.py). Only rows of the part `choose`
are seen, those of `check` by the verdict of a search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mtft.data.batch import PADDING
from mtft.errors import UserError
from mtft.merge.factors import Adapter
from mtft.merge.run import merge_from_recipe, merge_section
from mtft.merge.search import SearchResult, search
from mtft.pipeline import derive
from mtft.pipeline.adapted import Adapted, prompt_mask
from mtft.pipeline.scoring import Scores
from mtft.recipe.schema import GateTraining, Recipe, WeightSearch


def task_of(adapter: Adapter, adapted: Adapted) -> str | None:
    """The task that an adapter is for, by its name: TASK, or single-TASK as `mtft run` calls the folders."""
    return next((name for name in (adapter.name, adapter.name.removeprefix("single-")) if name in adapted.tasks), None)


def tasks_of(adapters: Sequence[Adapter], adapted: Adapted, what: str) -> dict[str, str]:
    """{adapter's name: its task}; UserError if one of them has none."""
    found = {adapter.name: task_of(adapter, adapted) for adapter in adapters}
    if lost := [name for name, task in found.items() if task is None]:
        known = ", ".join(adapted.tasks)
        do = f"name the adapter's folder after its task, as `mtft run` does; tasks with held-out rows: {known}"
        raise UserError(
            f"{what} needs each adapter's own rows, and {lost[0]!r} is no task", where="merge.adapters", do=do
        )
    return {name: task for name, task in found.items() if task is not None}


def search_weights(
    recipe: Recipe, how: WeightSearch, adapters: Sequence[Adapter], adapted: Adapted, folder: Path
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
            section = derive.changed(merge_section(recipe), weights=tuple(weights), min_energy=0.0, overwrite=False)
            with TemporaryDirectory() as scratch:
                out = Path(scratch) / "adapter"
                merge_from_recipe(derive.changed(recipe, merge=section), adapters, out, diagnostics=False)
                return adapted.scores(out, part)

        return evaluate

    return search(
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
    )


def _losses(scores: Scores) -> dict[str, float]:
    return {task: found.summary()["loss"] for task, found in scores.items()}


def _key(recipe: Recipe, how: WeightSearch, adapters: Sequence[Adapter]) -> str:
    """Of everything that a trial's losses depend on beside the weights: another preference finds the same trials."""
    section = merge_section(recipe).model_dump(
        mode="json", exclude={"search", "weights", "out", "overwrite", "adapters"}
    )
    tasks = [task.model_dump(mode="json", include={"name", "eval_data"}) for task in recipe.tasks]
    facts = [section, tasks, how.rows, recipe.model.path, recipe.seed, [adapter.sha256 for adapter in adapters]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def train_gates(recipe: Recipe, how: GateTraining, adapters: Sequence[Adapter], adapted: Adapted):
    """Trained gates (mtft.merge.gate_training.GateResult). The tasks take turns, batch by batch."""
    from mtft.merge.gate_training import GateBatch
    from mtft.merge.gate_training import train_gates as train

    if unknown := [task for task in how.negate if task not in adapted.tasks]:
        raise UserError(f"there is no task {unknown[0]!r}", where="merge.gates.negate", do=", ".join(adapted.tasks))
    names = {task_of(adapter, adapted): adapter.name for adapter in adapters}
    made = []
    for task in adapted.tasks:
        role = "negate" if task in how.negate else "control" if how.negate else "target"
        label = names.get(task, task)
        made.append([GateBatch(adapted.inputs(b), b.labels_BT, label, role) for b in adapted.batches(task, "choose")])
    in_turns = [batch for turn in zip_longest(*made) for batch in turn if batch is not None]
    return train(
        adapted.model,
        adapters,
        in_turns,
        how.kind,
        steps=how.steps,
        learning_rate=how.learning_rate,
        seed=recipe.seed,
    )


def fit_router(kind: str, adapters: Sequence[Adapter], adapted: Adapted, seed: int):
    """A router on the base's last states of each adapter's own prompts."""
    from mtft.merge.mlp_router import MlpRouter
    from mtft.merge.router import Router
    from mtft.merge.routing import last_states

    states = {}
    with adapted.adapter(None) as model:
        for name, task in tasks_of(adapters, adapted, "the router").items():
            rows = [last_states(model, b.input_ids_BT, prompt_mask(b)) for b in adapted.batches(task, "choose")]
            states[name] = np.concatenate([x.double().cpu().numpy() for x in rows])
    return MlpRouter.fit(states, seed=seed) if kind == "mlp" else Router.fit(states)


def measure_grams(adapters: Sequence[Adapter], adapted: Adapted, folder: Path) -> None:
    """RegMean's Gram matrices of each adapter on its own task's rows, with the adapter on."""
    from mtft.merge.grams import collect_grams, save_grams

    tasks = tasks_of(adapters, adapted, "regmean")
    for adapter in adapters:
        with adapted.adapter(adapter.path) as network:
            inner = network.base_model.model
            modules = {name: inner.get_submodule(name) for name in adapter.modules}
            passes = (
                (lambda inner=inner, batch=batch: inner(**adapted.inputs(batch)), batch.segment_ids_BT != PADDING)
                for batch in adapted.batches(tasks[adapter.name], "choose")
            )
            save_grams(collect_grams(modules, passes), folder, adapter.name)


def held_out(adapted: Adapted, used: Mapping[str, str]) -> dict[str, object]:
    """For the record: how many rows of each task were looked at, and on how many the result is reported."""
    seen = {part: {task: len(ids) for task, ids in adapted.ids(part).items()} for part in ("choose", "check", "rest")}
    return {"used": dict(used), "rows": seen}
