"""Metrics of one text against another, by hand: matches, words, numbers, JSON."""

from __future__ import annotations

import pytest

from mtft.common.errors import UserError
from mtft.evaluation.metrics import METRICS, Answer, text_matches
from mtft.evaluation.metrics.json_answers import NO_JSON, json_in, same_json
from mtft.evaluation.metrics.number_reader import read_number
from mtft.evaluation.metrics.token_f1 import squad_words


def score(name, reference, text, **options):
    """Of one row."""
    metric = METRICS[name](**options)
    return metric.aggregate.value(metric.statistics([Answer("0", "", reference, (text,), {}, "f:1")]))


@pytest.mark.parametrize(
    ("reference", "text", "options", "same"),
    [
        ("Paris", " Paris\n", {}, True),
        ("Paris", "paris", {}, False),
        ("Straße", "STRASSE", {"ignore_case": True}, True),
        ("Paris", "“Paris.”", {"ignore_punctuation": True}, True),
        ("3.5", "35", {"ignore_punctuation": True}, True),
        ("3.5", "35", {}, False),
        ("$5", "5", {"ignore_punctuation": True}, True),
        ("€5", "5", {"ignore_punctuation": True}, False),  # a symbol beyond ASCII is no punctuation
        ("SELECT a\nFROM b", "SELECT  a FROM b", {"ignore_whitespace": True}, True),
        ("SELECT a\nFROM b", "SELECT  a FROM b", {}, False),
    ],
)
def test_text_match(reference, text, options, same):
    assert score("text_match", reference, text, **options) == same


def test_contains():
    assert score("contains", "42", "It is 421, I think.") == 1
    assert score("contains", "Paris", "In PARIS") == 0
    assert score("contains", "Paris", "In PARIS", ignore_case=True) == 1
    assert score("contains", "", "") == 1


@pytest.mark.parametrize(
    ("pattern", "reference", "text", "right"),
    [
        (r"^\d+$", "whatever", "12", True),
        (r"^\d+$", "12", "12 or so", False),
        (r"answer is (\w+)", "The answer is B, because", "I say: answer is B", True),
        (r"answer is (\w+)", "The answer is B, because", "I say: answer is C", False),
        (r"answer is (\w+)", "The answer is B, because", "B", False),  # not found in the answer: wrong
        (r"answer is (\w+)", "B", "answer is A? No, the answer is B", False),  # the first counts
        (r"answer is (\w+)", "B", "the answer is B", True),  # the whole reference, where it does not match
        (r"\[(\w)\]|\((\w)\)", "(C)", "I take [C].", True),  # the group that took part
        (r"(?i)yes|no", "", "NO!", True),
    ],
)
def test_regex(pattern, reference, text, right):
    assert score("regex", reference, text, pattern=pattern) == right


def test_regex_takes_the_last_place_where_asked():
    assert score("regex", "B", "answer is A? No, the answer is B", pattern=r"answer is (\w+)", take="last") == 1


def test_a_pattern_that_backtracks_without_end_is_stopped(monkeypatch):
    """2^30 ways to read sixty a."""
    monkeypatch.setattr(text_matches, "_MOST_SECONDS", 0.2)
    metric = METRICS["regex"](pattern=r"(a|aa)+$")
    assert metric.statistics([Answer("0", "", "x", ("a" * 60,), {}, "f:1")]).item() == 0  # its group is a, not x
    with pytest.raises(UserError, match="searches a text of 61 signs without end") as caught:
        metric.statistics([Answer("0", "", "x", ("a" * 60 + "b",), {}, "rows.jsonl:7")])
    assert caught.value.where == "rows.jsonl:7"


def test_squads_normalisation():
    """The cases that its script's comments and the paper name: case, punctuation, articles, spaces."""
    assert squad_words("The  Eiffel-Tower,\tin a (big) city!") == ["eiffeltower", "in", "big", "city"]
    assert squad_words("An apple; THE end. Theater a.m.") == ["apple", "end", "theater", "am"]
    assert squad_words(" a an the ... ") == []


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("Denver Broncos", "The Denver Broncos!", 1.0),
        ("Denver Broncos", "Broncos", 2 * 1 * 0.5 / 1.5),
        ("the the cat cat", "cat", 2 * 1 * 0.5 / 1.5),
        ("x y", "z", 0.0),
        ("the", "", 1.0),
        ("the", "dog", 0.0),
        ("dog", "", 0.0),
    ],
)
def test_f1(reference, text, expected):
    assert score("f1", reference, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("no number", None, None),
        ("7", 7, 7),
        ("from 3 to 5 kg", 5, 3),
        ("3-4", 4, 3),
        ("-3", -3, -3),
        ("x=-3", -3, -3),
        ("\u22127 degrees", -7, -7),
        ("+1.50", 1.5, 1.5),
        (".5 and -.25", -0.25, 0.5),
        ("It is 5.", 5, 5),
        ("1,234,567.89", 1234567.89, 1234567.89),
        ("1'234 and 1\u202f234\u202f567", 1234567, 1234),
        ("1,2345", 2345, 1),
        ("12,34", 34, 12),
        ("6.02e23", 6.02e23, 6.02e23),
        ("1E-3", 1e-3, 1e-3),
        ("-$1,000", -1000, -1000),
        ("$-5 €7", 7, -5),
        ("50%", 50, 50),
        ("答案是42。", 42, 42),
        ("٣٤", 34, 34),
        ("H2O and Q3", None, None),
        ("Q3: 12", 12, 12),
        ("1e999", None, None),
        ("1e999 or 5", 5, 5),
        ("**42**", 42, 42),
        (r"\boxed{-42}", -42, -42),
        ("3 + 4 = 7 eggs.\n#### 7", 7, 7),
        ("First 5 #### 1,042 dollars of 9", 9, 1042),
        ("5 #### none", 5, 5),
        ("#### 3 #### 4", 4, 4),
    ],
)
def test_numbers_in_texts(text, last, first):
    for take, expected in (("last", last), ("first", first)):
        number = read_number(text, take)
        assert (None if number is None else number.value) == expected


