"""A conversation that a template turns into several examples is one row: scored once, and never on both sides."""

import json

import numpy as np
import pytest
import torch

from mtft.data.store.token_store import open_store
from mtft.evaluation.heldout_loss import BatchLayout, score_tasks, sum_by_row
from mtft.pipeline.stages.adapter_evaluator import RowSubset, split_rows
from mtft.recipe.schema.task import TaskSection
from tests.data.tokenize.stock import stock


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """12 conversations of one to three turns; Qwen3's template makes an example of each turn."""
    folder = tmp_path_factory.mktemp("rows")
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer"}]
    rows = [{"id": f"talk-{i}", "messages": turns * (1 + i % 3)} for i in range(12)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskSection(name="talk", data=str(folder / "talk.jsonl"))
    return open_store(task, "train", stock("qwen3"), max_length=500, cache_dir=folder / "cache")


def score(batch):
    return torch.ones(batch.labels_BT.shape), torch.zeros(batch.labels_BT.shape, dtype=torch.bool)


def test_scores_are_those_of_conversations(store):
    assert len(store) == 24
    found = score_tasks(score, [store], BatchLayout(2000, 500, 0))["talk"]
    assert list(found.ids) == [f"talk-{i}" for i in range(12)]
    assert found.summary()["examples"] == 12
    of_row = [int(store.supervised[store.row_numbers == row].sum()) for row in range(12)]
    assert found.tokens_N.tolist() == of_row
    assert found.nll_N.tolist() == of_row


def test_the_other_half_of_a_conversation_is_never_seen(store):
    parts = {name: RowSubset(store, rows) for name, rows in split_rows(12, 4).items()}
    talks = {name: {i.split("#")[0] for i in part.ids} for name, part in parts.items()}
    assert [len(part) for part in talks.values()] == [4, 4, 4]
    assert not talks["choose"] & talks["rest"]
    assert sum(part.num_examples for part in parts.values()) == 24
    for name, part in parts.items():
        found = score_tasks(score, [part], BatchLayout(2000, 500, 0))["talk"]
        assert list(found.ids) == part.row_ids
        assert set(found.ids) == talks[name]
        assert [part.lengths[i] for i in range(part.num_examples)] == [
            len(part.example(i).input_ids) for i in range(part.num_examples)
        ]


def test_sums_of_rows():
    sums = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(sum_by_row(sums, np.array([0, 0, 2, 7])), [[1, 2, 3], [9, 6, 7], [17, 10, 11]])
    assert sum_by_row(np.zeros((3, 0)), np.zeros(0, dtype=int)).shape == (3, 0)
