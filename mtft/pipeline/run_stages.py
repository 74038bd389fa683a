"""`mtft run`: mix -> train -> merge -> fuse -> report. Stages whose output stands are skipped, broken ones continue.

What is compared, as the columns of results.json and of the final table:

    base              the model as it came
    single            each task's own adapter, on that task
    joint uniform, joint predicted, ...    one adapter for all tasks, by the mixture that it was trained on
    merged            the single-task adapters merged into one
    strong base, fused, strong tuned    the strong model alone, steered by the joint adapter, and tuned itself
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_mixers.mixture.mixture import Mixture
from mtft.common.atomic_io import write_json, write_text
from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.common.folder_lock import sole_writer
from mtft.common.output_paths import check_output_folder
from mtft.common.own_files import irregular
from mtft.evaluation.score_cache import Scores, check_same_examples, load_or_score, measured_state, table
from mtft.pipeline.check import check_names, check_without_weights
from mtft.pipeline.stages.mix_files import refuse_foreign_stage
from mtft.pipeline.stages.stage_cache import model_state, read_json, run_cached_stage
from mtft.recipe.load import dump_recipe, load_recipe
from mtft.recipe.schema.merge import MergeSection
from mtft.recipe.schema.recipe import Recipe
from mtft.report.page import PAGE, check_page

if TYPE_CHECKING:
    from mtft.pipeline.stages.train import RunChoice
    from mtft.training.run_training import TrainResult


def run_recipe(recipe: Recipe, *, fresh: bool = False, launch: str | None = None) -> Path:
    """Runs every stage that the recipe has a section for; returns the path of the report.

    Raises UserError if another run writes the folder, or a stage can't be done as asked.

    fresh    stages whose inputs have changed run again (their old folders move aside); without it they are refused
    launch   command to start training runs with, for instance `accelerate launch --config_file ddp.yaml`
    """
    check_names(recipe)  # not after hours of trials
    root = Path(recipe.output.dir)
    check_output_folder(root, key="output.dir")
    if root.is_dir():
        _refuse_foreign_folder(root, recipe)
        check_page(root / PAGE)
        if recipe.sweep is not None and len(recipe.tasks) > 1:
            refuse_foreign_stage(recipe)
    with sole_writer(root):
        return _run_stages(recipe, root, fresh=fresh, launch=launch)


def _refuse_foreign_folder(root: Path, recipe: Recipe) -> None:
    """UserError if recipe.yaml, where the resolved one would be written, is somebody's own, or damaged."""
    written = root / "recipe.yaml"
    known = ("train/*/env.json", "mix/ledger.jsonl", "results.json")
    ours = any(True for name in known for _ in root.glob(name))
    do = "move it away if the folder is a run's: it is written anew; else give another output.dir"
    if (kind := irregular(written)) is not None:
        raise UserError(f"{kind}, not a file", where=str(written), do=do)
    if not written.exists() or ours or written.read_bytes() == dump_recipe(recipe).encode():
        return
    try:
        load_recipe(written, files=False)
    except UserError as error:
        raise UserError(f"damaged, or not a recipe: {error.what}", where=error.where or str(written), do=do) from None
    raise UserError(
        "the folder is no run's, and holds a recipe.yaml, which a run would replace",
        where=f"output.dir: {root}",
        do="give another output.dir",
    )


def _run_stages(recipe: Recipe, root: Path, *, fresh: bool, launch: str | None) -> Path:
    begin = time.perf_counter()
    held_out = tuple(task.name for task in recipe.tasks if task.eval_data is not None)
    if not held_out:
        raise UserError(
            "no task has held-out rows, so there is nothing to compare", where="tasks: eval_data", do="give eval_data"
        )
    from mtft.data.store.token_store import open_stores
    from mtft.evaluation.evaluate_recipe import evaluate
    from mtft.models.loading import load_tokenizer
    from mtft.pipeline.stages.fuse import fuse_stage
    from mtft.pipeline.stages.merge import merge_stage
    from mtft.pipeline.stages.train import joint_labels, planned_runs, train_runs
    from mtft.training.memory.estimate import meta_model
    from mtft.training.preflight import refuse_settings

    refuse_settings(recipe)
    notes = check_without_weights(recipe, meta_model(recipe).model)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "recipe.yaml", dump_recipe(recipe))
    say = partial(_say, begin)
    for line in notes:
        say(f"note: {line}")
    say("data: reading the tasks, and tokenising what is new")
    tokenizer = load_tokenizer(recipe.model)
    stores, eval_stores = (open_stores(recipe, tokenizer, which) for which in ("train", "eval"))
    choice = _choose_mixture(recipe, stores, fresh=fresh, say=say)
    runs = planned_runs(recipe, choice, stores)
    results = train_runs(runs, fresh=fresh, launch=launch, say=say)

    def score(adapter: Path | None) -> Scores:
        return evaluate(recipe, adapter, stores=eval_stores)

    stages: dict[str, Scores] = {}
    # Named by what the base's scores depend on: the held-out rows and the model.
    data = "-".join(store.fingerprint[:8] for store in eval_stores if store is not None)
    state = {"held_out": data, "model": model_state(recipe.model), **measured_state(recipe)}
    stages["base"] = load_or_score(root / "train" / f"base-{json_hash(state)[:16]}", held_out, lambda: score(None))
    singles = _single_task_scores(results)
    if singles:
        stages["single"] = singles
    labels = joint_labels(recipe, choice, stores)
    for name in sorted(labels, key=lambda name: labels[name] == "joint predicted"):  # yardsticks first
        stages[labels[name]] = results[name].scores
    if recipe.merge is not None:
        adapters = _adapters_to_merge(recipe.merge, results)
        if adapters:
            say("merge")
            stages["merged"] = merge_stage(
                recipe,
                recipe.merge,
                adapters,
                stages["base"],
                singles,
                fresh=fresh,
                state=state,
                score=score,
                beside={labels["joint"]: results["joint"].scores},
            )
    if recipe.fuse is not None:
        say("fuse")
        experts = _name_adapters(recipe.fuse.adapters or ())
        tuned = results["strong"].scores if "strong" in results else None
        alone, fused = fuse_stage(
            recipe, recipe.fuse, experts or {"joint": results["joint"].adapter_dir}, tuned, data=data, fresh=fresh
        )
        stages |= {"strong base": alone, "fused": fused} | ({"strong tuned": tuned} if tuned else {})
    strong = {name: scores for name, scores in stages.items() if name in ("strong base", "fused", "strong tuned")}
    for group in (strong, {name: scores for name, scores in stages.items() if name not in strong}):
        check_same_examples(group, root)  # another tokenizer may leave out other rows
    return _report(recipe, root, stages, say)


