"""What a run says: trackers get flat keys, files hold JSON only, a resumed run leaves no line twice."""

import json

import pytest

from mtft.common.atomic_io import finite
from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.metrics_log import EVALS, METRICS, MetricsLog, flat
from mtft.training.run_training import train
from tests.training.conftest import lines


def line(step, loss=1.0):
    task = {"loss": loss, "weight": 1.0, "share": 1.0, "tokens": 3, "examples": 1}
    return {"step": step, "loss": loss, "tokens": 5, "seconds": 0.1, "tokens_per_second": 50.0, "tasks": {"sql": task}}


def steps_of(path):
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_flat_keys_and_finite_values_only():
    found = flat(line(3, loss=float("nan")) | {"loss": 2.0}, "eval_")
    assert found == {
        "eval_loss": 2.0, "eval_tokens": 5, "eval_seconds": 0.1, "eval_tokens_per_second": 50.0,
        "eval_sql/weight": 1.0, "eval_sql/share": 1.0, "eval_sql/tokens": 3, "eval_sql/examples": 1,
    }  # fmt: skip


def test_files_hold_json_without_nan(tmp_path):
    MetricsLog(tmp_path, steps=3, quiet=True).step(line(1, loss=float("nan")))
    assert json.loads((tmp_path / METRICS).read_text())["tasks"]["sql"]["loss"] is None
    assert finite({"a": [float("inf"), 1.0]}) == {"a": [None, 1.0]}


def test_going_on_drops_what_comes_after_the_checkpoint_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path, steps=9, quiet=True)
    for step in (1, 2, 3):
        log.step(line(step))
    log.evaluation(2, {"sql": {"loss": 1.0}})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    again = MetricsLog(tmp_path, steps=9, quiet=True)
    again.start(2)
    again.step(line(3))
    again.evaluation(2, {"sql": {"loss": 1.0}})
    assert steps_of(tmp_path / METRICS) == [1, 2, 3]
    assert steps_of(tmp_path / EVALS) == [2]


def test_from_the_start_everything_is_dropped(tmp_path):
    log = MetricsLog(tmp_path, steps=9, quiet=True)
    log.evaluation(0, {"sql": {"loss": 1.0}})
    log.start(0)
    assert steps_of(tmp_path / EVALS) == []


def test_ranks_that_do_not_write(tmp_path):
    log = MetricsLog(None, steps=1, quiet=True)
    log.start(0)
    log.step(line(1))
    log.close()
    assert not list(tmp_path.iterdir())


def test_tracker_gets_every_step_by_task(recipe, tmp_path):
    """Through transformers' own tensorboard callback, read back with tensorboard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = {"dir": str(tmp_path / "run"), "trackers": ["tensorboard"]}
    train(Recipe.model_validate({**recipe, "output": output}), quiet=True, prove=False)
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    written = lines(tmp_path / "run", METRICS)
    found = events.Scalars("train/copy/loss")
    assert [event.step for event in found] == [step["step"] for step in written]
    assert [event.value for event in found] == pytest.approx([step["tasks"]["copy"]["loss"] for step in written])
    assert {"train/loss", "train/grad_norm", "eval/shout/exact_match"} <= set(events.Tags()["scalars"])


def broken_log(tmp_path):
    """Of a run with an evaluation every two steps: steps 3 and 4 are gone, 2 stands twice, one line is no JSON."""
    log = MetricsLog(tmp_path, steps=9, quiet=True)
    for step in (1, 2, 2, 5, 6, 7, 8):
        log.step(line(step))
    for step in (0, 2, 6):
        log.evaluation(step, {"sql": {"loss": 1.0}})
    with (tmp_path / METRICS).open("a") as file:
        file.write('[5]\n{"step": 9, "lo')


def follow(tmp_path):
    log, said = MetricsLog(tmp_path, steps=9, quiet=True), []
    log.say = said.append
    log.eval_every, log.eval_on_start = 2, True
    return log, said


def test_going_on_says_what_is_wrong_with_the_history(tmp_path):
    broken_log(tmp_path)
    log, said = follow(tmp_path)
    log.start(6)
    told = "\n".join(said)
    for words in (
        "metrics.jsonl: line 8: it holds a list, not an object",
        "metrics.jsonl: step 2 twice",
        "metrics.jsonl: no line of steps 3-4;",
        "metrics.jsonl: 2 lines after step 6 are logged again",
        "eval.jsonl: no line of step 4;",
    ):
        assert words in told
    assert steps_of(tmp_path / METRICS) == [1, 2, 5, 6]
    assert log.history(6) == ["metrics.jsonl: no line of steps 3-4", "eval.jsonl: no line of step 4"]


def test_a_whole_history_is_not_spoken_of(tmp_path):
    log, said = follow(tmp_path)
    for step in range(1, 7):
        log.step(line(step))
    for step in (0, 2, 4, 6):
        log.evaluation(step, {"sql": {"loss": 1.0}})
    before = (tmp_path / METRICS).read_bytes()
    said.clear()
    log.start(6)
    assert said == []
    assert log.history(6) == []
    assert (tmp_path / METRICS).read_bytes() == before


def test_a_history_that_is_gone_is_said(tmp_path):
    log, said = follow(tmp_path)
    log.start(4)
    assert "metrics.jsonl: no line of steps 1-4" in said[0]
    assert "eval.jsonl: no line of steps 0, 2, 4" in said[1]


def test_a_folder_in_its_place_is_an_error(tmp_path):
    (tmp_path / METRICS).mkdir()
    with pytest.raises(UserError, match="a folder, not a file"):
        follow(tmp_path)[0].history(3)


def test_the_result_says_what_is_missing(recipe, tmp_path):
    """A run that goes on after somebody cut its log: trained to the end, and marked."""
    folder = tmp_path / "run"
    values = {**recipe, "train": {**recipe["train"], "steps": 4}, "output": {"dir": str(folder), "save_every": 2}}
    train(Recipe.model_validate(values), quiet=True, prove=False)
    assert "history" not in json.loads((folder / "result.json").read_text())
    kept = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join([kept[0], kept[3]]))
    for path in (folder / "result.json", folder / "checkpoint-4"):
        path.rename(tmp_path / path.name)
    train(Recipe.model_validate(values), quiet=True, prove=False)
    assert json.loads((folder / "result.json").read_text())["history"] == ["metrics.jsonl: no line of step 2"]
