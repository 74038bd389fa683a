"""scripts/make_tasks.py: every answer is re-checked by a second way (task_oracles), held out is unseen, the same seed
gives the same bytes, and what is written is a recipe that `mtft check` passes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtft.__main__ import main as mtft
from mtft.common.errors import UserError
from mtft.quickstart.stdlib_corpus import group_of
from mtft.recipe.load import load_recipe
from scripts import make_tasks
from scripts.task_makers import MAKERS, sql_metric
from scripts.task_makers.base import MadeRow, TaskMaker, make_rows
from tests.scripts.task_oracles import ORACLES
from tests.slow import slow

ROOT = Path(__file__).parents[2]
# Tasks about the same kind of thing: what one holds out, none of the others trains on.
RELATED = [
    ["date_to_iso", "iso_to_date"],
    ["date_day_first", "date_month_first"],
    ["number_to_words", "words_to_number"],
    ["plural", "article"],
    ["capital", "currency", "country_code"],
    ["sentiment", "sentiment_swapped"],
]
CONFLICTS = [("date_day_first", "date_month_first"), ("sentiment", "sentiment_swapped")]


def rows_of(task: str, side: str, count: int = 50, seed: int = 0) -> list[dict]:
    return make_rows(MAKERS[task], count, seed, held_out=side == "eval")


def entities(rows: list[dict]) -> set[str]:
    return {row["id"].split("|")[0] for row in rows}


def templates(rows: list[dict]) -> set[str]:
    return {row["id"].split("|")[1] for row in rows}


def prompt_of(row: dict) -> str:
    return row["prompt"] if "prompt" in row else json.dumps([row["messages"][0], row["tools"]])


def test_every_task_has_an_oracle():
    assert ORACLES.keys() == MAKERS.keys()
    assert len(MAKERS) >= 10


@pytest.mark.parametrize("count", [50, *slow(1000)])
@pytest.mark.parametrize("task", MAKERS)
def test_answers_by_a_second_way(task, count):
    for side, most in (("train", count), ("eval", min(count, 200))):
        rows = rows_of(task, side, most)
        assert len({prompt_of(row) for row in rows}) == len(rows) == most  # one answer to a prompt
        for row in rows:
            ORACLES[task](row)


def answer_of(row: dict) -> dict:
    """The part of a row that is learnt."""
    return {"response": row["response"]} if "response" in row else {"messages": [row["messages"][1]]}


def with_answer(row: dict, other: dict) -> dict:
    """The row with the answer of another one."""
    changed = {**row, **answer_of(other)}
    return changed if "response" in row else {**changed, "messages": [row["messages"][0], other["messages"][1]]}


@pytest.mark.parametrize("task", MAKERS)
def test_an_oracle_finds_wrong_answers(task):
    rows = rows_of(task, "train")
    pairs = [(row, other) for row, other in zip(rows, [*rows[1:], rows[0]]) if answer_of(row) != answer_of(other)]
    passed = 0
    for row, other in pairs:
        try:
            ORACLES[task](with_answer(row, other))
        except (AssertionError, KeyError, ValueError):
            continue
        passed += 1
    assert len(pairs) >= 10
    assert passed <= len(pairs) / 20  # two queries may find the same rows


@pytest.mark.parametrize("task", MAKERS)
def test_held_out_is_unseen(task):
    train, held_out = rows_of(task, "train", 300), rows_of(task, "eval", 100)
    assert not templates(train) & templates(held_out)
    assert not entities(train) & entities(held_out)
    assert not {prompt_of(row) for row in train} & {prompt_of(row) for row in held_out}


@pytest.mark.parametrize("tasks", RELATED, ids=lambda tasks: tasks[0])
def test_held_out_is_unseen_by_related_tasks_and_other_seeds(tasks):
    train = {entity for task in tasks for seed in (0, 1) for entity in entities(rows_of(task, "train", 300, seed))}
    held_out = {entity for task in tasks for entity in entities(rows_of(task, "eval", 100, seed=2))}
    assert train
    assert not train & held_out


@pytest.mark.parametrize("task", ["function_name", "function_docstring"])
def test_functions_are_of_other_modules(task):
    groups = [
        {group_of(entity.split(":")[0]) for entity in entities(rows_of(task, side))} for side in ("train", "eval")
    ]
    assert not groups[0] & groups[1]


@pytest.mark.parametrize(("one", "other"), CONFLICTS)
def test_conflicting_tasks_answer_one_prompt_differently(one, other):
    makers = [TaskMaker("same", MAKERS[task].draw, "", "") for task in (one, other)]
    for a, b in zip(*(make_rows(maker, 50, 0, held_out=False) for maker in makers)):
        assert a["prompt"] == b["prompt"]
        assert a["response"] != b["response"]


@pytest.mark.parametrize("task", MAKERS)
def test_another_seed_gives_other_rows(task):
    first, again, other = (rows_of(task, "train", 50, seed) for seed in (3, 3, 4))
    assert first == again
    assert len({prompt_of(row) for row in first} & {prompt_of(row) for row in other}) < 10


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_same_seed_same_bytes_in_two_processes(tmp_path):
    for name in ("1", "2"):
        command = [sys.executable, "scripts/make_tasks.py", str(tmp_path / name), "--rows", "40", "--eval-rows", "20"]
        environment = {**os.environ, "PYTHONHASHSEED": name}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    files = written(tmp_path / "1")
    assert files == written(tmp_path / "2")
    assert {f"{task}.{side}.jsonl" for task in MAKERS for side in ("train", "eval")} < files.keys()


SOME = "date_to_iso,sql,tool_call,sentiment"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a few tasks, as a user makes it."""
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "cache"))
    make_tasks.main([str(tmp_path / "made"), "--rows", "30", "--eval-rows", "10", "--tasks", SOME])
    return tmp_path / "made"


