"""Rows, columns, templates and files that somebody made to break things: an error of the row, in bounded memory."""

import io
import json
import struct

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest

from mtft.common.errors import UserError
from mtft.data.formats import render_limit
from mtft.data.formats.columns import make_reader
from mtft.data.formats.messages import RowError
from mtft.data.readers import bounded_lines
from mtft.data.readers.arrow_rows import UnreadableCell
from mtft.data.readers.row_files import FileRow, RowProblem, read_file
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.parallel_encode import RowEncoder
from mtft.recipe.schema.task import TaskSection
from tests.data.test_cases import read, refusal
from tests.data.toy_examples import TEMPLATES, tokenizer

DIGITS = "1" * 5000
QUESTION = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "B"}


def task(**options):
    return TaskSection(**({"name": "t", "data": "rows.jsonl"} | options))


def conversation(row, **options):
    return make_reader(task(**options), [row], lambda column: None)(row)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"answer": DIGITS}, "answer"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "choices"),
        ({"choices": {"text": ["a", "b"], "label": 5}}, "choices"),
        ({"choices": {"text": ["a", "b"], "label": ["A", None]}}, "choices"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "choices"),
        ({"choices": {"text": ["a", "b"], "label": ["A", " "]}}, "choices"),
        ({"choices": ["a", "a"], "answer": "a"}, "answer"),
    ],
)
def test_questions_whose_answer_means_nothing_are_errors_of_their_row(change, column):
    with pytest.raises(RowError) as caught:
        conversation(QUESTION | change)
    assert caught.value.column == column


def test_choices_that_a_row_numbers_are_meant_by_their_numbers():
    row = QUESTION | {"choices": {"text": ["a", "b", "c"], "label": [1, 2, 3]}, "answer": 2}
    assert conversation(row).messages[-1]["content"] == "2"
    assert conversation(QUESTION | {"answer": 1}).messages[-1]["content"] == "B"  # letters: by their place


@pytest.mark.parametrize("names", ["[a, b]", "[" * 100_000, '["a", {"b": 1}]', "a,,b", ["a", "a"], f"[{DIGITS}]"])
def test_label_names_that_are_none_are_errors_of_their_row(names):
    with pytest.raises(RowError) as caught:
        conversation({"text": "t", "label": 0, "label_names": names})
    assert caught.value.column == "label_names"


def test_a_row_without_an_answer_and_with_another_fault_has_no_preview():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "reasoning_content": 5}]
    row = FileRow("rows.jsonl", 1, {"messages": turns})
    encoder = RowEncoder(tokenizer(TEMPLATES["chatml"]), task(), [row.data], {})
    assert "is empty" in str(encoder([row]).problems[0][1])
    assert encoder.preview_empty_row(row) is None


def _not_utf8():
    offsets = pyarrow.py_buffer(struct.pack("<3i", 0, 1, 3))
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"a\xff\xfe")])


ODD = {
    "a date out of range": pyarrow.array([1, 2**62], pyarrow.timestamp("us")),
    "an unknown time zone": pyarrow.array([None, 2], pyarrow.timestamp("us", "Mars/Phobos")),
    "no UTF-8": _not_utf8(),
    "no UTF-8, further in": pyarrow.StructArray.from_arrays([_not_utf8()], ["x"]),
}


@pytest.mark.parametrize("kind", ODD)
def test_cells_that_python_has_no_value_for_matter_only_where_they_are_read(kind, tmp_path):
    table = {"prompt": ["a", "b"], "response": ["x", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(table | {"odd": ODD[kind]}), tmp_path / "beside.parquet")
    pyarrow.parquet.write_table(pyarrow.table(table | {"prompt": ODD[kind]}), tmp_path / "read.parquet")
    found = read(tmp_path, tmp_path / "beside.parquet", tokenizer(TEMPLATES["chatml"]))
    assert len(found.texts) == 2
    assert "column odd" in found.warnings
    text = refusal(tmp_path, tmp_path / "read.parquet", tokenizer(TEMPLATES["chatml"]))
    assert "read.parquet:2: column 'prompt': can't be read" in text


TEXTS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "dictionary of large_string": pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    "dictionary of small indices": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    "dictionary, further in": pyarrow.struct([("x", pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))]),
    "dictionary in a list": pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
}


