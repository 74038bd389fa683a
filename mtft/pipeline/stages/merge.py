"""The merge stage: the single-task adapters into one, and what that one keeps of each task.

<output.dir>/merge/adapter/          the merged PEFT adapter (with merge.experts: shared/, expert_NAME/, the router)
<output.dir>/merge/scores/           its held-out scores
<output.dir>/merge/retention.json    retained share of each task, with intervals; how the adapters get on
<output.dir>/merge/front.json, .png  merge.search: the trade-offs that the trials found
<output.dir>/merge-trials/           merge.search: its trials, by what they depend on

`mtft merge RECIPE` runs merge_recipe alone. A merge that looks at data (search, gates, experts, regmean) does so on a
third of the held-out rows at most, or on training rows; what it keeps is then reported on rows that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mtft.adapters.lora_factors import LoraAdapter, read_adapter, read_adapters
from mtft.common.atomic_folder import check_replaceable
from mtft.common.folder_lock import sole_writer
from mtft.common.own_files import write_own
from mtft.common.run_folders import refuse_run_as_adapter
from mtft.evaluation.score_cache import Scores, load_or_score
from mtft.merge.engine.report import MergeReport
from mtft.merge.from_recipe import chosen_adapters, merge_folder, merge_from_recipe, merge_options, merge_section
from mtft.merge.search.retention import retention
from mtft.pipeline.stages import derived_recipes
from mtft.pipeline.stages.stage_cache import adapter_state, read_json, run_cached_stage
from mtft.recipe.schema.merge import MergeSection
from mtft.recipe.schema.recipe import Recipe

if TYPE_CHECKING:
    from mtft.pipeline.stages.adapter_evaluator import AdapterEvaluator


@dataclass
class MergeOutcome:
    """What a merge has done: the report (None: nothing was merged, as with Arrow), and lines for the terminal."""

    report: MergeReport | None
    out: Path
    said: list[str] = field(default_factory=list)

    def text(self) -> str:
        first = [] if self.report is None else [self.report.text()]
        return "\n".join([*first, *self.said])

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; keys of MergeReport.as_dict, `said` beside them."""
        facts = {"method": "arrow", "rank": None, "energy": None, "diagnostics": None, "out": str(self.out)}
        return {**(facts if self.report is None else self.report.as_dict()), "said": self.said}


def rows_needed(section: MergeSection) -> int:
    """Rows of each task that this merge wants to see, 0 = none."""
    row_counts = [part.rows for part in (section.search, section.gates) if part is not None]
    if section.experts is not None and section.experts.kind == "twin":
        row_counts.append(section.experts.rows)
    if section.method == "regmean" and "grams" not in section.options:
        row_counts.append(64)
    return max(row_counts, default=0)