def test_the_recipe_passes_the_check(small, capsys):
    assert mtft(["check", str(small / "recipe.yaml"), "--json"]) == 0
    assert "is not read" not in capsys.readouterr().out
    recipe = load_recipe(small / "recipe.yaml")
    assert [task.name for task in recipe.tasks] == SOME.split(",")


@pytest.mark.slow
def test_the_recipe_of_all_tasks_passes_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "cache"))
    make_tasks.main([str(tmp_path / "made"), "--rows", "30", "--eval-rows", "10"])
    assert mtft(["check", str(tmp_path / "made" / "recipe.yaml"), "--json"]) == 0


def test_a_second_call_gives_the_same_and_an_edited_recipe_is_kept(small, capsys):
    before = written(small)
    make_tasks.main([str(small), "--rows", "30", "--eval-rows", "10", "--tasks", SOME])
    assert written(small) == before
    (small / "recipe.yaml").write_text("name: mine\n")
    with pytest.raises(SystemExit) as stop:
        make_tasks.main([str(small), "--rows", "9", "--tasks", SOME])
    assert stop.value.code == 2
    assert "edited" in capsys.readouterr().err
    assert {**written(small), "recipe.yaml": b""} == {**before, "recipe.yaml": b""}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "sqll"], "no task 'sqll': did you mean 'sql'?"),
        (["--tasks", ","], "no task is named"),
        (["--rows", "0"], "0 rows are none"),
        (["--tasks", "sql", "--eval-rows", "-3"], "-3 rows are none"),
    ],
)
def test_errors_are_for_people(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        make_tasks.main([str(tmp_path / "made"), *words])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pint" else find(name))
    make_tasks.make_tasks(tmp_path / "made", 2, 2, 0, [MAKERS["sql"]])
    with pytest.raises(UserError, match=r"not installed: pint \(for units\)") as error:
        make_tasks.make_tasks(tmp_path / "other", 2, 2, 0, list(MAKERS.values()))
    assert 'pip install "mtft[tasks]"' in error.value.do


def test_a_task_that_runs_dry_says_how_many_rows_it_has():
    maker = TaskMaker("few", lambda rng, held_out: MadeRow("a", "b", {"prompt": str(rng.randint(0, 6))}), "", "")
    assert len(make_rows(maker, 7, 0, held_out=False)) == 7
    with pytest.raises(UserError, match="few has about 7 different eval rows, and 8 are asked for") as error:
        make_rows(maker, 8, 0, held_out=True)
    assert error.value.do.startswith("--eval-rows 7")


def test_the_list_names_every_task(capsys):
    make_tasks.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MAKERS)


def test_the_page_describes_every_task():
    """The rows of docs/made-tasks.md are those of the makers."""
    page = (ROOT / "docs" / "made-tasks.md").read_text("utf-8")
    rows = {cells[1].strip("` "): [cell.strip() for cell in cells[2:4]] for cells in table(page)}
    assert rows == {name: [maker.about, maker.unseen] for name, maker in MAKERS.items()}


def table(page: str) -> list[list[str]]:
    """Cells of the rows of the page's first table."""
    lines = page.partition("|---")[2].splitlines()[1:]
    return [re.split(r"(?<!\\)\|", line) for line in lines[: lines.index("")]]


QUERY = "SELECT name FROM customers WHERE since < 2010 ORDER BY name"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (QUERY, 1),
        (f"Here it is:\n```sql\n{QUERY.lower().replace('2010', '2009 + 1')};\n```", 1),
        (QUERY.replace("ORDER BY name", "ORDER BY name DESC"), 0),
        (QUERY.replace("2010", "2011"), 0),
        (QUERY.replace("name FROM", "name, city FROM"), 0),
        ("SELECT nothing FROM nowhere", 0),
        ("", 0),
        ("DELETE FROM customers", 0),
        ("ATTACH DATABASE 'other.db' AS other", 0),
        ("PRAGMA writable_schema = 1", 0),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n", 0),
        ("SELECT 1; SELECT 2", 0),
        ("SELECT zeroblob(900000000)", 0),
        ("\ud800\0", 0),
    ],
)
def test_sql_is_scored_by_what_it_finds(answer, score):
    assert sql_metric.same_rows("", QUERY, answer, {}) == score
    assert sql_metric.same_rows("", QUERY, QUERY, {}) == 1  # no answer changes the databases


def test_sql_rows_may_come_in_any_order_where_none_is_asked():
    assert sql_metric.same_rows("", QUERY.replace(" ORDER BY name", ""), f"{QUERY} DESC", {}) == 1
    assert sql_metric.same_rows("", QUERY.replace(" ORDER BY name", ""), QUERY.replace("name", "city"), {}) == 0
