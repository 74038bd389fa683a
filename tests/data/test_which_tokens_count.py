"""Weights of turns, thoughts and rows on their way from rows to batches: every character has the weight it should."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.batching.batches import collate
from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import RowError
from mtft.data.store.token_store import TokenStore, open_store, open_stores
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import encode
from mtft.data.tokenize.turn_weights import thought_of
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection
from tests.data.test_cases import CASES
from tests.data.tokenize.stock import STOCK, random_row, stock
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

CHATML = tokenizer(TEMPLATES["chatml"])


def say(role, content, **keys):
    return {"role": role, "content": content, **keys}


def build(folder, rows, made=CHATML, which="train", max_length=400, **keys) -> TokenStore:
    path = write_jsonl(folder / "rows.jsonl", rows)
    task = TaskSection(name="t", data=str(path), eval_data=str(path), **keys)
    policy = {"too_long": keys.pop("too_long")} if "too_long" in keys else {}
    return open_store(task, which, made, max_length=max_length, cache_dir=folder / "cache", **policy)


def parts(made, example) -> list[tuple[str, float]]:
    """[(text, weight)]: the example cut where the weight changes; 0 = not learnt."""
    weights = example.supervised.astype(float) if example.weights is None else example.weights
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [
        (made.decode(example.input_ids[a:b].tolist(), skip_special_tokens=False), float(weights[a]))
        for a, b in itertools.pairwise(borders)
    ]


def learnt(made, example) -> list[tuple[str, float]]:
    return [(text, pytest.approx(weight)) for text, weight in parts(made, example) if weight]


TWO = [say("user", "Q"), say("assistant", "the fox", weight=0.25), say("user", "R"), say("assistant", "dog")]


def test_a_turn_has_its_weight(tmp_path):
    store = build(tmp_path, [{"messages": TWO}, {"messages": TWO[:2]}, {"messages": TWO[2:]}])
    assert learnt(CHATML, store.example(0)) == [("the fox<|im_end|>", 0.25), ("dog<|im_end|>", 1)]
    assert learnt(CHATML, store.example(1)) == [("the fox<|im_end|>", 0.25)]
    assert learnt(CHATML, store.example(2)) == [("dog<|im_end|>", 1)]
    assert store.stats["weighted"] == sum(int((store.example(i).weights == 0.25).sum()) for i in range(3))


@pytest.mark.parametrize("form", ["sharegpt", "chat_rounds", "prompt"])
def test_weights_in_other_formats(tmp_path, form):
    names = {"sharegpt": ("from", "value", "human", "gpt"), "chat_rounds": ("role", "content", "human", "bot")}
    if form == "prompt":
        row = {"prompt": TWO[:3], "response": [TWO[3] | {"weight": 3}]}
        expected = [("the fox<|im_end|>", 0.25), ("dog<|im_end|>", 3)]
    else:
        role, content, user, assistant = names[form]
        turns = [{role: user if m["role"] == "user" else assistant, content: m["content"]} for m in TWO]
        turns[1]["weight"] = 0.25
        row = {"conversations" if form == "sharegpt" else form: turns}
        expected = [("the fox<|im_end|>", 0.25), ("dog<|im_end|>", 1)]
    assert learnt(CHATML, build(tmp_path, [row]).example(0)) == expected


BAD = {
    "-1": -1, "NaN": float("nan"), "Infinity": float("inf"), "1e7": 1e7, "1e-9": 1e-9, '"0.5"': "0.5", "[1]": [1],
    "big": 10**400,
}  # fmt: skip


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_broken_weight_of_a_turn_is_an_error_of_its_row(tmp_path, value):
    rows = [{"messages": TWO}, {"messages": [*TWO[:3], TWO[3] | {"weight": value}]}]
    with pytest.raises(UserError, match=r"rows.jsonl:2.*messages\[3\].weight.*expected a weight") as caught:
        build(tmp_path, rows)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("keys", [{"train": 0.5}, {"loss": 2}, {"weight": 0.5, "train": False}])
def test_turns_that_are_said_two_ways_are_refused(tmp_path, keys):
    with pytest.raises(UserError, match=r"rows.jsonl:1"):
        build(tmp_path, [{"messages": [*TWO[:3], TWO[3] | keys]}])


def test_a_weight_of_the_user_is_refused(tmp_path):
    with pytest.raises(UserError, match="only turns of the assistant"):
        build(tmp_path, [{"messages": [TWO[0] | {"weight": 0.5}, *TWO[1:]]}])
    build(tmp_path, [{"messages": [TWO[0] | {"weight": 0}, *TWO[1:]]}])


def test_loss_on_last(tmp_path):
    late = [*TWO, say("user", "S"), say("assistant", "no", weight=0)]
    history = {"prompt": "Q", "response": "fox", "history": [["A", "the dog"]]}
    store = build(tmp_path, [{"messages": TWO}, {"messages": TWO[:2]}, {"messages": late}], loss_on="last")
    assert learnt(CHATML, store.example(0)) == [("dog<|im_end|>", 1)]
    assert learnt(CHATML, store.example(1)) == [("the fox<|im_end|>", 0.25)]
    assert learnt(CHATML, store.example(2)) == [("dog<|im_end|>", 1)]  # the last that the row lets be learnt
    store = build(tmp_path, [history], loss_on="last")
    assert learnt(CHATML, store.example(0)) == [("fox<|im_end|>", 1)]
    assert "the dog" in CHATML.decode(store.example(0).input_ids)
    held_out = build(tmp_path, [{"messages": TWO}], which="eval", loss_on="last")
    assert learnt(CHATML, held_out.example(0)) == [("dog<|im_end|>", 1)]


@pytest.mark.parametrize("keys", [{"loss_on": "last"}, {"thinking_weight": 0.5}])
def test_plain_text_has_no_turns(tmp_path, keys):
    with pytest.raises(UserError, match="rows of the format text have no turns") as caught:
        build(tmp_path, [{"text": "the fox"}], format="text", **keys)
    assert caught.value.where == f"tasks.t.{next(iter(keys))}"


def test_row_weights(tmp_path):
    pairs = [{"prompt": "Q", "response": "fox", "worth": worth} for worth in (1, 0.5, 0, 2, "1.5")]
    store = build(tmp_path, [*pairs, {"text": "unread", "worth": 0}], row_weight="worth")
    assert [store.example(i).row_weight for i in range(len(store))] == [1, 0.5, 2, 1.5]
    assert store.stats["weighted"] == sum(int(store.example(i).supervised.sum()) for i in (1, 2, 3))
    assert "rows have weight 0 and are not learnt (tasks.*.row_weight) (2 of 6 rows)" in "".join(store.warnings())
    text = build(tmp_path, [{"text": "the fox", "worth": 0.5}], row_weight="worth", format="text")
    assert text.example(0).row_weight == 0.5


BROKEN = {"missing": {}, "null": {"worth": None}, "text": {"worth": "a"}, "true": {"worth": True}, "-1": {"worth": -1}}
BROKEN |= {"nan": {"worth": "nan"}, "1_0": {"worth": "1_0"}, "list": {"worth": [1]}, "blank": {"worth": " "}}


@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_weight_is_an_error_of_its_row(tmp_path, row):
    rows = [{"prompt": "Q", "response": "fox", "worth": 1}, {"prompt": "Q", "response": "fox", **row}]
    with pytest.raises(UserError, match=r"rows.jsonl:2.*worth"):
        build(tmp_path, rows, row_weight="worth")


def test_row_weights_in_every_kind_of_file(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": "Q", "response": "fox", "worth": worth} for worth in (0.5, 1.0, 0.0, 3.0)]
    data = Dataset.from_list(rows)
    data.to_csv(tmp_path / "rows.csv")
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("rows.csv", "rows.parquet", "saved"):
        task = TaskSection(name="t", data=str(tmp_path / name), row_weight="worth")
        store = open_store(task, "train", CHATML, max_length=100, cache_dir=tmp_path / "cache")
        assert [store.example(i).row_weight for i in range(len(store))] == [0.5, 1, 3]


def test_a_weight_column_that_nobody_names_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"tasks.\*.row_weight"):
        build(tmp_path, [{"prompt": "Q", "response": "fox", "weight": 0.5}])


def test_a_task_whose_rows_all_have_weight_zero(tmp_path):
    with pytest.raises(UserError, match="all 2 rows have weight 0") as caught:
        build(tmp_path, [{"prompt": "Q", "response": "fox", "worth": 0}] * 2, row_weight="worth")
    assert caught.value.where == "tasks.t.row_weight"


# what is learnt of it: deepseekv3's prompt opens the thought
THOUGHT = {"qwen3": "<think>\n{}", "deepseekv3": "{}", "gptoss": "<|channel|>analysis<|message|>{}"}


@pytest.mark.parametrize("name", THOUGHT)
@pytest.mark.parametrize("how", ["key", "inline"])
def test_thinking_has_its_weight(tmp_path, name, how):
    made, thought = stock(name), "think a fox analysis"
    answer = say("assistant", "dog")
    answer |= {"reasoning_content": thought} if how == "key" else {"content": f"<think>\n{thought}\n</think>\n\ndog"}
    store = build(tmp_path, [{"messages": [say("user", "Q"), answer]}], made, thinking_weight=0.125)
    (first, light), (rest, full) = (part for part in parts(made, store.example(len(store) - 1)) if part[1])
    assert (light, full) == (0.125, 1)
    assert first == THOUGHT[name].format(thought)
    assert "dog" in rest
    assert "</think>" in rest or name == "gptoss"


def test_thinking_of_no_weight_is_context_and_its_end_is_learnt(tmp_path):
    answer = say("assistant", "<think>fox</think>dog", weight=0.5)
    store = build(tmp_path, [{"messages": [say("user", "Q"), answer]}], thinking_weight=0)
    assert learnt(CHATML, store.example(0)) == [("</think>dog<|im_end|>", 0.5)]
    assert "<think>fox" in CHATML.decode(store.example(0).input_ids)
    doubled = build(tmp_path, [{"messages": [say("user", "Q"), answer]}], thinking_weight=4)
    assert learnt(CHATML, doubled.example(0)) == [("<think>fox", 2), ("</think>dog<|im_end|>", 0.5)]


def test_an_empty_thought_and_none_count_as_the_answer(tmp_path):
    made = stock("qwen3")
    rows = [{"messages": [say("user", "Q"), say("assistant", "dog")]}]
    (text, weight), *_ = (
        part for part in parts(made, build(tmp_path, rows, made, thinking_weight=0).example(0)) if part[1]
    )
    assert weight == 1
    assert text.startswith("<think>\n\n</think>")


def test_the_thought_is_found_behind_its_tag_however_short(tmp_path):
    for name, opening in (("gptoss", "<|channel|>analysis<|message|>"), ("qwen3", "<think>\n")):
        made = stock(name)
        answer = say("assistant", "dog", reasoning_content="n")
        store = build(tmp_path, [{"messages": [say("user", "Q"), answer]}], made, thinking_weight=0.5)
        assert next(part for part in parts(made, store.example(0)) if part[1]) == (f"{opening}n", 0.5)


@pytest.mark.parametrize("name", STOCK)
def test_random_rows_on_stock_templates(name):
    """Each text of a row has its weight: thoughts that of turn and thinking, answers and calls that of the turn."""
    rng, made = random.Random(name), stock(name)
    renderer = ChatRenderer(made, thinking_weight=0.5)
    seen = lost = 0
    for _ in range(60):
        row = random_row(rng)
        for message in row["messages"]:
            if message["role"] == "assistant" and not message.keys() & {"weight", "train"}:
                message["weight"] = rng.choice([1, 0.25, 4, 3])
        try:
            conversation = FORMATS["messages"].read(row)
            rendered = renderer.render(conversation)
        except RowError as error:
            lost += "isn't found" in str(error)
            continue
        for one in rendered:
            weight_of = {} if one.weights else dict.fromkeys(range(len(one.text)), 1.0)
            for start, end, weight in one.weights:
                weight_of |= dict.fromkeys(range(start, end), weight)
            assert not one.weights or sum(b - a for a, b, _ in one.weights) == sum(b - a for a, b in one.spans)
            for index, (start, end) in zip(one.turns, one.spans, strict=True):
                message = conversation.messages[index]
                turn, thought = float(message.get("train", 1)), thought_of(message)
                found = {weight_of[at] for at in range(start, end)}
                assert found == ({turn, turn / 2} if thought else {turn})
                if thought:
                    at = one.text.index(thought, start)
                    assert {weight_of[i] for i in range(start, at + len(thought))} == {turn / 2}
                    assert {weight_of[i] for i in range(at + len(thought), end)} == {turn}
                    seen += 1
        for example, one in zip(encode(made, rendered), rendered, strict=True):
            weighted = example.weights is not None
            assert weighted == any(weight != 1 for _, _, weight in one.weights)
            assert not weighted or ((example.weights > 0) == example.supervised).all()
    assert not lost
    assert seen or name == "qwen3_5_nothink"  # which refuses thoughts


def test_truncation_cuts_the_weights_with_the_tokens(tmp_path):
    rows = [{"messages": [say("user", "Q " * 20), say("assistant", "the fox and the dog", weight=0.5), *TWO]}]
    whole = build(tmp_path, rows).example(0)
    for policy, kept in (("truncate_left", slice(-20, None)), ("truncate_right", slice(0, 60))):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        task = TaskSection(name="t", data=str(path))
        size = 20 if policy == "truncate_left" else 60
        cut = open_store(task, "train", CHATML, max_length=size, too_long=policy, cache_dir=tmp_path / "cache").example(
            0
        )
        expected = whole.weights[kept].copy()
        expected[0] = 0  # the first token is predicted from nothing
        assert np.array_equal(cut.input_ids, whole.input_ids[kept])
        assert np.array_equal(cut.weights, expected)
        assert np.array_equal(cut.supervised, expected > 0)


def test_the_store_holds_weights_only_where_there_are_any(tmp_path):
    plain = [{"messages": TWO[2:]}] * 40
    store = build(tmp_path, plain)
    assert not list(store.path.glob("*weights.bin"))
    assert store.stats["weighted"] == 0
    assert store.example(0).weights is None
    assert store.example(0).row_weight == 1
    late = build(tmp_path, [*plain, {"messages": TWO}, *plain])
    assert (late.path / "weights.bin").stat().st_size == 4 * late.stats["tokens"]
    assert not (late.path / "row_weights.bin").exists()
    for i in (0, 39, 41, 80):
        assert np.array_equal(late.example(i).weights, late.example(i).supervised.astype(np.float32))
    rows = [{**row, "worth": 2 if i == 30 else 1} for i, row in enumerate(plain)]
    worth = build(tmp_path, rows, row_weight="worth")
    assert not (worth.path / "weights.bin").exists()
    assert (worth.path / "row_weights.bin").stat().st_size == 4 * len(worth)
    assert [worth.example(i).row_weight for i in (29, 30, 31)] == [1, 2, 1]


def test_held_out_rows_have_no_weights(tmp_path):
    """Every learnt token counts once there; what is not learnt is not measured."""
    rows = [{"messages": TWO, "worth": 2}, {"messages": TWO, "worth": 0}]
    store = build(tmp_path, rows, which="eval", row_weight="worth")
    assert len(store) == 1
    assert store.example(0).weights is None
    assert store.example(0).row_weight == 1
    assert learnt(CHATML, store.example(0)) == [("the fox<|im_end|>", 1), ("dog<|im_end|>", 1)]


def test_the_fingerprint_moves_with_the_new_keys_only(tmp_path):
    rows = [{"messages": TWO, "worth": 2}]
    plain = build(tmp_path, rows).fingerprint
    others = [build(tmp_path, rows, **keys).fingerprint for keys in (
        {"loss_on": "last"}, {"row_weight": "worth"}, {"thinking_weight": 0.5}, {"thinking_weight": 0.25},
    )]  # fmt: skip
    assert len({plain, *others}) == 5
    assert build(tmp_path, rows, loss_on="all", thinking_weight=1.0).fingerprint == plain


def test_collate_carries_weights_only_where_there_are_any(tmp_path):
    rows = [{"messages": TWO, "worth": 1}, {"messages": TWO[2:], "worth": 1}, {"messages": TWO[2:], "worth": 3}]
    store = build(tmp_path, rows, row_weight="worth")
    one, two, three = (store.example(i) for i in range(3))
    plain = collate([[(replace(two, weights=None), 0)]], 0)
    assert plain.token_weights_BT is None
    assert plain.row_weights_BT is None
    batch = collate([[(one, 0), (three, 1)], [(replace(two, weights=None), 0)]], 0)
    first, second = len(one.input_ids), len(three.input_ids)
    assert batch.token_weights_BT[0, : first - 1].tolist() == one.weights[1:].tolist()
    assert batch.token_weights_BT[0, first : first + second - 1].tolist() == three.weights[1:].tolist()
    assert batch.token_weights_BT[1, : second - 1].tolist() == two.supervised[1:].tolist()
    assert batch.row_weights_BT[0].tolist() == [1] * first + [3] * second
    assert batch.row_weights_BT[1].tolist() == [1] * second + [0] * first
    assert ((batch.token_weights_BT > 0) == (batch.labels_BT >= 0)).all()
    moved = batch.to("meta")
    assert moved.token_weights_BT.device.type == moved.row_weights_BT.device.type == "meta"


@pytest.mark.parametrize("name", ["turn-weight-zero.jsonl", "turn-train-false.jsonl"])
@pytest.mark.parametrize("keys", [{}, {"loss_on": "last"}, {"thinking_weight": 0.5}])
def test_turns_of_no_weight_stay_context(tmp_path, name, keys):
    rows = [json.loads(line) for line in (CASES / name).read_text().splitlines()]
    store = build(tmp_path, rows, **keys)
    for i in range(len(store)):
        assert learnt(CHATML, store.example(i)) == [("RIGHT<|im_end|>", 1)]
    assert store.stats["weighted"] == 0


def test_with_demonstrations_and_a_system_prompt(tmp_path):
    """What stands in front is never learnt and moves no weight; a row of weight 0 is no demonstration."""
    rows = [{"messages": [say("user", f"Q{i}"), *TWO[1:]], "worth": i % 3} for i in range(9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    stores = []
    for worth in ("worth", None):
        task = {"name": "t", "data": str(path), "row_weight": "worth", "system": "be brief", "shots": {"n": 2}}
        if worth is None:  # the same task, whose demonstrations are rows of another one
            task["shots"]["from"] = "u"
        whole = {"name": "r", "model": {"path": "x"}, "output": {"dir": "y"}, "train": {"steps": 1, "max_length": 400}}
        others = [{"name": "u", "data": str(path), "row_weight": worth or "even"}]
        if worth is None:
            write_jsonl(path, [{**row, "even": 0 if "Q1" in str(row) else 1} for row in rows])
        recipe = Recipe.model_validate({**whole, "tasks": [task, *others]})
        stores.append(open_stores(recipe, CHATML, "train", cache_dir=tmp_path / "cache")[0])
    for store in stores:
        assert len(store) == 6
        for i in range(len(store)):
            example, text = store.example(i), CHATML.decode(store.example(i).input_ids)
            assert learnt(CHATML, example) == [("the fox<|im_end|>", 0.25), ("dog<|im_end|>", 1)]
            assert example.row_weight == [1, 2][i % 2]
            assert text.count("the fox") == 3
            zeros = ("Q0", "Q3", "Q6") if store is stores[0] else ("Q1<",)
            own = text.rsplit("<|im_start|>user\nQ", 1)[0]
            assert not any(asked in own for asked in zeros)
    all_of_u = recipe.model_copy(update={"tasks": (recipe.tasks[0], TaskSection(name="u", data=str(path)))})
    other = open_stores(all_of_u, CHATML, "train", cache_dir=tmp_path / "cache")[0]
    assert other.fingerprint != stores[1].fingerprint  # there all rows are demonstrations


def test_a_prompt_that_is_told_not_to_think(tmp_path):
    made = stock("qwen3")
    answer = say("assistant", "dog", weight=0.5)
    options = {"chat_template_kwargs": {"enable_thinking": False}, "thinking_weight": 0.0}
    store = build(tmp_path, [{"messages": [say("user", "Q"), answer]}], made, **options)
    assert learnt(made, store.example(0)) == [("dog<|im_end|>", 0.5)]
