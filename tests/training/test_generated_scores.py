"""Metrics of generated answers in a run: at its end, where they decide something, in trials; and in `mtft eval`."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_mixers.mixture.mixture import Mixture
from data_mixers.sweep.trial import Trial
from mtft.common.errors import UserError
from mtft.evaluation import generation
from mtft.evaluation.evaluate_recipe import as_json, evaluate
from mtft.evaluation.task_scores import TaskScores
from mtft.pipeline.check import check_recipe
from mtft.pipeline.stages.mix import trial_config
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.run_dir import training_keys
from mtft.training.run_training import read_result, train
from mtft.training.sweep_trial import run_trial
from tests.training.conftest import lines

METRICS = ["loss", "text_match", "f1", {"name": "rouge_l", "key": "overlap"}, "label_accuracy"]


@pytest.fixture
def asking(recipe, tmp_path):
    """`copy` asks for answers, the other tasks for none."""

    def make(**sections):
        tasks = [dict(task) for task in recipe["tasks"]]
        tasks[0] |= {"metrics": METRICS, "generate": {"max_new_tokens": 6}}
        given = {**recipe, "tasks": tasks, "output": {"dir": str(tmp_path / "run")}}
        for name, section in sections.items():
            given[name] = {**given.get(name, {}), **section}
        return Recipe.model_validate(given)

    return make


@pytest.fixture
def batches(monkeypatch):
    """Numbers of prompts that `generate` was called with."""
    seen, real = [], generation._answer_batch

    def counted(generate, model, prompts, batch, *rest):
        seen.append(len(batch))
        return real(generate, model, prompts, batch, *rest)

    monkeypatch.setattr(generation, "_answer_batch", counted)
    return seen


def test_a_run_asks_one_row_first_and_all_at_its_end(asking, batches):
    recipe = asking(train={"steps": 4, "eval_every": 2})
    result = train(recipe, quiet=True, prove=False)
    assert batches[0] == 1
    assert sum(batches[1:]) == 12
    scores = result.scores["copy"]
    assert set(scores.summary()) >= {"loss", "text_match", "f1", "overlap", "label_accuracy"}
    assert set(result.scores["twice"].answered) == set()
    told = json.loads((result.out_dir / "result.json").read_text())["tasks"]["copy"]
    assert told["overlap"] == pytest.approx(scores.score("overlap"))
    answers = lines(result.out_dir / "answers", "copy.jsonl")
    assert [answer["id"] for answer in answers] == list(scores.ids)
    assert all(answer["prompt"].endswith("Assistant:") for answer in answers)
    assert {answer["overlap"] for answer in answers} == set(scores.statistics("overlap")[:, 0])
    assert "| copy |" in (result.adapter_dir / "README.md").read_text()
    again = read_result(result.out_dir)
    for metric in scores.metrics:
        np.testing.assert_array_equal(again.scores["copy"].statistics(metric), scores.statistics(metric))


def test_text_match_is_what_teacher_forcing_finds(asking):
    """Greedy answers and exact_match by teacher forcing are one thing, but for another spelling in tokens."""
    recipe = asking(train={"steps": 60, "learning_rate": 5e-3})
    scores = train(recipe, quiet=True, prove=False).scores["copy"]
    long = scores.tokens_N > 6  # cut by max_new_tokens
    assert (scores.right_N("text_match") == (scores.exact_N & ~long)).all()


def test_metrics_of_a_trained_run_may_change(asking):
    """They don't decide about the weights: an unfinished run goes on, a finished one says what to do."""
    recipe = asking(train={"steps": 2})
    first = train(recipe, quiet=True, prove=False)
    tasks = (recipe.tasks[0].model_copy(update={"metrics": (*recipe.tasks[0].metrics, "contains")}), *recipe.tasks[1:])
    changed = recipe.model_copy(update={"tasks": tasks})
    with pytest.raises(UserError, match=r"scored otherwise: tasks\.copy\.metrics") as caught:
        train(changed, quiet=True, prove=False)
    assert "result.json" in str(caught.value.do)
    (first.out_dir / "result.json").unlink()
    trained = (first.out_dir / "metrics.jsonl").read_text()
    again = train(changed, quiet=True, prove=False)
    assert (first.out_dir / "metrics.jsonl").read_text() == trained
    assert "contains" in again.scores["copy"].answered
    assert again.scores["copy"].score("loss") == first.scores["copy"].score("loss")


def test_metrics_that_decide_may_not_change(asking):
    watching = asking(train={"eval_every": 2, "watch": "copy/f1", "patience": 1})
    assert "tasks.copy.generate.max_new_tokens" in training_keys(watching)
    assert not [key for key in training_keys(asking()) if ".generate" in key or ".metrics" in key]