def test_long_texts_of_digits_are_read_at_once():
    for text in ("1" * 100_000, "1," * 50_000, "1,111" * 20_000, "-" * 100_000, "1e" * 50_000, "1 " * 50_000):
        read_number(text)


@pytest.mark.parametrize(
    ("reference", "text", "options", "right"),
    [
        ("#### 42", "so it is 42.0", {}, True),
        ("42", "42.001", {}, False),
        ("42", "42.001", {"relative_tolerance": 1e-4}, True),
        ("-42", "42", {}, False),
        ("0", "1e-9", {}, False),
        ("0", "1e-9", {"absolute_tolerance": 1e-6}, True),
        ("1", "no idea", {}, False),
        ("50%", "50", {}, True),
        ("50%", "0.5", {}, True),
        ("0.5", "50 %", {}, True),
        ("50%", "0.5%", {}, False),
        ("7", "7 or 8", {}, False),
        ("7", "7 or 8", {"take": "first"}, True),
    ],
)
def test_numeric(reference, text, options, right):
    assert score("numeric", reference, text, **options) == right


@pytest.mark.parametrize("name", ["numeric", "mae", "spearman"])
def test_a_reference_without_a_number_is_named(name):
    with pytest.raises(UserError, match="needs a number in every reference, and 'seven' has none") as caught:
        score(name, "seven", "7")
    assert caught.value.where == "f:1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        (" null\n", None),
        ('Here:\n```json\n{"a": 1}\n```\nand\n```json\n{"b": 1}\n```', {"a": 1}),
        ("```\n[1]\n```", [1]),
        ("```JSON\r\n[1]\r\n```", [1]),
        ("1" * 5000, float("inf")),  # a number to JSON
        ("", NO_JSON),
        ("{'a': 1}", NO_JSON),
        ('{"a": 1} and more', NO_JSON),
        ("NaN", NO_JSON),
        ("[Infinity]", NO_JSON),
        ("[" * 100_000, NO_JSON),
        ('```json\n{"a": 1}', NO_JSON),  # cut off
        ("```json\n{a: 1}\n```", NO_JSON),
    ],
)
def test_json_in_texts(text, value):
    assert json_in(text) is value if value is NO_JSON else json_in(text) == value
    assert score("json_valid", "", text) == (value is not NO_JSON)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (0, False, False),
        (None, False, False),
        ("1", 1, False),
        ({"a": 1, "b": [1, 2]}, {"b": [1.0, 2], "a": 1}, True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ({"a": None}, {}, False),
        ([], {}, False),
    ],
)
def test_what_is_the_same_to_json(a, b, same):
    assert same_json(a, b) is same
    assert same_json(b, a) is same


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        (None, '{"c": [{"p": 2}], "a": 1.0, "b": {"x": "y"}}', 1),
        (None, '{"a": 1}', 0),
        (["a", "b.x", "c.0.p"], '{"a": 1, "b": {"x": "z"}, "c": [{"p": 2}]}', 2 / 3),
        (["a", "gone"], '{"a": 1}', 1),  # neither has it
        (["a", "gone"], '{"a": 1, "gone": null}', 1 / 2),
        (["a", "c.1.p"], '{"a": 1, "c": [1]}', 1),
        (["a"], "no JSON", 0),
        (["a"], "[1]", 0),
    ],
)
def test_json_match(fields, text, expected):
    reference = '{"a": 1, "b": {"x": "y"}, "c": [{"p": 2}]}'
    assert score("json_match", reference, text, fields=fields) == pytest.approx(expected)


def test_a_key_with_a_dot_is_a_field_too():
    assert score("json_match", '{"a.b": 1}', '{"a.b": 1}', fields=["a.b"]) == 1
    assert score("json_match", '{"a.b": 1}', '{"a.b": 2}', fields=["a.b"]) == 0


def test_a_reference_that_is_no_json_is_named():
    with pytest.raises(UserError, match="json_match needs JSON in every reference") as caught:
        score("json_match", "{a}", "{}")
    assert caught.value.where == "f:1"