def _texts(kind, good, bad, number):
    """`number` rows of a type of text, the third of them with bytes that are no UTF-8."""
    binary = pyarrow.array([bad if i == 2 else good for i in range(number)], pyarrow.binary())
    if pyarrow.types.is_struct(kind):
        return pyarrow.StructArray.from_arrays([_texts(kind.field(0).type, good, bad, number)], ["x"])
    if pyarrow.types.is_list(kind):
        return pyarrow.ListArray.from_arrays(list(range(number + 1)), _texts(kind.value_type, good, bad, number))
    if not pyarrow.types.is_dictionary(kind):
        _, offsets, data = binary.buffers()
        text = pyarrow.Array.from_buffers(pyarrow.string(), number, [None, offsets, data])
        return pyarrow.compute.cast(text, kind)
    _, offsets, data = pyarrow.array([good, bad], pyarrow.binary()).buffers()
    words = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data]).cast(kind.value_type)
    indices = pyarrow.array([int(i == 2) for i in range(number)], kind.index_type)
    return pyarrow.DictionaryArray.from_arrays(indices, words)


@pytest.mark.parametrize("rows", [4, 2500])  # in one batch, and in several
@pytest.mark.parametrize("name", TEXTS)
def test_text_of_every_type_that_is_no_utf8_is_an_error_of_its_row(name, rows, tmp_path):
    kind = TEXTS[name]
    columns = {"prompt": ["a"] * rows, "response": ["x"] * rows, "odd": _texts(kind, b"b", b"\xff\xfe", rows)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "beside.parquet", row_group_size=1000)
    found = list(read_file(str(tmp_path / "beside.parquet"), "rows.parquet"))
    assert [row.line for row in found] == list(range(1, rows + 1))
    assert [row.line for row in found if isinstance(row.data["odd"], UnreadableCell)] == [3]
    assert "b" in str(found[-1].data["odd"])
    assert len(read(tmp_path, tmp_path / "beside.parquet", tokenizer(TEMPLATES["chatml"])).texts) == rows
    columns["prompt"] = columns.pop("odd")
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "read.parquet")
    if not pyarrow.types.is_nested(kind):
        text = refusal(tmp_path, tmp_path / "read.parquet", tokenizer(TEMPLATES["chatml"]))
        assert "read.parquet:3: column 'prompt': can't be read" in text


def test_dictionaries_hold_what_plain_columns_do(tmp_path):
    categories = pyarrow.array(["b", None, "b", "c"]).cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))
    numbers = pyarrow.array([7, None, 8, 7]).dictionary_encode()
    columns = {
        "x.y": [1, 2, 3, 4],
        "x": categories,
        "n": numbers,
        "t": pyarrow.array([1, 2, 3, 4], pyarrow.duration("s")),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet", row_group_size=2)
    found = [row.data for row in read_file(str(tmp_path / "rows.parquet"), "rows.parquet")]
    assert [list(row) for row in found] == [["x.y", "x", "n", "t"]] * 4
    assert [row["x"] for row in found] == ["b", None, "b", "c"]
    assert [row["n"] for row in found] == [7, None, 8, 7]
    assert found[2]["x.y"] == 3
    assert found[2]["t"].seconds == 3


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(render_limit, "SECONDS", 0.05)


def test_a_chat_template_that_never_ends_is_given_up(short_limit):
    with pytest.raises(UserError, match=r"takes more than 0\.05 seconds"):
        ChatRenderer(tokenizer(ENDLESS + TEMPLATES["chatml"]))


def test_a_chat_template_that_never_ends_for_one_row_names_it(short_limit):
    branch = "{% if messages[0].content == 'b' %}" + ENDLESS + "{% endif %}"
    rows = [FileRow("rows.jsonl", i, {"prompt": text, "response": "x"}) for i, text in enumerate("ab", 1)]
    encoder = RowEncoder(tokenizer(branch + TEMPLATES["chatml"]), task(), [row.data for row in rows], {})
    with pytest.raises(UserError, match="takes more than") as caught:
        encoder(rows)
    assert caught.value.where == "rows.jsonl:2"


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** (9 ** 9) }}"])  # the second never ends while it is compiled
def test_a_task_template_that_never_ends_is_given_up(template, short_limit):
    with pytest.raises(UserError, match="takes more than"):
        conversation({"response": "a"}, template=template, format={"response": "response"})