class RecipeMerge:
    """One merge of a recipe."""

    def __init__(
        self, recipe: Recipe, adapters: list[LoraAdapter], out: Path, adapted: AdapterEvaluator | None
    ) -> None:
        self.recipe, self.adapters, self.out, self._given = recipe, adapters, out, adapted
        self.section = merge_section(recipe)
        self.said: list[str] = []

    @cached_property
    def adapted(self) -> AdapterEvaluator:
        from mtft.pipeline.stages.adapter_evaluator import AdapterEvaluator

        return self._given or AdapterEvaluator(self.recipe, rows_needed(self.section))

    def run(self) -> MergeOutcome:
        section = self.section
        with TemporaryDirectory() as scratch:
            if section.method == "regmean" and "grams" not in section.options:
                from mtft.pipeline.stages.merge_with_data import measure_grams

                grams = Path(scratch) / "grams"
                measure_grams(self.adapters, self.adapted, grams)
                self._change(options={**section.options, "grams": str(grams)})
            if section.search is not None:
                self._search()
            if section.experts is not None:
                return self._experts()
            if section.gates is not None:
                return self._gates()
            report = merge_from_recipe(self.recipe, self.adapters, self.out)
        return MergeOutcome(report, self.out, self.said)

    def _change(self, **values: object) -> None:
        self.recipe = derived_recipes.override_section(
            self.recipe, merge=derived_recipes.override_section(merge_section(self.recipe), **values)
        )

    def _search(self) -> None:
        from mtft.merge.search.pareto import pareto_facts
        from mtft.pipeline.stages.merge_with_data import search_weights

        assert self.section.search is not None
        trials = Path(self.recipe.output.dir) / "merge-trials"
        search = search_weights(self.recipe, self.section.search, self.adapters, self.adapted, trials)
        self._change(weights=search.weights)
        names = [adapter.name for adapter in self.adapters]
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, search.weights, strict=True))
        self.said.append(f"search: {len(search.trials)} merges tried; {search.verdict}; weights {weights}")
        facts = pareto_facts(names, search, self.recipe.auxiliary_tasks)
        if len(facts["tasks"]) > 1:  # pyright: ignore[reportArgumentType]
            from mtft.report.sections.pareto import save_front

            write_own(self.out.parent / "front.json", facts)
            self.said.append(f"trade-offs: {save_front(facts, self.out.parent / 'front.png')}")

    def _gates(self) -> MergeOutcome:
        from mtft.merge.learned.train_gates import fold_gates
        from mtft.pipeline.stages.merge_with_data import train_gates

        assert self.section.gates is not None
        trained = train_gates(self.recipe, self.section.gates, self.adapters, self.adapted)
        first, last = trained.history[0], trained.history[-1]
        self.said.append(
            f"gates {self.section.gates.kind}: objective {first:.4g} to {last:.4g} in {len(trained.history)} steps"
        )
        self.said += [f"warning: {text}" for text in trained.warnings]
        policy = {key: value for key, value in merge_options(self.recipe).items() if key != "per_module"}
        report = fold_gates(
            self.adapters, trained.gates, self.out, weights=self.section.weights, diagnostics=True, **policy
        )
        return MergeOutcome(report, self.out, self.said)

    def _experts(self) -> MergeOutcome:
        from mtft.merge.experts.build_experts import build_twin, export_arrow

        experts, section = self.section.experts, merge_section(self.recipe)
        assert experts is not None
        policy = merge_options(self.recipe)
        if experts.kind == "arrow":
            few = {key: policy[key] for key in ("dtype", "overwrite")}
            export_arrow(self.adapters, self.out, top=experts.top, general=experts.general, **few)
            self.said.append(f"wrote {len(self.adapters)} experts and the router of their prototypes to {self.out}")
            return MergeOutcome(None, self.out, self.said)
        from mtft.pipeline.stages.merge_with_data import fit_router

        report = build_twin(
            self.adapters,
            self.out,
            section.method,
            experts.rank,
            options=dict(section.options),
            weights=section.weights,
            average=section.average,
            with_shared=experts.with_shared,
            router=fit_router(experts.router, self.adapters, self.adapted, self.recipe.seed),
            **policy,
        )
        energies = report.settings["expert_energy"]
        assert isinstance(energies, dict)
        least = min(energies, key=lambda name: energies[name])
        self.said.append(
            f"{len(self.adapters)} experts of rank {experts.rank} beside it; least kept: {least} {energies[least]:.2%}"
        )
        return MergeOutcome(report, self.out, self.said)


def merge_recipe(
    recipe: Recipe,
    adapters: Sequence[str | Path | LoraAdapter] | None = None,
    out: Path | None = None,
    *,
    adapted: AdapterEvaluator | None = None,
) -> MergeOutcome:
    """Merge as `recipe.merge` says, with whatever data that needs. adapters, out: win over the section's.

    adapted: the recipe's base and rows, if they are open already.
    """
    section = merge_section(recipe)
    out = out or merge_folder(recipe)
    chosen = chosen_adapters(section, adapters)
    inputs = [folder.path if isinstance(folder, LoraAdapter) else Path(folder) for folder in chosen]
    if section.base is None:
        for folder in inputs:
            refuse_run_as_adapter(folder)
    # What needs data may last for hours before the folder is written: nobody else begins, nothing there stops it then.
    with sole_writer(out):
        check_replaceable(out, overwrite=section.overwrite, inputs=inputs)
        if section.base is not None:
            return merge_models(recipe, section.base, out)
        return RecipeMerge(recipe, read_adapters(chosen), out, adapted).run()


