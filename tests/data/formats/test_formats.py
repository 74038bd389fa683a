"""Every format gives the same conversation; every broken row says file, line, column and value."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest

from mtft.common.errors import UserError
from mtft.data.formats.columns import make_reader
from mtft.data.formats.messages import RowError
from mtft.data.readers.row_files import FileRow, RowProblem
from mtft.data.readers.sources import find_source_parts
from mtft.recipe.schema.task import TaskSection

PAIR = ("What is 2 + 2?", "Four.")


def task(**options):
    return TaskSection(**({"name": "sums", "data": "rows.jsonl"} | options))


def reader(rows, names=None, **options):
    return make_reader(task(**options), rows, lambda column: names)


def turns(conversation):
    return tuple(message["content"] for message in conversation.messages)


SAME_PAIR = {
    "messages": {"messages": [{"role": "user", "content": PAIR[0]}, {"role": "assistant", "content": PAIR[1]}]},
    "role names of messages under `conversations`": {
        "conversations": [{"role": "user", "content": PAIR[0]}, {"role": "assistant", "content": PAIR[1]}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": PAIR[0]}, {"from": "gpt", "value": PAIR[1]}]},
    "chat_rounds": {"chat_rounds": [{"role": "human", "content": PAIR[0]}, {"role": "bot", "content": PAIR[1]}]},
    "prompt/response": {"prompt": PAIR[0], "response": PAIR[1]},
    "prompt/answer (MFTCoder)": {"id": 3, "data_name": "x", "prompt": PAIR[0], "answer": PAIR[1]},
    "prompt/completion": {"prompt": PAIR[0], "completion": PAIR[1]},
    "conversational prompt/completion": {
        "prompt": [{"role": "user", "content": PAIR[0]}],
        "completion": [{"role": "assistant", "content": PAIR[1]}],
    },
    "question/answer": {"question": PAIR[0], "answer": PAIR[1]},
    "alpaca": {"instruction": PAIR[0], "input": "", "output": PAIR[1]},
    "messages as JSON text (CSV)": {
        "messages": json.dumps([{"role": "user", "content": PAIR[0]}, {"role": "assistant", "content": PAIR[1]}])
    },
    "nulls that Arrow adds": {
        "messages": [
            {"role": "user", "content": PAIR[0], "tool_calls": None},
            {"role": "assistant", "content": PAIR[1], "tool_calls": None},
        ]
    },
    "parts of a content": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": PAIR[0]}]},
            {"role": "assistant", "content": PAIR[1]},
            {"role": "user", "content": "a last word that nobody answers"},
        ]
    },
}


@pytest.mark.parametrize("row", SAME_PAIR.values(), ids=SAME_PAIR)
def test_auto_reads_the_same_pair(row):
    conversation = reader([row])(row)
    assert turns(conversation) == PAIR
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_any_column_names():
    row = {"article": "long", "summary": "short", "persona": "Be brief."}
    read = reader([row], format={"prompt": "article", "response": "summary", "system": "persona"})
    assert turns(read(row)) == ("Be brief.", "long", "short")


def test_alpaca_joins_the_input():
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    assert turns(reader([row])(row)) == ("Sort.\n\nb a", "a b")


def test_plain_text():
    row = {"text": "once upon a time"}
    assert reader([row])(row).text == "once upon a time"


@pytest.mark.parametrize(
    "row, names, response",
    [
        ({"text": "fine", "label": 1}, ["bad", "good"], "good"),
        ({"text": "fine", "label": "1"}, ["bad", "good"], "good"),
        ({"text": "fine", "label": "good"}, None, "good"),
        ({"text": "fine", "label": 1, "label_names": ["bad", "good"]}, None, "good"),
        ({"sentence": "fine", "label": 1}, None, "1"),
    ],
)
def test_classification(row, names, response):
    assert turns(reader([row], names)(row))[1] == response


def test_classification_names_in_the_recipe():
    row = {"body": "fine", "mark": 0}
    read = reader([row], format={"text": "body", "label": "mark", "label_names": "bad, good"})
    assert turns(read(row)) == ("fine\n\nOptions: bad, good", "bad")


@pytest.mark.parametrize(
    "choices, answer",
    [
        (["red", "blue"], 1),
        (["red", "blue"], "1"),
        (["red", "blue"], "B"),
        (["red", "blue"], "blue"),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "B"),
    ],
)
def test_multiple_choice(choices, answer):
    row = {"question": "The sky?", "choices": choices, "answer": answer}
    assert turns(reader([row])(row)) == ("The sky?\nA. red\nB. blue", "B")


def test_template_over_columns():
    row = {"city": "Rome", "country": "Italy", "output": "yes"}
    read = reader([row], template="Is {{ city }} in {{ country }}?")
    assert turns(read(row)) == ("Is Rome in Italy?", "yes")


def test_rationale_and_label_are_two_tasks_of_one_row():
    row = {"input": "x", "rationale": "because", "label": "yes"}
    why = reader([row], format={"prompt": "input", "response": "rationale"}, template=None)
    what = reader([row], format={"response": "label"}, template="[label] {{ input }}")
    assert turns(why(row)) == ("x", "because")
    assert turns(what(row)) == ("[label] x", "yes")


def test_template_is_sandboxed():
    row = {"a": "x", "output": "y"}
    read = reader([row], template="{{ a.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RowError, match="template fails"):
        read(row)


@pytest.mark.parametrize(
    "row, column, what",
    [
        ({"prompt": "a"}, "response", "missing"),
        ({"prompt": "a", "respones": "b"}, "response", "nearest: 'respones'"),
        ({"prompt": "a", "response": None}, "response", "null"),
        ({"prompt": "a", "response": ""}, "response", "empty"),
        ({"prompt": "a", "response": " \n"}, "response", "empty"),
        ({"prompt": "a", "response": 3}, "response", "expected text, found a whole number"),
        ({"prompt": ["a"], "response": "b"}, "prompt + response[0]", "expected an object"),
        ({"prompt": "a", "response": "\ud800"}, "response", "invalid UTF-8"),
    ],
)
def test_bad_pairs(row, column, what):
    read = reader([{"prompt": "a", "response": "b"}])
    with pytest.raises(RowError, match=what) as caught:
        read(row)
    assert caught.value.column == column


@pytest.mark.parametrize(
    "messages, column, what",
    [
        ("hello", "messages", "expected JSON"),
        ([], "messages", "expected a list"),
        ([{"role": "user", "content": "a"}], "messages", "no assistant turn"),
        ([{"role": "assistant", "content": "a"}], "messages", "no prompt"),
        ([{"role": "usr", "content": "a"}], "messages[0].role", "role must be one of"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
            "messages[1].content",
            "is empty",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content", "only text"),
    ],
)
def test_bad_messages(messages, column, what):
    row = {"messages": messages}
    with pytest.raises(RowError, match=what) as caught:
        reader([row])(row)
    assert caught.value.column == column


def test_the_users_column_is_named():
    read = reader([{"q": "a", "a": "b"}], format={"prompt": "q", "response": "a"})
    with pytest.raises(RowError) as caught:
        read({"q": "a", "a": ""})
    assert caught.value.column == "a"


@pytest.mark.parametrize(
    "options, what, do",
    [
        ({"format": "mesages"}, "unknown format", "messages"),
        ({"format": {"promt": "prompt", "response": "response"}}, "unknown role", "prompt"),
        ({"format": {"prompt": "promt", "response": "response"}}, "did you mean 'prompt'", "prompt, response"),
        ({"format": {"prompt": "prompt"}}, "make no format", "prompt_response"),
        ({"template": "{{ promt }}"}, "did you mean 'prompt'", "prompt, response"),
        ({"template": "{{ prompt "}, "cannot be parsed", "double braces"),
        ({"template": "{{ prompt }}", "format": {"prompt": "prompt", "response": "response"}}, "column for it", "keep"),
        ({"format": "sharegpt"}, "fit not the format 'sharegpt'", "conversations"),
    ],
)
def test_mistakes_in_the_recipe(options, what, do):
    with pytest.raises(UserError) as caught:
        reader([{"prompt": "a", "response": "b"}], **options)
    assert what in caught.value.what
    assert do in caught.value.do
    assert caught.value.where.startswith("tasks.sums.")


def test_unknown_columns_show_the_nearest():
    with pytest.raises(UserError, match="'response' is near 'respones'"):
        reader([{"promt": "a", "respones": "b"}])


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
}


# --- sources -----------------------------------------------------------------------------------------------------


def rows_of(path, **options):
    (part,) = find_source_parts(task(data=str(path), **options), "train", path.parent)
    return list(part.rows())


def test_jsonl_lines_are_true(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "1"}\n\n{"a": \n{"a": "caf\xe9"}\n[1]\n{"a": "2"}')
    found = rows_of(path)
    assert [row.line for row in found] == [1, 3, 4, 5, 6]
    assert [type(row) for row in found] == [FileRow, RowProblem, RowProblem, RowProblem, FileRow]
    assert "broken JSON" in found[1].what
    assert found[1].what.endswith("at character 6")
    assert "invalid UTF-8 at byte 11" in found[2].what
    assert "not an object" in found[3].what
    assert str(found[1]).startswith("rows.jsonl:3: ")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_hostile_json_is_a_problem(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    (found,) = rows_of(path)
    assert isinstance(found, RowProblem)
    assert len(str(found)) < 300


def test_json_array_csv_parquet_compressed_and_saved(tmp_path):
    from datasets import Dataset

    rows = [{"a": "one", "b": "x"}, {"a": "two\nlines", "b": "y"}, {"a": "three", "b": "z"}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "wrong-name.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.csv").write_text('a,b\none,x\n"two\nlines",y\nthree,z\n')
    lines_of_json = "\n".join(map(json.dumps, rows)).encode()
    for end, compress in COMPRESSORS.items():
        (tmp_path / f"rows.jsonl.{end}").write_bytes(compress(lines_of_json))
        (tmp_path / f"array.json.{end}").write_bytes(compress((tmp_path / "array.json").read_bytes()))
        (tmp_path / f"rows.csv.{end}").write_bytes(compress((tmp_path / "rows.csv").read_bytes()))
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    lines = {"array.json": [2, 6, 10], "rows.csv": [2, 3, 5]}
    packed = [f"{name}.{end}" for name in ("array.json", "rows.csv", "rows.jsonl") for end in COMPRESSORS]
    for name in ("array.json", "wrong-name.json", "rows.csv", *packed, "rows.parquet", "saved"):
        found = rows_of(tmp_path / name)
        assert [row.data for row in found] == rows, name
        plain = name.rpartition(".")[0] if name in packed else name
        assert [row.line for row in found] == lines.get(plain, [1, 2, 3]), name


def test_bad_csv_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,response\na,b\na,b,c\nd\n\xff,e\n")
    found = rows_of(path)
    assert [(type(row), row.line) for row in found] == [(FileRow, 2), (RowProblem, 3), (RowProblem, 4), (FileRow, 5)]
    with pytest.raises(RowError, match="invalid UTF-8"):
        reader([found[0].data])(found[3].data)


def test_globs_and_lists_keep_a_fixed_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"x": 1}')
    parts = find_source_parts(task(data=(str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl"))), "train", tmp_path)
    assert [part.name for part in parts] == ["a.jsonl", "b.jsonl", "b.jsonl(2)"]


@pytest.mark.parametrize(
    "data, what", [("nothing.jsonl", "no file matches"), ("*.jsonl", "no file matches"), ("a.txt", "unknown kind")]
)
def test_missing_files(tmp_path, data, what):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=what) as caught:
        find_source_parts(task(data=str(tmp_path / data)), "train", tmp_path)
    assert caught.value.where == "tasks.sums.data"


@pytest.mark.parametrize("end", COMPRESSORS)
def test_torn_archive(tmp_path, end):
    path = tmp_path / f"rows.jsonl.{end}"
    path.write_bytes(COMPRESSORS[end](b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        rows_of(path)


def test_digest_follows_the_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}')
    (part,) = find_source_parts(task(data=str(path)), "train", tmp_path)
    before = part.content().digest
    path.write_text('{"a": 2}')
    assert part.content().digest != before


def test_saved_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list([{"a": "1"}]), "test": Dataset.from_list([{"a": "2"}, {"a": "3"}])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert [row.data["a"] for row in rows_of(tmp_path / "saved")] == ["1"]
    assert [row.data["a"] for row in rows_of(tmp_path / "saved", split="test")] == ["2", "3"]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test") as caught:
        rows_of(tmp_path / "saved", split="dev")
    assert caught.value.where == "tasks.sums.split"
    asked = task(eval_data=str(tmp_path / "saved"), split="train")  # held-out rows never come from the training split
    assert [row.data["a"] for row in find_source_parts(asked, "eval", tmp_path)[0].rows()] == ["2", "3"]
    del splits["test"]
    DatasetDict(splits | {"extra": splits["train"]}).save_to_disk(tmp_path / "no-test")
    with pytest.raises(UserError, match="none of the splits train, extra is called validation"):
        find_source_parts(task(eval_data=str(tmp_path / "no-test")), "eval", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not one that datasets' save_to_disk wrote"):
        rows_of(tmp_path / "empty")


def test_hub_names_go_through_datasets(tmp_path, monkeypatch):
    """`datasets` takes a local folder where a hub name is expected: the same path, without a network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "fine", "label": "good"}\n')
    (part,) = find_source_parts(task(data=f"hub:{folder}"), "train", tmp_path)
    assert [row.data for row in part.rows()] == [{"text": "fine", "label": "good"}]
    assert part.name.endswith("name[train]")
    assert part.content().rows == 1
    with pytest.raises(UserError, match="cannot load hub:") as caught:
        find_source_parts(task(data=f"hub:{tmp_path / 'nowhere'}"), "train", tmp_path)
    assert "network" in caught.value.do


def test_names_of_a_class_label(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"text": ["fine"], "label": [1]}, features=features).save_to_disk(tmp_path / "saved")
    (part,) = find_source_parts(task(data=str(tmp_path / "saved")), "train", tmp_path)
    rows = [row.data for row in part.rows()]
    assert turns(make_reader(task(), rows, part.label_names)(rows[0])) == ("fine\n\nOptions: bad, good", "good")


def test_embedded_tasks_are_named(tmp_path):
    with pytest.raises(UserError, match="no embedded task 'nameing'") as caught:
        find_source_parts(task(data="quickstart:nameing"), "train", tmp_path)
    assert "naming" in caught.value.do
