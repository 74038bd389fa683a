"""Labels of a task: which they are, and which the model finds most likely."""

from __future__ import annotations

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.evaluation.metrics import METRICS


def places(count):
    return [f"rows.jsonl:{n + 1}" for n in range(count)]


@pytest.mark.parametrize("name", ["label_accuracy", "label_macro_f1"])
def test_labels_are_the_options_or_the_references(name):
    kind = METRICS[name]
    assert kind().names(["yes", "no", "yes"], places(3)) == ("no", "yes")
    assert kind(labels=["yes", "no", "maybe"]).names(["yes", "no"], places(2)) == ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("labels", "references", "what", "where"),
    [
        (["yes", "no"], ["no", "yess"], "'yess' is none of the labels: did you mean 'yes'", "rows.jsonl:2"),
        (None, ["no", "no"], "all held-out rows have one label", "rows.jsonl:1"),
        (None, ["no", ""], "an empty reference is no label", "rows.jsonl:2"),
    ],
)
def test_references_that_are_no_labels_are_named(labels, references, what, where):
    with pytest.raises(UserError, match=what) as caught:
        METRICS["label_accuracy"](labels=labels).names(references, places(2))
    assert caught.value.where == where


def test_the_most_likely_label_is_chosen():
    log_p = np.array([[-4.0, -6.0], [-4.0, -9.0], [-3.0, -3.0]])
    assert METRICS["label_accuracy"]().chosen(log_p, ("no", "maybe")).tolist() == [0, 0, 0]
    # by character: -2 against -1.2, -2 against -1.8, -1.5 against -0.6
    assert METRICS["label_accuracy"](normalise="length").chosen(log_p, ("no", "maybe")).tolist() == [1, 1, 1]


def test_statistics_by_hand():
    reference, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    accuracy, macro = METRICS["label_accuracy"](), METRICS["label_macro_f1"]()
    assert accuracy.aggregate.value(accuracy.label_statistics(reference, predicted)) == 0.5
    # label 0: 2 * 1 / (2 + 1); label 1: 2 * 1 / (1 + 3); label 2: 0
    expected = (2 / 3 + 1 / 2 + 0) / 3
    assert macro.aggregate.value(macro.label_statistics(reference, predicted)) == pytest.approx(expected)
