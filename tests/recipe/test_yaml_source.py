"""The text of a recipe: YAML 1.2 values, lines, duplicate keys, aliases, overrides."""

from __future__ import annotations

import pytest

from mtft.common.errors import UserError
from mtft.recipe.yaml_source import apply_override, kind_of, read_yaml


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes):
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_yaml(file)

    return read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # R19: bare PyYAML reads the text '1e-4'
        ("2E5", 2e5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("no", "no"),  # YAML 1.1 reads false
        ("on", "on"),
        ("true", True),
        ("12:30", "12:30"),  # YAML 1.1 reads 750
        ("2026-01-31", "2026-01-31"),  # a date is text
        ("'1e-4'", "1e-4"),
        ("~", None),
        ("", None),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_values_are_yaml_1_2(read, text, value):
    got = read(f"key: {text}\n").values["key"]
    assert got == value
    assert type(got) is type(value)


def test_lines_and_shown_paths(read):
    source = read("a: 1\ntasks:\n  - name: sql\n    data: x\n  - {data: y}\n")
    assert source.origin(("tasks", 0, "data")) == "line 4"
    assert source.origin(("tasks", 1, "data")) == "line 5"
    assert source.origin(("tasks", 0, "nothing", "there")) == "line 3"
    assert source.show(("tasks", 0, "data")) == "tasks.sql.data"
    assert source.show(("tasks", 1, "data")) == "tasks.1.data"


def test_keys_are_text(read):
    assert read("{2024: 1, no: 2, 1.5: 3}").values == {"2024": 1, "no": 2, "1.5": 3}


def test_duplicate_key_is_a_problem_with_both_lines(read):
    source = read("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    (problem,) = source.problems
    assert (problem.path, problem.what) == (("b", "c"), "is given twice (first on line 3)")
    assert source.origin(problem.path) == "line 5"


def test_anchors_and_merge_keys(read):
    source = read("a: &x {p: 1, q: 2}\nb: *x\nc: {<<: *x, q: 3}\n")
    assert source.values == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 2}, "c": {"p": 1, "q": 3}}
    source.values["b"]["p"] = 9
    assert source.values["a"]["p"] == 1


def test_an_alias_of_itself_and_a_billion_laughs_are_refused(read):
    assert "alias" in read("x: &a [*a]").problems[0].what
    bomb = "a: &a [0,0,0,0,0,0,0,0,0]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
    )
    with pytest.raises(UserError, match="more than 60,000 keys and values"):
        read(bomb)


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("", "recipe.yaml is empty", None),
        ("# only a comment\n", "recipe.yaml is empty", None),
        ("- a\n- b\n", "recipe.yaml holds a list, not a mapping of sections", "line 1"),
        ("just words", "recipe.yaml holds the text 'just words', not a mapping of sections", "line 1"),
        ("a: 1\nb: [1, 2\nc: 3\n", "not readable as YAML: expected ',' or ']', but got ':'", "line 3, column 2"),
        ("a:\tb", "not readable as YAML: found character '\\t' that cannot start any token", "line 1, column 3"),
        ("a: b: c", "not readable as YAML: mapping values are not allowed here", "line 1, column 5"),
        ("a: 1\n---\nb: 2\n", "not readable as YAML: but found another document", "line 2, column 1"),
        ("[" * 1200, "the YAML is nested too deep", None),
        (b"a: \xff\xfe", "recipe.yaml is not UTF-8 text", "byte 3"),
    ],
)
def test_unreadable_files(read, text, what, line):
    with pytest.raises(UserError) as caught:
        read(text)
    assert caught.value.what == what
    assert caught.value.do
    assert line is None or caught.value.where.endswith(line)


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="there is no recipe") as caught:
        read_yaml(tmp_path / "quikstart.yaml")
    assert caught.value.do == "recipes in that folder: quickstart.yaml"
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(tmp_path)


def test_a_foreign_tag_is_refused_not_run(read):
    source = read("a: !!python/object/apply:os.system ['true']\nb: !mine 3\n")
    assert [problem.what for problem in source.problems] == [
        "has the tag !!python/object/apply:os.system",
        "has the tag !mine",
    ]
    assert source.values == {"a": None, "b": None}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=3", ("train", "steps"), 3),
        ("train.learning_rate=1e-4", ("train", "learning_rate"), 1e-4),
        ("train.steps=", ("train", "steps"), None),
        ("lora.r=8", ("lora", "r"), 8),  # the section is made
        ("tasks.0.weight=2", ("tasks", 0, "weight"), 2),
        ("tasks.sql.weight=2", ("tasks", 0, "weight"), 2),
        ("tasks.sql.v1.weight=2", ("tasks", 1, "weight"), 2),  # the longest name wins
        ("mixture.shares.sql.v1=.5", ("mixture", "shares", "sql.v1"), 0.5),
        ("tasks.sql.data=[a, 'b=c']", ("tasks", 0, "data"), ["a", "b=c"]),
        ("name=a=b", ("name",), "a=b"),
    ],
)
def test_overrides(read, override, path, value):
    source = read("train: {steps: 1}\ntasks: [{name: sql, data: x}, {name: sql.v1}]\nmixture: {shares: natural}\n")
    apply_override(source, override)
    assert source.value(path) == value
    assert source.origin(path) == f"override {override!r}"


def test_an_override_mends_what_it_replaces(read):
    source = read("a: 1\na: 2\n")
    apply_override(source, "a=3")
    assert source.problems == []
    assert source.values == {"a": 3}


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.steps", "the override 'train.steps' is not key=value"),
        ("=3", "the override '=3' is not key=value"),
        ("train..steps=3", "the override 'train..steps=3' is not key=value"),
        ("tasks.nosuch.weight=1", "tasks has no item 'nosuch'"),
        ("tasks.7=1", "tasks has no item '7'"),
        ("a=[1", "not readable as YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_bad_overrides(read, override, what):
    source = read("tasks: [{name: sql}]\n")
    with pytest.raises(UserError) as caught:
        apply_override(source, override)
    assert caught.value.what == what
    assert caught.value.where.startswith("command line")
    assert caught.value.do


@pytest.mark.parametrize(
    ("text", "path", "what", "line"),
    [
        ("a:\n  b: 1\n  <<: 5\n", ("a", "<<"), "is 5, and must be a mapping", "line 3"),
        ("a: &a {b: 1}\nc:\n  <<: [*a, x]\n", ("c", "<<"), "is the text 'x', and must be a mapping", "line 3"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", ("c", "<<"), "is given twice", "line 4"),
        ("a: 1\n? [b]\n: 1\n", ("?",), "is a list or a mapping as a key", "line 2"),
    ],
)
def test_merge_keys_that_merge_nothing_are_problems_of_their_line(read, text, path, what, line):
    source = read(text)
    assert [(problem.path, problem.what) for problem in source.problems] == [(path, what)]
    assert source.origin(path) == line


def test_a_text_with_too_many_values_is_given_up_on_its_way(read, monkeypatch):
    monkeypatch.setattr("mtft.recipe.yaml_source._MAX_VALUES", 100)
    with pytest.raises(UserError, match="more than 100 keys and values") as caught:
        read("x:\n" + "- 1\n" * 1000 + "[")  # the bracket is never reached
    assert caught.value.where.endswith("line 99")


def test_numbers_of_any_length_can_be_said(read):
    assert kind_of(read("a: 0x" + "f" * 20_000).values["a"]) == "a number of about 24082 digits"
    assert len(read("a: " + "1" * 20_000).problems[0].what) < 120