@pytest.mark.parametrize(
    "template", ["{{ 2 ** 99999 }}", "{{ x ** 99999 }}", "{% for i in range(10 ** 9) %}{% endfor %}"]
)
def test_templates_that_fail_say_so(template):
    with pytest.raises((UserError, RowError), match="template"):
        conversation({"response": "a", "x": 2}, template=template, format={"response": "response"})
    with pytest.raises(UserError, match="template"):
        ChatRenderer(tokenizer(template.replace("x", "2")))


def test_a_template_may_not_write_a_book(monkeypatch):
    monkeypatch.setattr(render_limit, "LONGEST_TEXT", 1000)
    with pytest.raises(UserError, match="writes 1,001 characters"):
        conversation({"response": "a"}, template="{{ 'a' * 1001 }}", format={"response": "response"})


@pytest.fixture
def short_rows(monkeypatch):
    monkeypatch.setattr(bounded_lines, "LONGEST_ROW", 1000)
    monkeypatch.setattr(bounded_lines, "_PIECE", 100)


LONG = "x" * 5000
FILES = {
    "rows.jsonl": json.dumps({"a": "1"}) + f'\n{{"a": "{LONG}"}}\n' + json.dumps({"a": "2"}),
    "rows.csv": f'a\n1\n{LONG}\n2\n',
    "rows.tsv": f"a\r\n1\r\n{LONG}\r\n2\r\n",
    "quoted.csv": 'a\n1\n"' + "x" * 99 + "\n" + ("x" * 99 + "\n") * 8 + "x" * 99 + '"\n2\n',
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_row_beyond_the_bound_is_an_error_of_its_line(name, tmp_path, short_rows):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    rows = list(read_file(str(tmp_path / name), name))
    problems = [row for row in rows if isinstance(row, RowProblem)]
    good = [row for row in rows if isinstance(row, FileRow)]
    first = 2 if name.endswith("jsonl") else 3
    assert problems[0].line == first
    assert "longer than 1,000 bytes" in problems[0].what
    assert [row.data["a"] for row in good][:: len(good) - 1] == ["1", "2"]
    assert good[-1].line == (3 if name.endswith("jsonl") else 13 if name == "quoted.csv" else 4)


def test_an_element_of_an_array_beyond_the_bound_ends_the_array(tmp_path, short_rows, monkeypatch):
    monkeypatch.setattr("mtft.data.readers.json_stream.CHUNK", 100)
    (tmp_path / "rows.json").write_text(f'[{{"a": 1}},\n{{"a": "{LONG}"}}]')
    first, second = read_file(str(tmp_path / "rows.json"), "rows.json")
    assert isinstance(first, FileRow)
    assert isinstance(second, RowProblem)
    assert second.line == 2
    assert "longer than 1,000 bytes" in second.what


def test_bytes_without_a_line_break_are_never_held(short_rows):
    class Zeros(io.RawIOBase):
        """Counts what it was asked for."""

        left, most = 100_000, 0

        def readline(self, size=-1, /):
            self.most = max(self.most, size if size >= 0 else self.left)
            given = min(size if size >= 0 else self.left, self.left)
            self.left -= given
            return b"\0" * given

    file = Zeros()
    assert list(bounded_lines.bounded_lines(file)) == [None]
    assert file.left == 0
    assert file.most <= 1001


def test_a_hundred_thousand_columns_are_listed_in_a_line():
    columns = {f"column{i}": "x" for i in range(100_000)}
    with pytest.raises(UserError, match="and 99,988 more") as caught:
        make_reader(task(), [columns], lambda column: None)
    assert len(str(caught.value)) < 2000


def test_of_many_columns_that_nobody_reads_some_are_named(tmp_path):
    row = {"prompt": "a", "response": "b"} | {f"c{i}": "x" for i in range(1000)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    said = read(tmp_path, tmp_path / "rows.jsonl", tokenizer(TEMPLATES["chatml"])).warnings.splitlines()
    assert "t: column c19 (1 of 1 rows) is not read" in said
    assert len(said) == 21
    assert "more than 20 columns" in said[-1]
