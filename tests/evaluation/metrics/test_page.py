"""docs/tasks.md says of the metrics what they are: names, options, defaults, bounds, and what examples score."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mtft.common.aggregates import AGGREGATES
from mtft.evaluation.metrics import METRICS, Answer, make_metrics
from mtft.evaluation.metrics.python_metric import PythonMetric
from mtft.recipe.schema.metric import metric_key
from mtft.recipe.schema.task import TaskSection

TEXT = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
OWN = "{python: FILE.py:FUNCTION}"


def table(head):
    """Cells of the rows of the table that begins with `head`."""
    lines = TEXT.split(f"\n{head}\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [["" if cell.strip() == "—" else cell.strip() for cell in line[1:-1].split("|")] for line in lines]


ROWS = {cells[0].strip("`"): cells for cells in table("| metric | needs | score | options | bounds | from |")}
EXAMPLES = table("| metric | reference | answer | score |")


def shown(value):
    """As it stands in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_every_metric_has_its_row():
    assert list(ROWS) == [*METRICS, OWN]


@pytest.mark.parametrize("name", METRICS)
def test_the_row_says_what_is_so(name):
    kind, cells = METRICS[name], ROWS[name]
    assert cells[1] == {"forward": "forward", "labels": "labels", "generation": "answer"}[kind.NEEDS]
    named = re.findall(r"`(\w+)(?:: ([^`]+))?`(?! of)", cells[3])
    expected = [(f.name, "" if f.default is MISSING else shown(f.default)) for f in fields(kind)]
    assert [pair for pair in named if pair[0] in {f.name for f in fields(kind)}] == expected


@pytest.mark.parametrize("name", METRICS)
def test_the_bounds_are_its_own(name):
    aggregate = AGGREGATES[METRICS[name].AGGREGATE]
    low, high = aggregate.bounds
    words = f"{low:g} to {high:g}" if high is not None else f"{low:g} or more"
    assert ROWS[name][4] == words + ("" if aggregate.higher_is_better else ", lower is better")


def test_the_row_of_own_functions():
    defaults = {f.name: shown(f.default) for f in fields(PythonMetric)}
    for option in ("higher_is_better", "timeout"):
        assert f"`{option}: {defaults[option]}`" in ROWS[OWN][3]


def section(cells):
    """The metric of an example, as it stands in a recipe."""
    return YAML(typ="safe").load(cells[0].strip("`"))


def test_all_that_answer_have_an_example_but_those_that_tell_one_in_words():
    of_answers = {name for name, kind in METRICS.items() if kind.NEEDS == "generation"}
    examples = {metric_key(section(cells)) for cells in EXAMPLES}
    assert of_answers - examples == {"spearman", "pass_at_k"}


@pytest.mark.parametrize("cells", EXAMPLES, ids=lambda cells: cells[0].strip("`"))
def test_examples_score_what_is_said(cells):
    reference, answer = (cell.strip("`") for cell in cells[1:3])
    task = TaskSection.model_validate({"name": "t", "data": "x", "metrics": [section(cells)]})
    (metric,) = make_metrics(task).values()
    stats = metric.statistics([Answer("0", "", reference, (answer,), {}, "f:1")])
    assert metric.aggregate.value(stats) == pytest.approx(float(cells[3]), abs=6e-4)
