"""`fuse score` on the files that training takes, and each model's own log-probability beside the fused one."""

import json
import math

import pytest
import torch

from mtft.data.formats.messages import Conversation
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import encode
from mtft.fuse.batch import jsonl_commands
from mtft.fuse.from_recipe import load_fusion
from tests.fuse import pairs, tiny
from tests.fuse.batch.test_jsonl_commands import read, recipe_of, write

USER, ANSWER = {"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "over the dog"}
CHAT = [USER, {"role": "assistant", "content": "lazy"}, USER, ANSWER]


@pytest.fixture(scope="module", params=["no template", "template"])
def fused(request, tmp_path_factory):
    places = tiny.folders_with_text(tmp_path_factory.mktemp("score"))
    if request.param == "template":
        for side in ("strong", "small"):
            text = tiny.tokenizer()
            text.chat_template = pairs.STRONG_TEMPLATE.replace("<end_of_turn>", "</s>")
            text.save_pretrained(places[side])
    model = load_fusion(recipe_of(places, tmp_path_factory.mktemp("out")))
    model.places = places
    return model


@pytest.fixture
def score(fused, tmp_path):
    def run(rows):
        recipe = recipe_of(fused.places, tmp_path)
        source = write(tmp_path / "x.jsonl", rows)
        jsonl_commands.score(recipe, source, tmp_path / "y.jsonl", fused=fused, overwrite=True)
        return read(tmp_path / "y.jsonl")

    return run


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": CHAT}, CHAT),
        ({"instruction": USER["content"], "output": ANSWER["content"]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "the quick fox"}, {"from": "gpt", "value": "over the dog"}]},
            [USER, ANSWER],
        ),
    ],
    ids=["messages", "several turns", "alpaca", "sharegpt"],
)
def test_rows_of_training_are_scored_on_what_training_learns(fused, score, row, turns):
    rendered = ChatRenderer(fused.tokenizer).render(Conversation(tuple(turns)))[-1]
    example = encode(fused.tokenizer, [rendered])[0]
    ids = torch.tensor([example.input_ids.tolist()])
    last = rendered.spans[-1]
    learnt = fused.tokenizer.encode(rendered.text[slice(*last)], add_special_tokens=False)
    found = score([row])[0]
    expected = fused.score(ids).logprob_BL[0, example.supervised.nonzero()[0][-len(learnt) :]]
    assert found["tokens"] == len(learnt)
    assert found["logprob"] == pytest.approx(float(expected.sum()), abs=1e-4)


def test_each_model_beside_the_fused_one(fused, score):
    rows = [{"prompt": "the quick", "response": " brown fox"}, {"prompt": "a", "response": "b" * 9}]
    for row, found in zip(rows, score(rows), strict=True):
        before = fused.tokenizer.encode(row["prompt"])
        ids = torch.tensor([before + fused.tokenizer.encode(row["response"], add_special_tokens=False)])
        fused.weak.layout.set((0, -1), 1)
        with torch.no_grad():
            weak = fused.weak.model(ids.repeat(2, 1)).logits[..., :300].log_softmax(-1)
            strong = fused.strong(ids).logits[..., :300].log_softmax(-1)
        at = range(len(before), ids.shape[1])
        sums = [sum(float(x[t - 1, ids[0, t]]) for t in at) for x in (strong[0], weak[1], weak[0])]
        keys = [found["strong_logprob"], found["base_logprob"], *found["expert_logprobs"]]
        assert keys == pytest.approx(sums, abs=1e-4)
        assert found["small_tokens"] == found["tokens"]
        assert 0 <= found["clipped_share"] <= 1


def test_clipped_tokens_are_counted(fused, tmp_path):
    recipe = recipe_of(fused.places, tmp_path, alpha_max=0.001)
    source = write(tmp_path / "x.jsonl", [{"prompt": "the quick", "response": " brown fox"}])
    jsonl_commands.score(recipe, source, tmp_path / "y.jsonl")
    assert read(tmp_path / "y.jsonl")[0]["clipped_share"] == 1


def test_what_is_no_row_to_score(score):
    rows = [
        {"messages": [USER]},
        {"messages": [USER, ANSWER, USER]},
        {"prompt": "a"},
        {"messages": [ANSWER]},
        {"messages": [USER, {"role": "assistant"}]},
        {"messages": 5},
    ]
    answers = score(rows)
    assert all("error" in answer for answer in answers), answers
    assert all("response is missing" in answer["error"] for answer in answers[:3])


def test_columns_that_are_not_read_are_named_once(score, fused):
    rows = [{"messages": [USER, ANSWER], "source": "x", "date": 3}] * 3
    with pytest.warns(UserWarning, match=r"not read: source \(3 rows\), date \(3 rows\)"):
        answers = score(rows)
    assert all(math.isfinite(answer["logprob"]) for answer in answers)
    assert "did you mean 'response'" in score([{"prompt": "a", "respons": "b"}])[0]["error"]


def test_an_answer_with_a_token_that_the_small_models_lack(tmp_path):
    """`prefix`: extra ids of the strong tokenizer are scored by it alone; what the others say is null."""
    places = tiny.folders_with_text(tmp_path)
    text = tiny.tokenizer()
    text.add_tokens(["<tool>"])
    text.save_pretrained(places["strong"])
    recipe = recipe_of(places, tmp_path, tokens="prefix")
    source = write(tmp_path / "x.jsonl", [{"prompt": "a", "response": "b<tool>"}])
    jsonl_commands.score(recipe, source, tmp_path / "y.jsonl")
    found = json.loads((tmp_path / "y.jsonl").read_text())
    assert (found["base_logprob"], found["expert_logprobs"]) == (None, [None])
    assert math.isfinite(found["logprob"])
