"""A report of a damaged run draws what is whole, and lists on the page and on stderr what is not."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from mtft.common.errors import UserError
from mtft.pipeline.stages.stage_cache import move_aside
from mtft.report.components import plots
from mtft.report.components.run_data import load_run
from mtft.report.page import write_report
from mtft.report.sections import pareto
from tests.common.damage import DAMAGE, NOT_FILES, OBJECTS, damage
from tests.report.hand_made import TASKS, lines, write, write_run

GRADIENTS = {"tasks": list(TASKS), "measures": 6, "step": 20, "clusters": {"groups": {"group-1": list(TASKS)}}}
GRADIENTS |= {name: [[1.0, 0.5], [0.5, 1.0]] for name in ("cosine", "conflict_rate", "transfer", "measured_together")}
FILES = {
    "results.json": "Results",
    "recipe.yaml": "The recipe",
    "mix/fit.json": "Trials and surrogates",
    "mix/proposal.json": "not distinguishable",
    "train/joint/plan.json": "steps of",
    "train/joint/env.json": "versions.torch",
    "train/joint/affinity.json": "Affinity",
    "train/joint/metrics.jsonl": "Training",
    "train/joint/eval.jsonl": "Training",
    "train/joint/result.json": "Training",
    "merge/retention.json": None,
    "merge/front.json": None,
    "merge/adapter/merge.json": None,
    "fuse/fusion.json": None,
}


@pytest.fixture
def run_dir(tmp_path):
    write(tmp_path / "train" / "joint" / "affinity.json", GRADIENTS)
    result = {"steps": 20, "seconds": 1.0, "export": "adapter", "tasks": {}}
    write(tmp_path / "train" / "joint" / "result.json", result)
    return write_run(tmp_path)


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch):
    """Figures are made and not drawn: drawing takes most of a page's time."""
    for module in (plots, pareto):
        monkeypatch.setattr(module, "to_svg", lambda _: "<svg></svg>")


def page_of(run_dir):
    said = []
    html = write_report([run_dir], say=said.append).read_text(encoding="utf-8")
    return html, said


def test_what_moved_aside_is_not_drawn(run_dir):
    before = [run.name for run in load_run(run_dir).trains]
    shutil.copytree(run_dir / "train" / "joint", run_dir / "train" / "spare")
    move_aside(run_dir / "train" / "joint")  # as --fresh does
    (run_dir / "train" / "spare").rename(run_dir / "train" / "joint")
    assert len(list((run_dir / "train").iterdir())) == len(before) + 1
    assert [run.name for run in load_run(run_dir).trains] == before


def test_a_whole_run_has_no_such_list(run_dir):
    html, said = page_of(run_dir)
    assert said == []
    assert "Damaged or missing" not in html
    assert all(word in html for word in FILES.values() if word)


KINDS = [*DAMAGE, "newer", *NOT_FILES]
PAIRS = [  # each file and each kind in the fast tests, all pairs in the slow ones
    pytest.param(name, kind, marks=() if (i + j) % 4 == 0 else pytest.mark.slow)
    for i, name in enumerate(FILES)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_is_whole_is_drawn(run_dir, name, kind):
    damage(run_dir / name, kind)
    html, said = page_of(run_dir)
    assert "Throughput" in html  # of the other run, if not of this one
    text = name == "recipe.yaml" and kind not in ("bytes", *NOT_FILES)  # shown as it stands
    empty = kind == "empty" and name.endswith(".jsonl")  # eval.jsonl of a run that has not evaluated
    if not (kind in OBJECTS or text or (empty and "eval" in name)):
        assert any(name in line for line in said), said
        assert name in html
        assert "Damaged or missing" in html
    for other, word in FILES.items():
        if word and other != name and word not in ("Training", "steps of") and FILES[name] != "Trials and surrogates":
            assert word in html


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("results.json", "base", 5),
        ("results.json", "base", {"sql": {"loss": "low"}}),
        ("mix/fit.json", "targets", {"sql/loss": 5}),
        ("mix/fit.json", "targets", {"sql/loss": {"n": "6"}}),
        ("mix/proposal.json", "text", 5),
        ("train/joint/plan.json", "tasks", {"sql": 1, "sum": 2}),
        ("train/joint/plan.json", "tasks", 5),
        ("train/joint/env.json", "versions", 5),
        ("train/joint/affinity.json", "cosine", [[1]]),
        ("train/joint/affinity.json", "tasks", 5),
        ("train/joint/result.json", "steps", 10**30),
    ],
)
def test_values_of_another_kind_cost_their_section_alone(run_dir, name, key, value):
    write(run_dir / name, {**json.loads((run_dir / name).read_text()), key: value})
    html, said = page_of(run_dir)
    assert "Throughput" in html
    assert "Traceback" not in html
    if name not in ("train/joint/env.json", "train/joint/result.json"):
        assert any(name.rpartition("/")[2] in line for line in said), said


def test_lines_of_another_kind_are_listed(run_dir):
    path = run_dir / "train" / "joint" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["loss"] = "low"
    rows[5]["tasks"]["sql"] = [1]
    rows[6]["tasks"]["sql"]["weight"] = "1"
    write(path, lines([*rows[:10], *rows[12:], rows[19]]))
    html, said = page_of(run_dir)
    told = "\n".join(said)
    for words in (
        "step 5: damaged: key loss",
        "step 6: damaged: key tasks.sql",
        "step 7: damaged: key tasks.sql.weight",
    ):
        assert words in told
    assert "no line of steps 11-12" in told
    assert "step 20 twice" in told
    assert "no line of steps 11-12" in html


def test_evaluations_that_are_missing_are_said(run_dir):
    folder = run_dir / "train" / "joint"
    write(
        folder / "plan.json", {**json.loads((folder / "plan.json").read_text()), "eval_every": 5, "eval_on_start": True}
    )
    write(folder / "eval.jsonl", lines([{"step": s, "tasks": {t: {"loss": 2.5} for t in TASKS}} for s in (0, 10, 20)]))
    _, said = page_of(run_dir)
    assert said == [f"warning: {run_dir}: train/joint/eval.jsonl: no line of steps 5, 15"]


def test_what_the_result_says_of_the_history_is_shown(run_dir):
    path = run_dir / "train" / "joint" / "result.json"
    write(path, {**json.loads(path.read_text()), "history": ["metrics.jsonl: step 3 twice (the later line counts)"]})
    html, said = page_of(run_dir)
    assert "step 3 twice" in said[0]
    assert "step 3 twice" in html


def test_nothing_whole_is_an_error_that_names_it_all(tmp_path):
    for name in ("metrics.jsonl", "results.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="nothing of it can be drawn") as caught:
        write_report([tmp_path])
    assert re.search(r"metrics\.jsonl: a folder", caught.value.what)
    assert not (tmp_path / "report.html").exists()


def test_the_command_line(run_dir):
    (run_dir / "results.json").write_text("[]")
    done = subprocess.run(
        [sys.executable, "-m", "mtft", "report", str(run_dir)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "results.json: damaged: it holds a list, not an object" in done.stderr
    assert done.stdout.strip() == str(run_dir / "report.html")
