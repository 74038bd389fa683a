"""Likelihood of labels against a computation written out, one prompt and one label at a time."""

import json

import numpy as np
import pytest
import torch

from mtft.common.errors import UserError
from mtft.data.store.token_store import open_store
from mtft.evaluation.evaluate_model import answer_model
from mtft.evaluation.heldout_loss import BatchLayout
from mtft.evaluation.label_likelihood import label_log_probs, label_tokens
from mtft.evaluation.prompts import held_out_prompts
from mtft.evaluation.questions import AskedMetrics, Questions, check_questions
from mtft.losses.token_scores import token_scores
from mtft.models.loading import load_base, load_tokenizer
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from tests.training.conftest import write_model

LABELS = ["yes", "no idea", "no"]
LAYOUT = BatchLayout(micro_batch_tokens=256, max_length=128, pad_id=0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(model, tokenizer, recipe of given metrics, store)."""
    folder = tmp_path_factory.mktemp("labels")
    path = str(write_model(folder / "model"))
    rows = [{"prompt": f"is {i} odd" * (1 + i % 3), "response": LABELS[i % 3]} for i in range(9)]
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "odd.jsonl")

    def recipe(*metrics, **task):
        return Recipe.model_validate({
            "name": "odd", "model": {"path": path, "dtype": "fp32"}, "train": {"steps": 1}, "output": {"dir": "o"},
            "tasks": [{"name": "odd", "data": data, "eval_data": data, "metrics": list(metrics), **task}],
        })  # fmt: skip

    section = ModelSection(path=path, dtype="fp32")
    tokenizer = load_tokenizer(section)
    torch.manual_seed(1)
    model = load_base(section)
    with torch.no_grad():  # else every label is as likely as its length says
        model.lm_head.weight.mul_(20)
    store = open_store(recipe("loss").tasks[0], "eval", tokenizer, max_length=128, cache_dir=folder / "cache")
    return model.eval(), tokenizer, recipe, store


def written_out(model, prompt, label):
    """log p of the tokens of a label, one forward pass."""
    ids = torch.tensor([[*prompt, *label]])
    with torch.no_grad():
        log_p_TV = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log_p_TV[len(prompt) + t - 1, token]) for t, token in enumerate(label))


@pytest.mark.parametrize("normalise", ["none", "length"])
def test_the_most_likely_label_written_out(parts, normalise):
    model, tokenizer, recipe, store = parts
    metrics = [{"name": name, "normalise": normalise} for name in ("label_accuracy", "label_macro_f1")]
    asked = AskedMetrics.of(recipe(*metrics), tokenizer)
    (found, answers) = answer_model(model, [store], LAYOUT, asked)["odd"]
    labels, prompts = sorted(LABELS), held_out_prompts(store)
    # byte-level, and the answer begins with the space that stands in front of it
    tokens = [
        [*tokenizer(f" {label}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for label in labels
    ]
    assert all(prompt.reference.tolist() in tokens for prompt in prompts)
    expected_NL = np.array(
        [[written_out(model, prompt.prompt.tolist(), label) for label in tokens] for prompt in prompts]
    )
    arrays = [np.array(label, dtype=np.int32) for label in tokens]
    found_NL = label_log_probs(lambda batch: token_scores(model, batch), "odd", prompts, arrays, LAYOUT)
    np.testing.assert_allclose(found_NL, expected_NL, rtol=1e-5)
    if normalise == "length":
        expected_NL = expected_NL / np.array([len(label) for label in labels])
    truth_N, chosen_N = np.array([labels.index(LABELS[i % 3]) for i in range(9)]), expected_NL.argmax(axis=1)
    assert found["label_accuracy"].stats_NS[:, 0].tolist() == (truth_N == chosen_N).astype(float).tolist()
    assert found["label_macro_f1"].stats_NS.tolist() == np.stack([truth_N, chosen_N], axis=1).tolist()
    assert not answers


def test_a_label_that_no_row_has_is_spelled_as_the_others_are(parts):
    _, tokenizer, recipe, store = parts
    asked = AskedMetrics.of(recipe({"name": "label_accuracy", "labels": [*LABELS, "perhaps"]}), tokenizer)
    questions = Questions.of(store, asked)
    tokens = label_tokens([*LABELS, "perhaps"], questions.prompts, questions.references, tokenizer, "odd")
    expected = tokenizer(" perhaps", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert tokens[3].tolist() == expected


def test_references_that_can_not_be_scored_are_refused_without_a_model(parts):
    _, tokenizer, recipe, store = parts
    two = {"name": "label_accuracy", "labels": ["yes", "no"]}
    with pytest.raises(UserError, match="none of the labels"):
        check_questions([store], AskedMetrics.of(recipe(two), tokenizer))
    with pytest.raises(UserError, match="number"):
        check_questions([store], AskedMetrics.of(recipe("mae"), tokenizer))
    with pytest.raises(UserError, match="temperature"):
        AskedMetrics.of(recipe({"name": "pass_at_k", "command": ["cat", "{answer}"], "samples": 4}), tokenizer)


def test_plain_text_has_no_prompt_to_answer(parts, tmp_path):
    _, tokenizer, recipe, _ = parts
    (tmp_path / "text.jsonl").write_text('{"text": "all of it is learnt"}\n')
    text = recipe("f1", format="text", data=str(tmp_path / "text.jsonl"), eval_data=str(tmp_path / "text.jsonl"))
    store = open_store(text.tasks[0], "eval", tokenizer, max_length=128, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="no prompt to answer"):
        check_questions([store], AskedMetrics.of(text, tokenizer))
