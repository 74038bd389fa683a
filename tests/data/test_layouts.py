"""Layouts of rows that users have: each was read wrongly, and without a word."""

import gzip
import json

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import RowError
from mtft.data.store.token_store import open_store
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.models.loading import load_tokenizer
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.task import TaskSection
from tests.data.test_cases import Learnt, read, refusal
from tests.data.tokenize.stock import FOLDER, STOCK, stock
from tests.data.toy_examples import TEMPLATES, tokenizer

USER = {"role": "user", "content": "w1"}


def rendered(row, template="qwen2_5", form="messages"):
    return ChatRenderer(stock(template)).render(FORMATS[form].read(row))


def learnt(row, template="qwen2_5", form="messages"):
    return "".join(e.text[a:b] for e in rendered(row, template, form) for a, b in e.spans)


def written(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# --- files


def test_rows_of_an_array_in_one_line_are_rows(tmp_path):
    rows = [{"id": f"x{i % 4}", "prompt": f"q{i}", "response": "a"} for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read(tmp_path, tmp_path / "rows.json", tokenizer())
    assert found.store.row_numbers.tolist() == [0, 1, 2, 3, 4, 5]
    assert list(found.store.ids) == ["x0", "x1", "x2", "x3", "rows.json:5", "rows.json:6"]
    assert "2 of 6 rows have the id of an earlier one" in found.warnings


def test_a_file_that_is_listed_twice_has_other_ids(tmp_path):
    path = str(written(tmp_path, {"prompt": "a", "response": "b"}))
    task = TaskSection(name="t", data=(path, path))
    store = open_store(task, "train", tokenizer(), max_length=50, cache_dir=tmp_path / "cache")
    assert list(store.ids) == ["rows.jsonl:1", "rows.jsonl(2):1"]


def test_ids_that_look_like_ours(tmp_path):
    talk = [{"role": r, "content": "a"} for r in ("user", "assistant") * 2]
    rows = [{"id": "d", "messages": talk}, {"id": "d#2", "messages": talk[:2]}, {"messages": talk[:2]}]
    rows.append({"id": "rows.jsonl:3", "messages": talk[:2]})
    found = read(tmp_path, written(tmp_path, *rows), tokenizer(TEMPLATES["qwen3"]))
    assert list(found.store.ids) == ["d", "d#2", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4"]


def test_label_names_of_parquet_files(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    Dataset.from_dict({"text": ["fine"], "label": [1]}, features=features).to_parquet(tmp_path / "rows.parquet")
    assert "positive" in read(tmp_path, tmp_path / "rows.parquet", tokenizer()).learnt[0]


def test_damaged_files_are_one_clear_block(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    packed = bytearray(gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 50))
    packed[14:20] = b"\xff" * 6
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    dates = pyarrow.array([2**60], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "response": dates}), tmp_path / "rows.parquet")
    Dataset.from_dict({"prompt": ["a"], "response": ["b"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path, tmp_path / "rows.jsonl.gz", tokenizer())
    assert "rows.parquet:1: column 'response': can't be read" in refusal(
        tmp_path, tmp_path / "rows.parquet", tokenizer()
    )
    assert "can't be read" in refusal(tmp_path, tmp_path / "saved", tokenizer())


# --- calls


@pytest.mark.parametrize(
    "call",
    [
        {"name": "f", "parameters": {"city": "Rome"}},
        {"name": "f", "input": {"city": "Rome"}},
        {"function": {"name": "f", "parameters": {"city": "Rome"}}},
        {"function": {"name": "f", "arguments": '{"city": "Rome"}'}},
    ],
)
def test_arguments_by_any_of_their_names(call):
    calls = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert '{"name": "f", "arguments": {"city": "Rome"}}' in learnt(calls)


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "f"}, "arguments": {"city": "Rome"}},
        {"name": "f", "arguments": {}, "thoughts": "hm"},
        {"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}},
        {"name": "f", "arguments": '"Rome"'},
        {"name": "f", "arguments": {"x": float("inf")}},
    ],
)
def test_calls_that_would_lose_something_are_refused(call):
    with pytest.raises(RowError, match=r"tool_calls\[0\]|not read|object of arguments|no JSON"):
        rendered({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})


def test_arguments_may_have_any_names():
    call = {"function": {"name": "f", "arguments": {"role": ["admin"], "name": {"x": ["y"]}}}}
    assert "admin" in learnt({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})


def test_calls_of_one_turn_are_learnt_together_or_refused():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    turns = [{"from": "human", "value": "w1"}, call, call]
    assert learnt({"conversations": turns}, form="sharegpt").count('"name": "f"') == 2
    with pytest.raises(RowError, match="other keys differ"):
        rendered({"conversations": [turns[0], call, {**call, "weight": 0}]}, form="sharegpt")


# --- messages


@pytest.mark.parametrize("key", ["tools", "functions", "name", "text", "type", "channel"])
@pytest.mark.parametrize("name", STOCK)
def test_a_key_that_changes_nothing_is_named(name, key):
    """A word that stands somewhere in a template is not for that a key that it reads."""
    template = ChatRenderer(stock(name)).template
    message = {**USER, key: "Zq9q"}
    shown = "Zq9q" in template.apply(template.adapt([message])[0], generate=True)
    assert (key in template.unread_keys([message])) or shown


def test_unread_keys_of_a_system_message_refuse_nothing():
    """Templates that want a user's turn refuse the beginning of a conversation, but not the conversation."""
    row = {"messages": [{"role": "system", "content": "S", "date": "x"}, USER, {"role": "assistant", "content": "w2"}]}
    for name in STOCK:
        renderer = ChatRenderer(stock(name))
        renderer.render(FORMATS["messages"].read(row))
        assert renderer.notes["key:date"] == 1


@pytest.mark.parametrize("key", ["image", "video", "audio", "loss_scale", "mask"])
def test_keys_that_change_the_meaning_are_refused(key):
    with pytest.raises(RowError, match="is not read"):
        rendered({"messages": [{**USER, key: "x"}, {"role": "assistant", "content": "w2"}]})


@pytest.mark.parametrize("column, cell", [("rejected", "bad"), ("chosen", "good"), ("mask", "User"), ("label", False)])
def test_columns_that_change_the_meaning_are_refused(tmp_path, column, cell):
    row = {"prompt": "a", "response": "b", column: cell}
    assert f"column {column!r}: is not read" in refusal(tmp_path, written(tmp_path, row), tokenizer())


def test_a_good_answer_may_be_labelled_as_one(tmp_path):
    found = read(tmp_path, written(tmp_path, {"prompt": "a", "response": "b", "label": True}), tokenizer())
    assert "column label (1 of 1 rows) is not read" in found.warnings


def test_conversations_with_roles_keep_what_stands_beside_them(tmp_path):
    talk = [USER, {"role": "assistant", "content": "w2"}]
    found = read(tmp_path, written(tmp_path, {"conversations": talk, "system": "SYS"}), tokenizer())
    assert "SYS" in found.texts[0]


def test_the_second_list_of_a_pair_is_what_is_learnt():
    earlier = [USER, {"role": "assistant", "content": "EARLIER"}, USER]
    row = {"prompt": earlier, "response": [{"role": "assistant", "content": "LATER"}]}
    assert "EARLIER" not in learnt(row, form="prompt_response")
    assert "LATER" in learnt(row, form="prompt_response")


@pytest.mark.parametrize("answer, choices", [("A", ["B", "A", "C"]), ("1", ["3", "2", "1"])])
def test_choices_that_mean_two_things_are_refused(answer, choices):
    with pytest.raises(RowError, match="letter or number of another"):
        FORMATS["multiple_choice"].read({"question": "q", "choices": choices, "answer": answer})


# --- thinking


@pytest.mark.parametrize("template", ["deepseekv3", "deepseek_r1_distill", "qwen3", "nemotron_3_nano", "gptoss"])
def test_a_thought_without_its_opening_tag(template):
    """Data of R1 and QwQ: the tag stood in the prompt."""
    row = {"messages": [USER, {"role": "assistant", "content": "w5 hm\n</think>\n\nw2"}]}
    part = learnt(row, template)
    assert part.index("w5 hm") < part.index("w2")
    assert part.count("</think>") <= 1


@pytest.mark.parametrize("template", STOCK)
def test_empty_thoughts_are_no_loss(template):
    row = {"messages": [USER, {"role": "assistant", "content": "<think>\n\n</think>\n\nw2"}]}
    assert "w2" in learnt(row, template)


def test_a_thought_that_never_ends_is_refused():
    with pytest.raises(RowError, match=r"message 2 \(assistant\).*never closes it"):
        rendered({"messages": [USER, {"role": "assistant", "content": "<think>\nw2 hm"}]}, "qwen3")


@pytest.mark.parametrize("template", ["deepseekv3", "deepseek_r1_distill", "qwen3", "gptoss"])
def test_who_takes_one_round_takes_ten(template):
    answer = {"role": "assistant", "content": "<think>\nw2\n</think>\n\nw3"}
    system = {"role": "system", "content": "w0"}
    for rounds in range(1, 11):
        assert rendered({"messages": [system, *[USER, answer] * rounds]}, template)


# --- chat templates


@pytest.mark.parametrize("template", ["llama3", "nemotron_3_nano", "lfm2", "qwen2_5_vl"])
def test_a_role_that_a_template_only_repeats_is_not_its_own(template):
    """It writes any role's name; the model has never seen `developer`."""
    row = {"messages": [{"role": "developer", "content": "Be brief."}, USER, {"role": "assistant", "content": "w2"}]}
    text = rendered(row, template)[0].text
    assert "Be brief." in text
    assert "developer" not in text


def test_the_template_of_another_model_is_said():
    made = tokenizer("<|foreign_start|>{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert ChatRenderer(made).template.strange_tokens() == ["<|foreign_start|>"]
    for name in ("qwen3", "gptoss", "llama3", "gemma3", "phi3"):
        assert not ChatRenderer(stock(name)).template.strange_tokens()


def test_a_template_file_that_cannot_be_parsed_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    section = ModelSection(path=str(tmp_path / "model"), chat_template=str(tmp_path / "bad.jinja"))
    with pytest.raises(UserError, match=r"bad\.jinja:2: the chat template can't be parsed") as caught:
        load_tokenizer(section)
    assert caught.value.where == "model.chat_template"


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates_can_be_named(tmp_path, name):
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    for variant in (name, f"{name}_training"):
        path = FOLDER / f"{variant}.jinja"
        if path.is_file():
            made = load_tokenizer(ModelSection(path=str(tmp_path), chat_template=str(path)))
            assert made.chat_template == path.read_text()


# --- templates over columns


def test_a_template_writes_no_null(tmp_path):
    rows = [{"title": "a", "body": "b", "response": "c"}, {"title": None, "body": ["x"], "response": "c"}]
    path = written(tmp_path, *rows)
    said = refusal(tmp_path, path, tokenizer(), template="{{ title }}: {{ body }}")
    assert "rows.jsonl:2: the template writes a null" in said
    found = read(tmp_path, path, tokenizer(), template="{% if title %}{{ title }}{% endif %}{{ body | tojson }}")
    assert isinstance(found, Learnt)
    with pytest.raises(UserError, match="a list or an object"):
        read(tmp_path, path, tokenizer(), template="{{ title or '' }}: {{ body }}")


def test_common_prefixes():
    from mtft.data.tokenize.assistant_turns import common_length

    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = ("".join(rng.choice(list("ab"), rng.integers(0, 12))) for _ in range(2))
        expected = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        assert common_length(a, b) == expected
