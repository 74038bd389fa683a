"""A stage runs once for its inputs, continues after a crash, and never throws a result away."""

import json

import pytest

from mtft.common.errors import UserError
from mtft.common.own_files import write_own
from mtft.pipeline.stages.stage_cache import differences, read_json, run_cached_stage
from tests.common.damage import DAMAGE


class Work:
    def __init__(self, folder, fails=0):
        self.folder, self.calls, self.fails = folder, 0, fails

    def __call__(self):
        self.calls += 1
        if self.calls <= self.fails:
            raise KeyboardInterrupt
        (self.folder / "output").write_text(f"call {self.calls}")


def test_second_call_is_skipped(tmp_path):
    work = Work(tmp_path / "a")
    assert run_cached_stage(tmp_path / "a", {"x": 1}, work)
    assert not run_cached_stage(tmp_path / "a", {"x": 1}, work)
    assert work.calls == 1


def test_tuples_and_lists_are_the_same_inputs(tmp_path):
    work = Work(tmp_path / "a")
    run_cached_stage(tmp_path / "a", {"x": (1, 2)}, work)
    assert not run_cached_stage(tmp_path / "a", {"x": [1, 2]}, work)


def test_interrupted_work_is_called_again_on_the_same_folder(tmp_path):
    work = Work(tmp_path / "a", fails=1)
    with pytest.raises(KeyboardInterrupt):
        run_cached_stage(tmp_path / "a", {"x": 1}, work)
    (tmp_path / "a" / "half").write_text("kept")
    assert run_cached_stage(tmp_path / "a", {"x": 1}, work)
    assert (tmp_path / "a" / "half").read_text() == "kept"
    assert work.calls == 2


def test_other_inputs_are_refused_and_named(tmp_path):
    work = Work(tmp_path / "a")
    run_cached_stage(tmp_path / "a", {"train": {"steps": 10, "seed": 1}}, work)
    with pytest.raises(UserError) as caught:
        run_cached_stage(tmp_path / "a", {"train": {"steps": 20, "seed": 1}}, work)
    assert "train.steps was 10, is 20" in str(caught.value)
    assert "seed" not in caught.value.what
    assert "--fresh" in caught.value.do


def test_fresh_keeps_the_old_results_aside(tmp_path):
    folder = tmp_path / "a"
    for value in (1, 2, 3):
        run_cached_stage(folder, {"x": value}, Work(folder), fresh=True)
    kept = [json.loads((tmp_path / name / "started.json").read_text())["x"] for name in ("a.old-1", "a.old-2", "a")]
    assert kept == [1, 2, 3]


def test_fresh_leaves_unchanged_stages_alone(tmp_path):
    work = Work(tmp_path / "a")
    run_cached_stage(tmp_path / "a", {"x": 1}, work)
    assert not run_cached_stage(tmp_path / "a", {"x": 1}, work, fresh=True)


def test_differences_of_nested_inputs():
    before, after = {"a": {"b": 1, "c": 2}, "d": 0}, {"a": {"b": 1, "c": 3}, "e": None}
    assert differences(before, after) == ["a.c was 2, is 3", "d was 0, is null"]


@pytest.mark.parametrize("name", ["started.json", "done.json"])
@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if not kind.startswith(("key", "true"))])
def test_damage_is_named_with_the_remedy(tmp_path, name, kind):
    work = Work(tmp_path / "a")
    run_cached_stage(tmp_path / "a", {"x": 1}, work)
    (tmp_path / "a" / name).write_bytes(DAMAGE[kind][0])
    with pytest.raises(UserError) as caught:
        run_cached_stage(tmp_path / "a", {"x": 1}, work)
    assert name in caught.value.where
    assert "its stage runs again" in caught.value.do
    assert work.calls == 1
    run_cached_stage(tmp_path / "a", {"x": 1}, work, fresh=True)  # as the remedy says
    assert work.calls == 2
    assert (tmp_path / "a.old-1" / name).exists()


def test_keys_of_what_a_stage_has_written_are_checked(tmp_path):
    write_own(tmp_path / "proposal.json", {"gain": "much", "mixture": {}})
    with pytest.raises(UserError, match="key gain is a text, not a number or null"):
        read_json(tmp_path / "proposal.json", {"gain": (float, type(None)), "mixture": dict})
    assert read_json(tmp_path / "none.json") is None