def test_what_is_watched_is_asked_at_each_evaluation(asking, batches):
    recipe = asking(
        train={"steps": 4, "eval_every": 2, "watch": "copy/f1", "patience": 1},
        output={"export": "best", "save_every": 2},
    )
    result = train(recipe, quiet=True, prove=False)
    evaluated = lines(result.out_dir, "eval.jsonl")
    assert all("f1" in line["tasks"]["copy"] for line in evaluated)
    assert all("overlap" not in line["tasks"]["copy"] for line in evaluated)
    best = max(evaluated, key=lambda line: line["tasks"]["copy"]["f1"])  # the first of equals
    record = json.loads((result.out_dir / "result.json").read_text())
    assert record["exported_step"] == best["step"]
    assert record["tasks"]["copy"]["f1"] == best["tasks"]["copy"]["f1"]
    assert "overlap" in record["tasks"]["copy"]


def test_a_metric_that_fails_ends_the_run_before_its_first_step(asking):
    recipe = asking(train={"steps": 4})
    tasks = (recipe.tasks[0].model_copy(update={"metrics": ("loss", "numeric")}), *recipe.tasks[1:])
    with pytest.raises(UserError, match="number"):
        train(recipe.model_copy(update={"tasks": tasks}), quiet=True, prove=False)
    assert not Path(recipe.output.dir, "metrics.jsonl").exists()


@pytest.mark.parametrize("how", ["truncate_right", "truncate_left"])
def test_cut_questions_are_said(asking, how):
    """A reference without its end can't be matched, and a prompt without its beginning is another question."""
    short = asking(train={"max_length": 36, "too_long": how})
    (line,) = check_recipe(short).warnings[-1:]
    assert line.startswith("copy: ")
    assert "cut at 36 tokens" in line
    whole = asking(train={"max_length": 200, "micro_batch_tokens": 400})
    assert not [line for line in check_recipe(whole).warnings if "are cut" in line]


def test_trials_ask_for_their_objective_alone(asking, batches):
    recipe = asking(train={"steps": 2})
    trial = Trial(Mixture.of({"copy": 0.4, "twice": 0.3, "shout": 0.3}), seed=17)
    ((_, scores),) = run_trial(trial, recipe)
    assert batches == []
    assert "copy/overlap" not in scores
    ((_, scores),) = run_trial(trial, recipe, targets=["copy/overlap"])
    assert sum(batches) == 13
    assert 0 <= scores["copy/overlap"] <= 1
    assert "copy/f1" not in scores


def test_trials_that_did_not_measure_the_objective_are_others(asking):
    """The ledger skips those that it has: they would never get the score that is fitted."""
    losses = [trial_config(asking(sweep={"trials": 9, "objective": goal}), []) for goal in ("mean", {"copy": 1})]
    answers = [trial_config(asking(sweep={"trials": 9, "objective": {name: 1}}), []) for name in ("copy/f1", "mean/f1")]
    assert losses[0] == losses[1] != answers[0] == answers[1]


def test_eval_reports_what_the_task_asks_for_with_intervals(asking):
    recipe = asking()
    table = as_json(evaluate(recipe), recipe)
    assert [key for key in table["copy"] if key in ("loss", "exact_match", "text_match", "f1", "overlap")] == [
        "loss",
        "text_match",
        "f1",
        "overlap",
    ]
    lower, upper = table["copy"]["interval"]["overlap"]
    assert lower <= table["copy"]["overlap"] <= upper
    assert "overlap" not in table["twice"]
    helper = recipe.tasks[0].model_copy(update={"auxiliary": True})
    marked = as_json(evaluate(recipe), recipe.model_copy(update={"tasks": (helper, *recipe.tasks[1:])}))
    assert [task for task, values in marked.items() if values.get("auxiliary")] == ["copy"]


def test_scores_of_answers_come_back_from_disk_whole_or_not(asking, tmp_path):
    scores = evaluate(asking(), tasks=["copy"])["copy"]
    scores.save(tmp_path / "copy.jsonl")
    assert TaskScores.load(tmp_path / "copy.jsonl").summary() == scores.summary()
    text = (tmp_path / "copy.jsonl").read_text().splitlines()
    damaged = json.loads(text[3])
    del damaged["metrics"]["f1"]
    text[3] = json.dumps(damaged)
    (tmp_path / "copy.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(UserError, match="damaged scores"):
        TaskScores.load(tmp_path / "copy.jsonl")
