"""An auxiliary task is shown and never counted: whatever is said about all tasks is said as if it were not there."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rich.console import Console

from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import TrialRecord
from mtft.common.errors import MergeError, UserError
from mtft.evaluation.task_scores import TaskScores
from mtft.merge.search.pareto import pareto_facts
from mtft.merge.search.retention import retention
from mtft.merge.search.weight_search import run_weight_search
from mtft.pipeline.results_table import print_results
from mtft.pipeline.stages import mix
from mtft.pipeline.stages.sweep_targets import sweep_goals
from mtft.pipeline.stages.train import RunChoice, planned_runs
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.load import load_recipe
from mtft.recipe.schema.merge import MergeSection
from mtft.report.components.run_data import load_run
from mtft.report.page import write_report
from mtft.report.sections.results import results
from mtft.training.callbacks.early_stopping import EarlyStopping
from mtft.training.callbacks.watched_score import watched_score
from tests.report.hand_made import write, write_run

NAMES = ("copy", "twice", "shout")


@pytest.mark.parametrize("watch", ["mean", "worst", "a"])
def test_what_is_watched(watch):
    """a, b count, aux goes the other way: the same best step, the same end as without it."""
    rng = np.random.default_rng(0)
    curve = [{"a": a, "b": b} for a, b in rng.uniform(1, 2, (30, 2)).tolist()]
    bare = EarlyStopping(("a", "b"), watch=watch, patience=4)
    full = EarlyStopping(("a", "aux", "b"), watch=watch, patience=4, auxiliary=("aux",))
    for step, losses in enumerate(curve):
        bare.observe(step, losses)
        full.observe(step, {"aux": 9.0 - step / 4, **losses})
        assert (full.run, full.ended) == (bare.run, bare.ended)
    assert full.run.step > 0
    named = EarlyStopping(("a", "aux"), watch="aux", auxiliary=("aux",))
    assert named.watched({"a": 1.0, "aux": 7.0}) == 7.0, "by its name it may be watched"


@pytest.mark.parametrize("watch, score", [("mean/exact_match", -0.5), ("worst/exact_match", -0.25), ("aux/loss", 5.0)])
def test_a_watched_metric(watch, score):
    def row(task, exact, loss=1.0):
        correct = np.where(np.arange(100) < 100 * exact, 10, 9)
        return TaskScores(task, tuple(map(str, range(100))), np.full(100, 10 * loss), np.full(100, 10), correct)

    found = {"a": row("a", 0.75), "b": row("b", 0.25), "aux": row("aux", 0.0, 5.0)}
    assert watched_score(watch, found, ("a", "b")) == pytest.approx(score)
    assert np.isnan(watched_score("mean/exact_match", {"aux": found["aux"]}, ()))


def test_without_a_task_that_counts_nothing_is_better():
    stopping = EarlyStopping(("a", "aux"), patience=2, auxiliary=("aux",))
    for step in range(3):
        stopping.observe(step, {"aux": 1.0 - step})
    assert stopping.run.step == -1


def test_the_run_ends_when_all_that_counts_is_dropped():
    stopping = EarlyStopping(("a", "aux"), task_patience=1, auxiliary=("aux",))
    for step in range(2):
        stopping.observe(step, {"a": 1.0, "aux": 1.0 - step / 10})
    assert stopping.dropped == {"a": 1}
    assert stopping.ended == "every task is dropped"


def test_the_final_table():
    def scores(number):
        return {f"t{i}": {"loss": float(i), "token_accuracy": 0.5, "exact_match": None} for i in range(number)}

    def printed(number, **options):
        stream = io.StringIO()
        console = Console(file=stream, width=108)
        print_results({"base": scores(number), "joint": scores(number)}, console, **options)
        return stream.getvalue()

    assert "mean of 24" in printed(25, auxiliary=("t24",))
    assert "11.500" in printed(25, auxiliary=("t24",)), "the mean of 0 to 23"
    assert "12.000" in printed(25)
    assert "t1 (auxiliary)" in printed(3, auxiliary=("t1",))


def test_the_page(tmp_path):
    run_dir = write_run(tmp_path)
    (run_dir / "recipe.yaml").write_text("name: by-hand\ntasks:\n- {name: sql}\n- {name: sum<b>, auxiliary: true}\n")
    table = json.loads((run_dir / "results.json").read_text())
    for stage in table.values():
        stage["sum<b>"] = dict.fromkeys(stage["sum<b>"], 77.0)
    write(run_dir / "results.json", table)
    run = load_run(run_dir)
    assert run.auxiliary == ("sum<b>",)
    tables = [part for part in results(run).parts if hasattr(part, "rows")]
    assert tables
    for found in tables:
        names = [row.cells[0].text for row in found.rows]
        assert names == ["sql", "sum<b> (auxiliary)", "mean over tasks"]
        texts = [[cell.text for cell in row.cells[1:]] for row in found.rows]
        assert texts[2] == texts[0], "the mean of the one that counts"
        assert texts[1] != texts[0]
    assert "sum&lt;b&gt; (auxiliary)" in write_report([run_dir]).read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", ["", "tasks: [", "tasks: 3", "- a", "tasks: [3, {auxiliary: true}]", "a: !!int x"])
def test_a_recipe_that_can_not_be_read_marks_nothing(tmp_path, recipe):
    run_dir = write_run(tmp_path)
    (run_dir / "recipe.yaml").write_text(recipe)
    assert not {"sql", "sum<b>"} & set(load_run(run_dir).auxiliary)


def scores(task, loss, seed=0, noise=0.0):
    nll = 10 * loss + noise * np.random.default_rng(seed).normal(size=100)
    return TaskScores(task, tuple(map(str, range(100))), nll, np.full(100, 10), np.full(100, 5))


def test_retention():
    base = {task: scores(task, 3, noise=1) for task in ("a", "b", "aux")}
    single = {task: scores(task, 1, noise=1) for task in ("a", "b", "aux")}
    merged = {"a": scores("a", 1.5, 1, 1), "b": scores("b", 2, 2, 1), "aux": scores("aux", 2.9, 3, 1)}
    without = [{task: found[task] for task in ("a", "b")} for found in (base, single, merged)]
    full = retention(base, single, merged, auxiliary=("aux", "elsewhere"))
    assert full.summary == retention(*without).summary
    assert full.summary != retention(base, single, merged).summary
    assert set(full.tasks) == {"a", "b", "aux"}
    assert full.as_dict(method="linear", rank=1)["auxiliary"] == ["aux"]


AT = np.array([0.9, 0.4])


def bowl(weights, *, aux=True):
    away = np.asarray(weights) - AT
    losses = {"x": 1 + float(away @ away), "y": 2 + float((away[0] - away[1]) ** 2)}
    return losses | ({"aux": 50 * float(np.sum((np.asarray(weights) - 1.4) ** 2))} if aux else {})


@pytest.mark.parametrize("by", ["grid", "cobyqa", "front"])
@pytest.mark.parametrize("worst", [0.0, 2.0])
def test_the_search_of_merge_weights(by, worst):
    bare = run_weight_search(("p", "q"), lambda w: bowl(w, aux=False), by, worst=worst, budget=30)
    full = run_weight_search(("p", "q"), bowl, by, worst=worst, budget=30, auxiliary=("aux",))
    assert full.weights == bare.weights
    assert full.verdict == bare.verdict
    assert "aux" in full.best.losses, "it is written down"
    facts, bare_facts = pareto_facts(("p", "q"), full, ("aux",)), pareto_facts(("p", "q"), bare)
    assert facts["tasks"] == ["x", "y"]
    assert [row["front"] for row in facts["trials"]] == [row["front"] for row in bare_facts["trials"]]
    named = run_weight_search(("p", "q"), bowl, "cobyqa", budget=40, auxiliary=("aux",), prefer={"aux": 1.0})
    np.testing.assert_allclose(named.weights, 1.4, atol=0.05)


def test_the_verdict_of_a_search():
    """With scores by example: the error of the gain is that of the tasks that count."""

    def evaluate(weights, aux):
        losses = bowl(weights, aux=aux)
        return {task: scores(task, loss, 5, noise=2) for task, loss in losses.items()}

    bare = run_weight_search(("p", "q"), lambda w: evaluate(w, False), "cobyqa", budget=20)
    full = run_weight_search(("p", "q"), lambda w: evaluate(w, True), "cobyqa", budget=20, auxiliary=("aux",))
    assert (full.weights, full.improvement) == (bare.weights, bare.improvement)
    assert full.error == pytest.approx(bare.error, rel=0.2), "other draws, the same tasks"


def test_a_search_needs_a_task_that_counts():
    with pytest.raises(MergeError, match="no task that counts"):
        run_weight_search(("p",), lambda w: {"aux": 1.0}, auxiliary=("aux",))


def recipe_of(folder, content, **changes):
    """A recipe with trials and all tasks' shares; the last task is auxiliary."""
    tasks = [dict(task) for task in content["tasks"]]
    tasks[-1]["auxiliary"] = True
    sweep = {"trials": 20, "steps": 1, "surrogate": "linear", **changes}
    content = {**content, "tasks": tasks, "sweep": sweep, "output": {"dir": str(folder / "run")}}
    content = {key: value for key, value in content.items() if key not in ("merge", "fuse")}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return load_recipe(folder / "recipe.yaml")


