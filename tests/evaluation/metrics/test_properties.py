"""What every metric of answers keeps to, whatever it measures."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from mtft.common.aggregates import AGGREGATES
from mtft.evaluation.metrics import METRICS, Answer, LabelMetric
from mtft.evaluation.metrics.python_metric import PythonMetric
from mtft.recipe.schema.metric import lower_is_better

# A metric's options, and references that it can be measured on, all different.
WORDS = ("the quick brown fox jumps over it", "a lazy dog sleeps in the sun all day", "7 words are here, and one: x.")
NUMBERS = ("3", "the sum is 1,200.5 euros", "-4e2")
OBJECTS = ('{"a": 1, "b": [true, null]}', '```json\n{"a": "x"}\n```', '{"b": {"c": 2}, "a": 0.5}')
CALLS = ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "[g(y='z')]", "no call at all")
EXISTS = [sys.executable, "-c", "import sys; open(sys.argv[1])", "{answer}"]
CASES = {
    "text_match": ({}, WORDS),
    "text_match-all": ({"ignore_case": True, "ignore_punctuation": True, "ignore_whitespace": True}, WORDS),
    "contains": ({}, WORDS),
    "regex": ({"pattern": r"\w"}, WORDS),
    "regex-group": ({"pattern": r"(\w+)\W*$", "take": "last"}, WORDS),
    "numeric": ({}, NUMBERS),
    "f1": ({}, WORDS),
    "rouge_l": ({}, WORDS),
    "rouge_1": ({"use_stemmer": True}, WORDS),
    "rouge_2": ({}, WORDS),
    "chrf": ({}, WORDS),
    "chrf-words": ({"word_order": 2}, WORDS),
    "bleu": ({}, WORDS),
    "bleu-characters": ({"tokenize": "char"}, WORDS),
    "json_valid": ({}, OBJECTS),
    "json_match": ({}, OBJECTS),
    "json_match-fields": ({"fields": ["a", "b.c"]}, OBJECTS),
    "tool_call_match": ({}, CALLS),
    "mae": ({}, NUMBERS),
    "spearman": ({}, NUMBERS),
    "pass_at_k": ({"command": EXISTS}, WORDS),
}
PYTHON = "def same(prompt, reference, answer, row):\n    return answer == reference\n"
cases = pytest.mark.parametrize("case", [*CASES, "python"])


def answers(references, texts):
    return [
        Answer(str(n), f"prompt {n}", reference, (text,), {"n": n}, f"rows.jsonl:{n + 1}")
        for n, (reference, text) in enumerate(zip(references, texts, strict=True))
    ]


@pytest.fixture
def make(tmp_path):
    def made(case):
        if case == "python":
            (tmp_path / "mine.py").write_text(PYTHON)
            return PythonMetric(f"{tmp_path}/mine.py:same"), WORDS
        options, references = CASES[case]
        return METRICS[case.partition("-")[0]](**options), references

    return made


def test_no_metric_of_answers_is_left_out():
    of_answers = {name for name, kind in METRICS.items() if kind.NEEDS == "generation"}
    assert of_answers == {case.partition("-")[0] for case in CASES}
    assert {name for name, kind in METRICS.items() if kind.NEEDS == "forward"} == {
        "loss",
        "token_accuracy",
        "exact_match",
    }
    assert all(issubclass(kind, LabelMetric) for kind in METRICS.values() if kind.NEEDS == "labels")


@cases
def test_the_reference_itself_is_the_best_answer(make, case):
    metric, references = make(case)
    aggregate = metric.aggregate
    best = aggregate.bounds[1] if aggregate.higher_is_better else aggregate.bounds[0]
    score = aggregate.value(metric.statistics(answers(references, references)))
    assert score == pytest.approx(1.0 if best is None else best, abs=1e-9)


@cases
def test_rows_are_measured_one_by_one(make, case):
    metric, references = make(case)
    rows = answers(references * 2, [*references, "nothing of it", "", "12 the x"])
    together = metric.statistics(rows)
    assert together.shape == (6, metric.aggregate.width)
    assert together.dtype == np.float64
    apart = np.concatenate([metric.statistics(rows[:1]), metric.statistics(rows[1:4]), metric.statistics(rows[4:])])
    assert together.tolist() == apart.tolist()
    assert metric.statistics([]).shape == (0, metric.aggregate.width)


def unicode_texts(count, seed):
    """Texts of all scripts, digits, signs, spaces, JSON's and Python's punctuation; every tenth is empty."""
    random = np.random.default_rng(seed)
    alphabets = [
        range(0x20, 0x7F),
        range(0xA0, 0x17F),
        range(0x370, 0x3FF),
        range(0x600, 0x6FF),
        range(0x4E00, 0x4E40),
        range(0x1F600, 0x1F640),
        range(0x300, 0x320),
        [ord(sign) for sign in '{}[]":,#`()<>=|\n\t 0123456789.-%eE'],
    ]
    texts = []
    for number in range(count):
        kinds = random.integers(0, len(alphabets), size=0 if number % 10 == 0 else random.integers(1, 60))
        texts.append("".join(chr(alphabets[kind][random.integers(0, len(alphabets[kind]))]) for kind in kinds))
    return texts


@cases
def test_no_answer_leaves_the_bounds(make, case):
    metric, references = make(case)
    count = 12 if case in ("pass_at_k",) else 200
    rows = answers((references * count)[:count], unicode_texts(count, seed=5))
    stats = metric.statistics(rows)
    assert np.isfinite(stats).all()
    json.dumps(stats.tolist(), allow_nan=False)
    low, high = metric.aggregate.bounds
    for size in (1, 2, 7, count):
        score = metric.aggregate.value(stats[:size])
        assert math.isfinite(score)
        assert low is None or score >= low
        assert high is None or score <= high


PICKY = ("numeric", "mae", "spearman", "json_match", "pass_at_k")  # the last: too slow for so many


@pytest.mark.parametrize("case", [case for case in [*CASES, "python"] if not case.startswith(PICKY)])
def test_any_text_may_be_a_reference_of_those_that_read_none(make, case):
    metric, _ = make(case)
    texts = unicode_texts(200, seed=6)
    score = metric.aggregate.value(metric.statistics(answers(texts, texts[::-1])))
    assert math.isfinite(score)


@pytest.mark.parametrize("name", AGGREGATES)
def test_resamples_are_scored_as_samples(name):
    aggregate = AGGREGATES[name]
    random = np.random.default_rng(3)
    stats = random.integers(0, 6, size=(23, aggregate.width)).astype(float)
    if name.startswith("token"):
        stats[:, 1] += 1
    if name in ("mae", "spearman"):
        stats[:, 2] = random.integers(0, 2, size=23)
    if name == "bleu":
        stats[:, 6:] += stats[:, 2:6]
    if name.startswith("chrf"):
        stats[:, 2::3] = np.minimum(stats[:, ::3], stats[:, 1::3])
    rows = np.concatenate([random.integers(0, 23, size=(50, 23)), np.zeros((1, 23), dtype=np.int64)])
    loop = np.array([aggregate.value(stats[row]) for row in rows])
    np.testing.assert_allclose(aggregate.resampled(stats, rows), loop, rtol=1e-12, atol=1e-12)
    assert np.isfinite(loop).all()
    assert aggregate.value(stats) not in loop[-1:]  # the last resample is one row again and again


def test_which_way_is_better_is_said_once():
    """The report knows it from the recipe, where metrics can't be imported."""
    for name, kind in METRICS.items():
        assert lower_is_better(name) == (not AGGREGATES[kind.AGGREGATE].higher_is_better), name
