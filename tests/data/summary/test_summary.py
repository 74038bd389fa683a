"""What `mtft check` says is what training will do."""

import json

import pytest

from data_mixers.common.errors import MixError
from mtft.common.errors import UserError
from mtft.data.batching.batches import BatchSource
from mtft.data.planning import make_plan
from mtft.data.store.token_store import open_stores
from mtft.data.summary.render_console import summary_text
from mtft.data.summary.summarize import summarize_data
from mtft.recipe.schema.recipe import Recipe
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl


def recipe(tmp_path, *, tasks=None, shares=None, **train):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the quick fox", "response": "the lazy dog"}] * 60)
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "brown " * 20, "response": "forest"}] * 20)
    return Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": tasks
            or [
                {"name": "a", "data": str(tmp_path / "a.jsonl"), "eval_data": str(tmp_path / "b.jsonl")},
                {"name": "b", "data": str(tmp_path / "b.jsonl"), "weight": 3.0},
            ],
            "mixture": {"shares": shares or {"a": 0.6, "b": 0.4}},
            "train": {"steps": 5, "batch_tokens": 512, "micro_batch_tokens": 256, "max_length": 128} | train,
            "output": {"dir": str(tmp_path / "run")},
        }
    )


@pytest.fixture
def made():
    return tokenizer(TEMPLATES["chatml"])


def test_numbers_are_those_of_the_run(tmp_path, made):
    asked = recipe(tmp_path)
    found = summarize_data(asked, made, cache_dir=tmp_path)
    stores = open_stores(asked, made, "train", cache_dir=tmp_path)
    plan = make_plan(asked, stores)
    source = BatchSource(stores, plan, micro_batch_tokens=256, max_length=128, packing=True, pad_id=0)
    batches = [batch for s in range(5) for batch in source[s]]
    tokens_K = [sum(int((b.task_ids_BT == k).sum()) for b in batches) for k in range(2)]
    learnt_K = [sum(int(((b.task_ids_BT == k) & (b.labels_BT >= 0)).sum()) for b in batches) for k in range(2)]
    for k, task in enumerate(found.tasks):
        assert task.tokens_per_step * 5 == pytest.approx(tokens_K[k])  # all rows of a toy task are equal
        assert task.token_share == pytest.approx(tokens_K[k] / sum(tokens_K))
        assert task.supervised_share == pytest.approx(learnt_K[k] / sum(learnt_K))
        assert task.prompt_tokens + task.supervised_tokens == task.tokens == stores[k].lengths.sum()
    positions = sum(b.input_ids_BT.numel() for b in batches)
    assert found.padding_share == pytest.approx(1 - sum(tokens_K) / positions)
    assert found.micro_batches_per_step == pytest.approx(len(batches) / 5)
    a, b = found.tasks
    assert (a.asked_share, b.asked_share, b.weight) == (0.6, 0.4, 3.0)
    assert b.effective_weight == pytest.approx(3 * b.realised_share)
    assert (a.eval_examples, b.eval_examples) == (20, None)
    assert a.epochs == pytest.approx(a.examples_per_step * 5 / 60)
    assert ("the lazy dog<|im_end|>", True) in a.sample


def test_json_and_text(tmp_path, made):
    found = summarize_data(recipe(tmp_path), made, cache_dir=tmp_path)
    assert json.loads(json.dumps(found.as_dict()))["tasks"][1]["name"] == "b"
    text = summary_text(found)
    assert "⟦the lazy dog<|im_end|>⟧" in text
    assert "toy: data" in text
    assert f"{found.padding_share:.1%} padding" in text


@pytest.mark.parametrize(
    "options, warning",
    [
        ({"steps": 500}, "every row is seen"),
        ({"max_length": 20}, "are cut at 20"),
        ({"packing": False, "micro_batch_tokens": 4096}, "positions are padding: set train.packing: true"),
        ({"batch_tokens": 60, "steps": 20}, "absent from"),
    ],
)
def test_warnings(tmp_path, made, options, warning):
    found = summarize_data(recipe(tmp_path, **options), made, cache_dir=tmp_path)
    assert any(warning in line for line in found.warnings), found.warnings


def test_default_template_is_a_warning(tmp_path):
    found = summarize_data(recipe(tmp_path), tokenizer(), cache_dir=tmp_path)
    assert any("no chat template" in line for line in found.warnings)


def test_what_training_refuses_is_refused(tmp_path, made):
    tasks = [{"name": "a", "data": str(tmp_path / "a.jsonl"), "max_epochs": 1}]
    with pytest.raises(MixError, match="epoch"):
        summarize_data(recipe(tmp_path, tasks=tasks, shares={"a": 1.0}, steps=100), made, cache_dir=tmp_path)
    with pytest.raises(UserError, match="nothing to learn"):
        summarize_data(recipe(tmp_path, max_length=20, too_long="truncate_right"), made, cache_dir=tmp_path)


def test_held_out_rows_that_are_trained_on(tmp_path, made):
    found = summarize_data(recipe(tmp_path), made, cache_dir=tmp_path)  # a is evaluated on the training rows of b
    assert "a: 1 of 1 held-out examples are among the training rows of b" in found.warnings
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "the quick fox", "response": "the lazy fox"}])
    tasks = [{"name": "a", "data": str(tmp_path / "a.jsonl"), "eval_data": str(tmp_path / "c.jsonl")}]
    found = summarize_data(recipe(tmp_path, tasks=tasks, shares={"a": 1.0}), made, cache_dir=tmp_path)
    assert not any("held-out" in line for line in found.warnings)


def test_one_row_of_each_template_is_shown(tmp_path, made):
    names = ("{{ prompt }}", "Q: {{ prompt }}", "{{ prompt }} A:")
    tasks = [
        {"name": "a", "data": str(tmp_path / "a.jsonl"), "template": names, "auxiliary": True},
        {"name": "b", "data": str(tmp_path / "b.jsonl")},
    ]
    found = summarize_data(recipe(tmp_path, tasks=tasks), made, cache_dir=tmp_path)
    a, b = found.tasks
    texts = ["".join(part for part, _ in parts) for parts in a.templates]
    for text, asked in zip(texts, ("the quick fox<", "Q: the quick fox<", "the quick fox A:<"), strict=True):
        assert f"user\n{asked}" in text
    assert b.templates == ()
    shown = summary_text(found)
    assert all(f"a, template {k} of 3" in shown for k in (1, 2, 3))
    assert json.loads(json.dumps(found.as_dict()))["tasks"][0]["templates"]
