"""Scores equal to those of the libraries that the field reads: sacrebleu, rouge-score, scikit-learn, scipy."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from mtft.common.errors import UserError
from mtft.evaluation.metrics import METRICS, Answer

TRUTHS = (
    "The dog bit the man, didn't it?",
    "It wasn't surprising at all.",
    "The man had just bitten him (hard).",
    "Ein Satz mit Umlauten: äöü ß — und 3,5 Prozent.",
    "数学 は 楽しい です 。",
    "short",
)
GUESSES = (
    "The dog had bit the man.",
    "It was not surprising at all, was it?",
    "",
    "Ein Satz mit Umlauten: aou ss - und 3.5 Prozent!",
    "数学 は 難しい です 。",
    "short and then a lot more than what was asked for",
)


def answers(truths, guesses):
    return [Answer(str(n), "", truth, (guess,), {}, f"f:{n}") for n, (truth, guess) in enumerate(zip(truths, guesses))]


def score(metric, truths, guesses):
    return metric.aggregate.value(metric.statistics(answers(truths, guesses)))


def corpora():
    """Small corpora of words of one letter each: matches of every length, empty texts, short ones, all and none."""
    random = np.random.default_rng(0)
    yield TRUTHS, GUESSES
    yield TRUTHS, TRUTHS
    yield TRUTHS, GUESSES[::-1]
    for letters in (2, 4, 9):
        for most in (3, 6, 12):
            lengths = random.integers(0, most, size=(8, 2))
            texts = [[" ".join(random.choice(list("abcdefgh,.")[:letters], size=n)) for n in pair] for pair in lengths]
            yield tuple(zip(*texts, strict=True))


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "zh", "none"])
def test_bleu(tokenize):
    for truths, guesses in corpora():
        ours = score(METRICS["bleu"](tokenize=tokenize), truths, guesses)
        assert ours == pytest.approx(sacrebleu.corpus_bleu(guesses, [truths], tokenize=tokenize).score, abs=1e-9)


@pytest.mark.parametrize("word_order", [0, 1, 2])
def test_chrf(word_order):
    for truths, guesses in corpora():
        ours = score(METRICS["chrf"](word_order=word_order), truths, guesses)
        assert ours == pytest.approx(sacrebleu.corpus_chrf(guesses, [truths], word_order=word_order).score, abs=1e-9)


def test_corpus_scores_are_no_means_of_rows():
    """What the statistics by row are for."""
    for name in ("bleu", "chrf"):
        metric = METRICS[name]()
        stats = metric.statistics(answers(TRUTHS, GUESSES))
        rows = [metric.aggregate.value(stats[[n]]) for n in range(len(stats))]
        assert abs(np.mean(rows) - metric.aggregate.value(stats)) > 0.1


@pytest.mark.parametrize("use_stemmer", [False, True])
@pytest.mark.parametrize(("name", "theirs"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge(name, theirs, use_stemmer):
    scorer = RougeScorer([theirs], use_stemmer=use_stemmer)
    expected = np.mean([scorer.score(truth, guess)[theirs].fmeasure for truth, guess in zip(TRUTHS, GUESSES)])
    assert score(METRICS[name](use_stemmer=use_stemmer), TRUTHS, GUESSES) == pytest.approx(expected, abs=1e-12)


def test_rouge_refuses_what_it_would_score_0_whatever_is_answered():
    with pytest.raises(UserError, match="no reference has one") as caught:
        METRICS["rouge_l"]().statistics(answers(["数学"], ["数学"]))
    assert caught.value.where == "f:0"


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_labels(labels):
    random = np.random.default_rng(labels)
    accuracy, macro = METRICS["label_accuracy"](), METRICS["label_macro_f1"]()
    for rows in (1, 2, 5, 60):
        truth, guess = random.integers(0, labels, size=(2, rows))
        expected = f1_score(truth, guess, average="macro", zero_division=0)
        assert macro.aggregate.value(macro.label_statistics(truth, guess)) == pytest.approx(expected, abs=1e-12)
        expected = accuracy_score(truth, guess)
        assert accuracy.aggregate.value(accuracy.label_statistics(truth, guess)) == pytest.approx(expected, abs=1e-12)


def test_numbers():
    random = np.random.default_rng(2)
    for rows in (3, 10, 100):
        truth, guess = random.integers(-9, 10, size=(2, rows)) / 4
        texts = [str(x) for x in truth], [f"about {x} or so" for x in guess]
        expected = spearmanr(truth, guess).statistic
        assert score(METRICS["spearman"](), *texts) == pytest.approx(expected, abs=1e-12)
        expected = mean_absolute_error(truth, guess)
        assert score(METRICS["mae"](), *texts) == pytest.approx(expected, abs=1e-12)


def test_an_answer_without_a_number_is_no_information():
    """It counts as the mean of the references, 5: errors 1, 2, 0, where the answers are 3, none and 10."""
    truths, guesses = ("2", "3", "10"), ("3", "who knows", "10")
    assert score(METRICS["mae"](), truths, guesses) == pytest.approx((1 + 2 + 0) / 3)
    assert score(METRICS["spearman"](), truths, guesses) == pytest.approx(spearmanr([2, 3, 10], [3, 5, 10]).statistic)
    assert score(METRICS["spearman"](), truths, ("no", "no", "no")) == 0
    assert score(METRICS["spearman"](), ("1", "1"), ("1", "2")) == 0
