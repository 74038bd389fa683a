"""A .json array in pieces is what json.loads makes of it whole; breaks are told with their line."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtft.data.readers import json_stream
from mtft.data.readers.json_stream import ArrayElement, ArrayError, iter_array
from mtft.data.readers.row_files import FileRow, RowProblem, read_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 50))
def test_any_array_in_any_pieces(values, indent, ascii_only, chunk):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    raw = text.encode("utf-8", "surrogatepass")
    if b"\xed" in raw:  # JSON can't hold a lone surrogate other than as an escape
        raw = json.dumps(values, indent=indent).encode()
    whole = json_stream.CHUNK
    json_stream.CHUNK = chunk
    try:
        found = list(iter_array(io.BytesIO(raw)))
    finally:
        json_stream.CHUNK = whole
    assert all(isinstance(element, ArrayElement) for element in found)
    assert json.dumps([element.value for element in found]) == json.dumps(values)
    if indent is not None:
        rows = raw.decode().split("\n")
        assert all(element.text.split("\n")[0] in rows[element.line - 1] for element in found)


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "good", "line", "what"),
    [
        ('[{"a": 1},\n{"a": }]', 1, 2, "Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', 1, 2, "expected ',' or ']' behind a row"),
        ('[{"a": 1},\n]', 1, 2, "Expecting value"),
        ('[{"a": 1},\n{"a": "open\n}]', 1, 2, "Invalid control character"),
        ('[{"a": 1},\n{"a": "open', 1, 2, "Unterminated string"),
        ('[{"a": 1},\n', 1, 2, "ends inside the array"),
        ('[{"a": 1}', 1, 1, "ends inside the array"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, 2, "something stands behind the array"),
        ("[1.5, 12e, 3]", 2, 1, "expected ',' or ']' behind a row"),
        ("[" * 100_000, 0, 1, "recursion"),
        ('[{"a": ' + "9" * 10_000 + "}]", 0, 1, "integer string conversion"),
    ],
)
def test_breaks(monkeypatch, text, good, line, what, chunk):
    if len(text) > 1000 and chunk < 1000:
        pytest.skip("one character at a time")
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    *rows, last = iter_array(io.BytesIO(text.encode()))
    assert [type(row) for row in rows] == [ArrayElement] * good
    assert isinstance(last, ArrayError)
    assert last.line == line
    assert what in last.what


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf[{"a": "caf\xc3\xa9"},\n {"a": "caf\xe9"},\n {"a": "\\ud800"},\n {"a": "last"}]')
    first, bad, escaped, last = read_file(str(path), path.name)
    assert (first.data, last.data) == ({"a": "café"}, {"a": "last"})
    assert isinstance(bad, RowProblem)
    assert str(bad).startswith("rows.json:2: invalid UTF-8 (got ")
    assert isinstance(escaped, FileRow)  # valid JSON: the format says what it thinks of the text


def test_one_object_in_many_lines_is_told_as_such(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"a": 1}]}, indent=1))
    (problem,) = read_file(str(path), path.name)
    assert "one object in many lines" in problem.what


def test_memory_is_that_of_a_row(tmp_path):
    """The naive way, json.load, takes more than the file."""
    path = tmp_path / "rows.json"
    row = json.dumps({"prompt": "the quick brown fox " * 50, "response": "dog"})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 20_000) + "]")
    size = path.stat().st_size

    def peak(read):
        tracemalloc.start()
        count = sum(1 for _ in read())
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 20_000
        return used

    assert size > 20_000_000
    assert peak(lambda: read_file(str(path), path.name)) < 8 * json_stream.CHUNK < size / 2
    assert peak(lambda: json.loads(path.read_text())) > size
