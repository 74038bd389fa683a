"""Two hundred tasks are a page on the terminal: totals, extremes, like warnings as one; --all shows everything."""

from dataclasses import replace

import pytest

from mtft.data.summary.brief import MOST_TASKS, warning_lines
from mtft.data.summary.render_console import summary_text
from mtft.data.summary.summarize import summarize_data
from tests.data.summary.test_summary import recipe
from tests.data.toy_examples import TEMPLATES, tokenizer


@pytest.fixture
def two(tmp_path):
    return summarize_data(recipe(tmp_path), tokenizer(TEMPLATES["chatml"]), cache_dir=tmp_path)


def many(summary, number):
    """The summary with `number` tasks: one the longest, one with the largest share, one with dropped rows."""
    tasks = [
        replace(summary.tasks[0], name=f"task-{i}", examples=100, realised_share=1 / number) for i in range(number)
    ]
    tasks[3] = replace(tasks[3], longest=4321)
    tasks[5] = replace(tasks[5], dropped=77)
    tasks[7] = replace(tasks[7], realised_share=0.5, examples=5000)
    tasks[9] = replace(tasks[9], examples=1, realised_share=1e-4)
    warnings = [line for task in tasks for line in (f"{task.name}: seen {task.epochs} times", f"{task.name}: few rows")]
    return replace(summary, tasks=tuple(tasks), warnings=(*warnings, "the template is odd"))


@pytest.mark.parametrize("number", [MOST_TASKS + 1, 200, 2000])
def test_the_length_does_not_grow(two, number):
    text = summary_text(many(two, number))
    assert len(text.splitlines()) <= 45
    for shown in (
        "task-3",
        "task-5",
        "task-7",
        "task-9",
        f"all {number:,} tasks",
        "4,321",
        "77",
        "the template is odd",
    ):
        assert shown in text
    assert f"{(number - 2) * 100 + 5001:,}" in text  # examples of all of them
    assert "task-0: few rows (and" in text
    assert "--all" in text


def test_everything_is_shown_when_asked_for(two):
    text = summary_text(many(two, 200), everything=True)
    assert all(f"task-{i}: few rows" in text for i in range(200))
    assert text.count("─ task-") == 200  # examples
    assert "more like it" not in text


def test_few_tasks_are_all_shown(two):
    text = summary_text(many(two, MOST_TASKS))
    assert text.count("─ task-") == MOST_TASKS
    assert "all 20 tasks" not in text


def test_warnings_of_one_kind_become_one_line_that_names_tasks():
    names = [f"t{i}" for i in range(200)]
    warnings = [
        f"{name}: {i + 1} of 10 held-out examples are among the rows of {names[-i]}" for i, name in enumerate(names)
    ]
    (line,) = warning_lines([*warnings, "a warning"], names)[:-1]
    assert line.startswith(warnings[0])
    assert "and 199 more like it: t1, t2, t3 and 196 more" in line
    different = [f"{name}: column {'x' * (i + 1)} is not read" for i, name in enumerate(names)]
    assert len(warning_lines(different, names)) <= 13
    assert warning_lines(different, names)[-1].startswith("... and 188 more warnings")
