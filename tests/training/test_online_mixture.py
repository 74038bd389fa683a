"""A mixture that changes while training: the same whether it is broken, how its steps are split, and what it is asked.

The rules and their toys are in tests/data_mixers/online/test_controller.py; here is what a run makes of them.
"""

import json
import os
import signal

import numpy as np
import pytest
import torch

from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.errors import UserError
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.online_mixture import decision_steps, make_controller, reference_losses
from mtft.training.run_training import train
from tests.slow import slow
from tests.training.test_run_training import kill_at_step, picture, run
from tests.training.test_trainer import lines, trainer_for

UNIFORM = "uniform"
ONLINE = {
    "bandit": {"name": "bandit", "every": 2, "scale": 0.5},
    "group_dro": {"name": "group_dro", "every": 2, "reference": {"copy": 1.0, "twice": 4.0, "shout": 4.0}},
    "linear_law": {"name": "linear_law", "every": 5, "probe_steps": 1, "eta": 4.0},
}
STEPS = 14
# The method with most to keep stands for all where whole runs are repeated.
COSTLY = ["linear_law", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bandit", "group_dro"))]


def recipe_of(recipe, name, folder=None, **changes):
    online = None if name is None else {**ONLINE[name], **changes.pop("online", {})}
    train = {**recipe["train"], "steps": STEPS, **changes.pop("train", {})}
    mixture = {"shares": UNIFORM, "online": online, **changes.pop("mixture", {})}
    output = {"dir": str(folder), "save_every": 3, "keep": 2} if folder else recipe["output"]
    tasks = [{**task, "limit": 10} for task in recipe["tasks"]]  # several epochs
    return Recipe.model_validate(
        {**recipe, "tasks": tasks, "mixture": mixture, "train": train, "output": output, **changes}
    )


def trained(recipe, folder, name, prepare=lambda trainer: None, **changes):
    whole = recipe_of(recipe, name, **changes).model_dump()
    folder.mkdir()
    trainer, inputs, plan = trainer_for(whole, folder)
    prepare(trainer)
    trainer.train()
    return lines(folder), plan


def shares_over_time(found):
    return {line["step"]: line["mixture"]["shares"] for line in found if "shares" in line.get("mixture", {})}


def without_times(found):
    return [{key: value for key, value in line.items() if "second" not in key} for line in found]


# ---- nothing changes


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_with_no_decision_in_it_a_run_is_the_static_one(recipe, tmp_path, name):
    """Bit by bit: metrics and weights."""
    folders = [tmp_path / "static", tmp_path / "online"]
    train(recipe_of(recipe, None, folders[0]), quiet=True, prove=False)
    train(recipe_of(recipe, name, folders[1], online={"every": 100}), quiet=True, prove=False)
    assert picture(folders[0]) == picture(folders[1])
    static, online = (json.loads((folder / "plan.json").read_text()) for folder in folders)
    even = dict.fromkeys(("copy", "twice", "shout"), pytest.approx(1 / 3))
    assert online.pop("changes") == [{"from": 1, "shares": even}]
    assert static == online


# ---- what is decided is what is played


@pytest.mark.parametrize("name", COSTLY)
def test_the_next_steps_play_what_was_decided(recipe, tmp_path, name):
    found, plan = trained(recipe, tmp_path / "run", name)
    said = shares_over_time(found)
    whole = recipe_of(recipe, name)
    fresh = ReplannedPlan(plan.changes[0].shares, plan._sizes, steps=STEPS, batch=8, seed=0)
    due = decision_steps(whole, make_controller(whole, fresh))
    assert due == ([2, 4, 6, 8, 10, 12] if name != "linear_law" else [5, 10])
    assert [change.first for change in plan.changes[1:]] == list(said)
    assert set(said) >= {5, 6, 7, 8} if name == "linear_law" else said.keys() <= set(due)
    assert len(said) >= 3
    assert all(line["mixture"]["from"] == step + 1 for step, line in enumerate(found, 1) if "mixture" in line)
    # Between two changes, each task has the rows of its share to two.
    ends = [*said, STEPS]
    batch = plan.batch
    for (first, shares), last in zip(said.items(), ends[1:]):
        for task, share in shares.items():
            rows = sum(line["tasks"][task]["examples"] for line in found[first:last])
            assert abs(rows - share * batch * (last - first)) < 2
    # No row of a task comes twice in an epoch.
    seen = [tuple(example) for s in range(STEPS) for example in zip(*(part.tolist() for part in plan.step(s)))]
    assert len(set(seen)) == len(seen) == STEPS * batch


def test_group_dro_follows_the_excess(recipe, tmp_path):
    """By hand, from the losses of the metrics; copy, whose reference is far below the others', is raised throughout."""
    found, _ = trained(recipe, tmp_path / "run", "group_dro", online={"eta": 0.2})
    said = shares_over_time(found)
    assert list(said) == [2, 4, 6, 8, 10, 12]
    alpha, excess = np.full(3, 1 / 3), np.zeros(3)
    for step, shares in said.items():
        for k, (task, reference) in enumerate({"copy": 1, "twice": 4, "shout": 4}.items()):
            losses = [line["tasks"][task]["loss"] for line in found[step - 2 : step]]
            losses = [loss for loss in losses if loss is not None]
            excess[k] = max(np.mean(losses) - reference, 0) if losses else excess[k]  # absent: as before
        alpha = alpha * np.exp(0.2 * excess)
        alpha = (1 - 1e-4) * alpha / alpha.sum() + 1e-4 / 3
        np.testing.assert_allclose(list(shares.values()), alpha, atol=1e-4)
    assert [shares["copy"] for shares in said.values()] == sorted(shares["copy"] for shares in said.values())
    assert alpha[0] > 0.6


@pytest.mark.slow
def test_skipped_steps_are_not_told(recipe, tmp_path, monkeypatch):
    from mtft.training import trainer as module

    whole = module.task_losses
    calls = []

    def poisoned(sums, counts, normalise):
        calls.append(0)
        loss_K = whole(sums, counts, normalise)
        if len(calls) in (1, 2):
            loss_K[1] = torch.inf  # the other tasks' losses are of weights that were not trained on
        return loss_K

    monkeypatch.setattr(module, "task_losses", poisoned)
    found, _ = trained(recipe, tmp_path / "run", "group_dro")
    assert [line.get("skipped") for line in found[:3]] == ["non-finite", "non-finite", None]
    assert next(iter(shares_over_time(found))) == 4


def test_bounds_and_epochs_hold_and_what_gives_way_is_said(recipe, tmp_path):
    mixture = {"caps": {"copy": 0.3}, "floors": {"shout": 0.66}, "max_epochs": 2, "on_cap": "redistribute"}
    said = []
    found, plan = trained(
        recipe,
        tmp_path / "run",
        "group_dro",
        prepare=lambda trainer: setattr(trainer.run_log, "say", said.append),
        mixture=mixture,
        online={"eta": 0.1},
        train={"batch_tokens": 160},
    )
    changes = shares_over_time(found)
    assert changes
    for shares in changes.values():
        assert shares["copy"] <= 0.3 + 1e-9
    rows = [sum(line["tasks"][task]["examples"] for line in found) for task in ("copy", "twice", "shout")]
    assert rows == plan.counts(STEPS).tolist()
    assert max(rows) == 20  # all that two epochs have
    notes = [note for line in found for note in line.get("mixture", {}).get("notes", [])]
    assert notes[0].startswith("shout gets 0.4")
    assert notes[0].endswith("less than its floor of 0.6600: its max_epochs leave no more")
    assert f"step 2: {notes[0]}" in said


@pytest.mark.parametrize("style", ["mixed", *slow("unmixed")])
def test_shares_of_tokens(recipe, tmp_path, style):
    """Over the run, and in every stretch between two decisions."""
    mixture, batch = {"unit": "tokens"}, {"batch_style": style, "batch_tokens": 600}
    found, plan = trained(recipe, tmp_path / "run", "bandit", mixture=mixture, train=batch, online={"every": 4})
    said = shares_over_time(found)
    assert list(said) == [4, 8, 12]
    total = sum(line["tokens"] for line in found)
    for row in plan.table():
        tokens = sum(line["tasks"][row["task"]]["share"] * line["tokens"] for line in found)
        assert row["tokens"] == pytest.approx(tokens)
        assert tokens / total == pytest.approx(row["asked"], abs=0.01)
    for (first, shares), last in zip(said.items(), [8, 12, STEPS]):
        part = found[first:last]
        for task, share in shares.items():
            tokens = sum(line["tasks"][task]["share"] * line["tokens"] for line in part)
            assert tokens / sum(line["tokens"] for line in part) == pytest.approx(share, abs=0.06)


@pytest.mark.slow
def test_the_rows_that_are_measured_stay_in_a_round(recipe, tmp_path):
    """Else what falls would be the rows, not the loss. Measured before, between and behind the probes, on all tasks."""
    measured, chosen = [], []

    def spy(trainer):
        whole = trainer.online.stream.choose

        def choose(number):
            measured.append((trainer.state.global_step, number))
            chosen.append(whole(number))
            return chosen[-1]

        trainer.online.stream.choose = choose

    trained(recipe, tmp_path / "run", "linear_law", prepare=spy)
    assert measured == [(step, step - step % 5) for step in (5, 6, 7, 8, 10, 11, 12, 13)]
    assert chosen[0] == chosen[3] != chosen[4]
    assert {task for task, _ in chosen[0]} == {0, 1, 2}


# ---- splits and ranks


def test_no_batch_is_built_ahead_of_a_change(recipe, tmp_path):
    trainer, *_ = trainer_for(recipe_of(recipe, "bandit").model_dump(), tmp_path)
    source, planned = trainer.steps, []
    step = source.plan.step
    source.plan.step = lambda s: planned.append((s, trainer.state.global_step)) or step(s)
    trainer.train()
    assert {s for s, _ in planned} == set(range(STEPS))
    assert all(s == now for s, now in planned)


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_the_split_of_a_step_does_not_matter(recipe, tmp_path, name):
    """Micro-batches of another size."""
    plain = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    one, plan = trained(recipe, tmp_path / "one", name, **plain)
    two, other = trained(recipe, tmp_path / "two", name, **plain, train={"micro_batch_tokens": 64})
    assert plan.fingerprint == other.fingerprint
    assert shares_over_time(two) == shares_over_time(one)


# ---- resume


@pytest.fixture(scope="module", params=COSTLY)
def unbroken(request, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(recipe_of(recipe, request.param, folder), quiet=True, prove=False)
    assert len(shares_over_time(lines(folder))) >= 3
    return request.param, picture(folder), (folder / "plan.json").read_text()


@pytest.mark.slow
def test_kills_leave_no_trace(recipe, unbroken, tmp_path):
    """Killed before and after decisions, between a decision and its effect, and between two probes."""
    name, whole, plan = unbroken
    broken = recipe_of(recipe, name, tmp_path / "broken")
    for step in (4, 5, 7, 8, 13):
        assert run(broken, kill_at_step(step)) == -signal.SIGKILL
    assert run(broken) == 0
    assert picture(tmp_path / "broken") == whole
    assert (tmp_path / "broken" / "plan.json").read_text() == plan


@pytest.mark.slow
def test_stopped_between_a_decision_and_its_effect(recipe, unbroken, tmp_path):
    """SIGTERM in step 6 (or 7, between two probes): the checkpoint of that step holds what was decided after it."""
    name, whole, plan = unbroken
    at = 7 if name == "linear_law" else 6
    stopped = recipe_of(recipe, name, tmp_path / "stopped")
    assert run(stopped, kill_at_step(at, signal.SIGTERM)) == 0
    state = json.loads((tmp_path / "stopped" / f"checkpoint-{at}" / "state.json").read_text())
    assert state["online"]["chain"]["changes"][-1][0] == at
    assert run(stopped) == 0
    assert picture(tmp_path / "stopped") == whole
    assert (tmp_path / "stopped" / "plan.json").read_text() == plan


def test_the_plan_says_what_was_played(recipe, unbroken, tmp_path):
    name, whole, plan = unbroken
    content = json.loads(plan)
    said = shares_over_time(whole["metrics"])
    assert [change["from"] - 1 for change in content["changes"]] == [0, *said]
    assert [change["shares"] for change in content["changes"][1:]] == list(said.values())
    for task, row in content["tasks"].items():
        played = sum(line["tasks"][task]["examples"] for line in whole["metrics"])
        assert row["rows"] == played
        assert row["realised"] == pytest.approx(played / (STEPS * content["batch"]))


# ---- what it is asked


def test_references(recipe, tmp_path):
    folder = tmp_path / "before"
    train(recipe_of(recipe, None, folder, train={"steps": 2}), quiet=True, prove=False)
    scores = json.loads((folder / "result.json").read_text())["tasks"]
    whole = recipe_of(recipe, "group_dro", online={"reference": str(folder)})
    assert reference_losses(whole) == [scores[task]["loss"] for task in ("copy", "twice", "shout")]
    by_sample = recipe_of(recipe, "group_dro", online={"reference": str(folder)}, loss={"normalise": "task_sample"})
    assert reference_losses(by_sample) != reference_losses(whole)
    np.testing.assert_allclose(reference_losses(by_sample), reference_losses(whole), rtol=0.2)
    assert reference_losses(recipe_of(recipe, "group_dro")) == [1.0, 4.0, 4.0]
    assert reference_losses(recipe_of(recipe, "group_dro", online={"reference": None})) == [0.0] * 3
    os.remove(folder / "scores" / "twice.jsonl")
    with pytest.raises(UserError, match="no held-out losses of task twice"):
        reference_losses(whole)


def test_check_says_what_will_happen(recipe, tmp_path):
    from mtft.pipeline.check import check_recipe

    found = check_recipe(recipe_of(recipe, "linear_law", mixture={"caps": {"copy": 0.4}, "floors": {"shout": 0.1}}))
    assert found.online == (
        "mixture.online: linear_law by held-out losses around a probe of each task, which 3 steps of every 5 are used "
        "for; decides 2 times, after steps 5, 10; shares may move: copy 0.00 to 0.40, twice 0.00 to 1.00, "
        "shout 0.10 to 1.00"
    )
    assert found.online in found.text()
    assert found.as_dict()["online"] == found.online
    assert (
        "decides nothing: the run is too short"
        in check_recipe(recipe_of(recipe, "bandit", online={"every": 50})).online
    )
    static = check_recipe(recipe_of(recipe, None))
    assert static.online is None
    assert "mixture.online" not in static.text()


def test_a_run_goes_on_under_the_same_method_only(recipe, tmp_path):
    from mtft.training.run_files.run_dir import check_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(recipe, "bandit", tmp_path)))
    check_recipe(tmp_path, recipe_of(recipe, "bandit", tmp_path))
    with pytest.raises(UserError, match=r"mixture\.online\.every was 2, is 3"):
        check_recipe(tmp_path, recipe_of(recipe, "bandit", tmp_path, online={"every": 3}))