def _choose_mixture(recipe: Recipe, stores: list[Any], *, fresh: bool, say) -> RunChoice:
    """What the joint run plays: what the recipe asks for, unless the trials found something better."""
    from mtft.pipeline.stages import mix
    from mtft.pipeline.stages.train import RunChoice

    sweep = recipe.sweep
    if sweep is None or len(recipe.tasks) == 1:
        return RunChoice(mix.space(recipe, stores).current)
    folder = mix.mix_dir(recipe)
    inputs = {
        "sweep": sweep.model_dump(mode="json", exclude={"workers", "backend", "resources"}),
        "config": mix.trial_config(recipe, stores),
        "mixture": recipe.mixture.model_dump(mode="json"),
        "steps": recipe.train.steps,
    }

    def work() -> None:
        swept = mix.mix_sweep(recipe, on_done=partial(_trial_done, say, count(1), sweep.trials))
        if swept.exit_code:
            print(swept.text(), file=sys.stderr)
        proposal = mix.mix_propose(recipe)
        say(f"mix: {proposal.text}")

    say("mix")
    run_cached_stage(folder, inputs, work, fresh=fresh)
    chosen = Mixture.from_yaml(folder / mix.MIXTURE, names=recipe.task_names)
    proposal = read_json(folder / mix.PROPOSAL, {"gain": (list, float, type(None)), "mixture": dict})
    if proposal is None or proposal["gain"] is None:  # the trials say nothing: there is no predicted mixture
        return RunChoice(chosen)
    return RunChoice(chosen, Mixture.of(proposal["mixture"]).over(recipe.task_names))


def _trial_done(say, number: Iterator[int], trials: int, trial: Any, outcome: Any) -> None:
    shares = ", ".join(f"{name} {share:.2f}" for name, share in trial.mixture.as_dict().items())
    ended = "failed" if outcome.points is None else f"{outcome.seconds:.0f} s"
    say(f"mix: trial {next(number)} of at most {trials} ({shares}): {ended}")


def _single_task_scores(results: dict[str, TrainResult]) -> Scores:
    all_scores: Scores = {}
    for name, result in results.items():
        if name.startswith("single-"):
            all_scores |= result.scores
    return all_scores


def _adapters_to_merge(merge: MergeSection, results: dict[str, TrainResult]) -> dict[str, Path]:
    if merge.adapters is not None:
        return _name_adapters(merge.adapters)
    return {
        name.removeprefix("single-"): result.adapter_dir
        for name, result in results.items()
        if name.startswith("single-")
    }


def _name_adapters(folders: Sequence[str]) -> dict[str, Path]:
    """{name: folder}: the folder's name, or its parent's where that is `adapter`, as every run calls it."""
    named: dict[str, Path] = {}
    for path in map(Path, folders):
        name = path.parent.name if path.name == "adapter" else path.name
        number = 2
        unique = name
        while unique in named:
            unique, number = f"{name}-{number}", number + 1
        named[unique] = path
    return named


def _report(recipe: Recipe, root: Path, stages: dict[str, Scores], say) -> Path:
    from mtft.pipeline.results_table import print_results
    from mtft.report.page import write_report

    results = table(stages)
    write_json(root / "results.json", results)
    page = write_report([root])
    print_results(results, auxiliary=recipe.auxiliary_tasks)
    say("done")
    print(f"report: {page}")
    return page


def _say(begin: float, text: str) -> None:
    print(f"[{time.perf_counter() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)