def merge_models(recipe: Recipe, base: str, out: Path) -> MergeOutcome:
    """Whole fine-tuned models instead of adapters."""
    from mtft.merge.full_models.merge_checkpoints import merge_checkpoints

    section = merge_section(recipe)
    models = [str(path) for path in chosen_adapters(section)]
    if section.experts is not None:
        from mtft.merge.full_models.extract_lora import twin_models

        how = {"options": dict(section.options), "weights": section.weights, "scale": section.scale}
        rank = section.experts.rank
        twins = twin_models(base, models, out, section.method, rank, overwrite=section.overwrite, **how)
        lines = [f"{name}: {held.text()}" for name, held in twins.items()]
        return MergeOutcome(
            None, out, [f"merged {len(models)} models by {section.method} into {out / 'shared'}", *lines]
        )
    merge_checkpoints(
        base,
        models,
        out,
        section.method,
        dict(section.options),
        section.weights,
        section.scale,
        seed=recipe.seed,
        overwrite=section.overwrite,
    )
    return MergeOutcome(None, out, [f"merged {len(models)} models by {section.method} into {out}"])


def merge_stage(
    recipe: Recipe,
    section: MergeSection,
    adapters: Mapping[str, Path],
    base: Scores,
    singles: Scores,
    *,
    fresh: bool,
    state: Mapping[str, str],
    score: Callable[[Path], Scores],
    beside: Mapping[str, Scores],
) -> Scores:
    """Merges `adapters` ({name: folder}) and scores the result. Returns its scores.

    base, singles: held-out scores of the base model and of each task's own adapter; state: digests of the held-out
    rows and the model that they are of; score(adapter folder) -> Scores;
    beside: scores of other adapters for all tasks (the joint one), to stand in the retention table.
    """
    folder = Path(recipe.output.dir) / "merge"
    unused = {name for name in ("base", "search", "gates", "experts") if getattr(section, name) is None}
    unused |= {"rows_from"} if section.rows_from == "eval_data" else set()  # folders of before there was a choice
    inputs = {
        "merge": section.model_dump(mode="json", exclude={"out", "overwrite", "adapters", *unused}),
        "adapters": {name: adapter_state(path) for name, path in adapters.items()},
        **state,
    }
    rows = rows_needed(section)
    opened: list[AdapterEvaluator] = []

    def adapted() -> AdapterEvaluator:
        from mtft.pipeline.stages.adapter_evaluator import AdapterEvaluator

        if not opened:
            opened.append(AdapterEvaluator(recipe, rows or 2))  # arrow looks at no rows, and is scored on all
        return opened[0]

    def scores() -> Scores:
        if section.experts is None:
            return score(folder / "adapter")
        return adapted().routed_scores(folder / "adapter")

    def work() -> None:
        report = read_json(folder / "report.json", {"method": str, "diagnostics": (dict, type(None))})
        if report is None:
            named = [read_adapter(path, name) for name, path in adapters.items()]
            again = derived_recipes.override_section(
                recipe, merge=derived_recipes.override_section(section, overwrite=True)
            )  # a broken-off try
            report = merge_recipe(again, named, folder / "adapter", adapted=adapted() if rows else None).as_dict()
            write_own(folder / "report.json", report)
        merged = load_or_score(folder / "scores", tuple(base), scores)
        if singles:
            write_own(folder / "retention.json", _retention(report, merged))

    def _retention(report: dict, merged: Scores) -> dict:
        from mtft.pipeline.stages.adapter_evaluator import select_examples

        unseen = adapted().ids("rest") if rows else {}
        some = [select_examples(scores, unseen) for scores in (base, singles, merged)]
        others = {name: select_examples(scores, unseen) for name, scores in beside.items()}
        share = retention(*some, others=others, seed=recipe.seed, auxiliary=recipe.auxiliary_tasks)
        facts: dict[str, Any] = {key: report[key] for key in ("method", "rank", "energy", "diagnostics")}
        rows_of = {
            task: {"seen": len(merged[task].ids) - len(ids), "reported": len(ids)} for task, ids in unseen.items()
        }
        return {**share.as_dict(**facts), "rows": rows_of}

    run_cached_stage(folder, inputs, work, fresh=fresh)
    return load_or_score(folder / "scores", tuple(base), scores)
