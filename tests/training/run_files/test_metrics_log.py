"""What a run says: trackers get flat keys, files hold JSON only, a resumed run leaves no line twice."""

import json

import pytest

from mtft.common.atomic_io import finite
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