def proposed(recipe, aux):
    """The proposal from trials in which the auxiliary task gets better (aux < 0) or worse by its share."""
    rng = np.random.default_rng(1)
    ledger = TrialLedger(mix.mix_dir(recipe) / mix.LEDGER)
    for i, row in enumerate(rng.dirichlet(np.ones(3), 20)):
        of = {"copy": 2 - row[0], "twice": 2 - row[1], "shout": 10 + aux * row[2]}
        shares = dict(zip(NAMES, row.tolist(), strict=True))
        losses = {f"{task}/loss": float(loss) for task, loss in of.items()}
        ledger.append([TrialRecord(trial=str(i), status="done", mixture=shares, scores=losses)])
    proposal = mix.mix_propose(recipe)
    return proposal.as_dict()


@pytest.mark.parametrize(
    "objective",
    ["mean", pytest.param("worst", marks=pytest.mark.slow),
     pytest.param({"copy": 1, "twice": 3, "shout": 0}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_proposals(whole_recipe, tmp_path, objective):
    found = [proposed(recipe_of(tmp_path / str(aux), whole_recipe, objective=objective), aux) for aux in (1.0, -9.0)]
    for key in ("mixture", "gain", "verdict", "text", "kept"):
        assert found[0][key] == found[1][key], key
    assert found[0]["mixture"]["shout"] < 0.2, "its share is what the others have no use for"
    beside = {"shout/loss"} if isinstance(objective, dict) else set()
    assert set(found[0]["predicted"]) - beside == {"copy/loss", "twice/loss"}


def test_an_objective_may_name_it(whole_recipe, tmp_path):
    recipe = recipe_of(tmp_path, whole_recipe, objective={"shout": 1.0, "copy": 1.0})
    assert set(sweep_goals(recipe)) == {"copy/loss", "shout/loss"}
    assert list(sweep_goals(recipe_of(tmp_path, whole_recipe))) == ["copy/loss", "twice/loss"]


@pytest.mark.parametrize("changes, refused", [
    ({}, False), ({"train": {"watch": "shout"}}, True), ({"train": {"task_patience": 2}}, True),
    ({"train": {"patience": 2, "eval_every": 1}}, False), ({"sweep": {"objective": {"shout": 1}}}, True),
    ({"sweep": {}}, False), ({"merge": {"gates": {"kind": "scalearn"}}}, False),
])  # fmt: skip
def test_it_needs_no_held_out_rows_unless_something_names_it(whole_recipe, tmp_path, changes, refused):
    tasks = [dict(task) for task in whole_recipe["tasks"]]
    tasks[-1] |= {"auxiliary": True, "eval_data": None}
    content = {key: value for key, value in whole_recipe.items() if key not in ("merge", "fuse", "sweep")}
    train = {**content["train"], "eval_every": 1, **changes.get("train", {})}
    content |= {"tasks": tasks, "train": train, "output": {"dir": str(tmp_path / "run"), "export": "best"}}
    content |= {"sweep": {"trials": 20, "steps": 1, **changes["sweep"]}} if "sweep" in changes else {}
    content |= {"merge": changes["merge"]} if "merge" in changes else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    if refused:
        with pytest.raises(UserError, match="not every task has eval_data"):
            check_compatibility(recipe, stage="check")
    else:
        check_compatibility(recipe, stage="check")


def test_it_is_trained_beside_the_others_and_not_alone(whole_recipe, tmp_path):
    """What is merged is one adapter that keeps every task; this one is there for the sake of the others."""
    recipe = recipe_of(tmp_path, whole_recipe).model_copy(update={"merge": MergeSection()})
    stores = [SimpleNamespace(task=name, lengths=np.full(9, 10)) for name in NAMES]
    runs = planned_runs(recipe, RunChoice(mix.space(recipe, stores).current), stores)
    assert [name for name in runs if name.startswith("single-")] == ["single-copy", "single-twice"]
    assert [task.name for task in runs["joint"].tasks] == list(NAMES)


def test_the_page_leaves_out_a_task_that_nothing_scored(tmp_path):
    run_dir = write_run(tmp_path)
    table = json.loads((run_dir / "results.json").read_text())
    (gone, *_), stages = table["base"], table.values()
    for stage in stages:
        stage.pop(gone, None)
    write(run_dir / "results.json", table)
    run = load_run(run_dir)
    assert gone in run.tasks
    tables = [part for part in results(run).parts if hasattr(part, "rows")]
    assert tables
    assert not [row for found in tables for row in found.rows if row.cells[0].text == gone]
