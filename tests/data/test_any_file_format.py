"""Random tables as JSONL, JSON, CSV, Parquet and a saved dataset: the same examples, or the same rows refused."""

import csv
import json
import random

import pytest

from mtft.common.errors import UserError
from mtft.data.formats.columns import make_reader
from mtft.data.formats.messages import RowError
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import find_source_parts
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.recipe.schema.task import TaskSection
from tests.data.tokenize.stock import Words, stock

COLUMNS = {
    "pairs": ("prompt", "response", "system", "history"),
    "alpaca": ("instruction", "output", "input", "system", "history"),
    "messages": ("messages", "tools", "system"),
    "conversations": ("conversations", "tools", "system"),
}
NEEDED = {"prompt", "response", "instruction", "output", "messages", "conversations"}


def random_table(rng: random.Random) -> list[dict]:
    """Rows of one kind: columns in any order, some of which begin late, cells that are missing, null or blank."""
    words, kind = Words(rng), rng.choice(list(COLUMNS))
    words.met = set()
    begins = {column: rng.choice([0, 0, rng.randrange(120)]) for column in COLUMNS[kind]}
    begins |= dict.fromkeys(NEEDED & begins.keys(), 0)
    if rng.random() < 0.3:
        begins[rng.choice(["id", "score", "note", "images", "masked"])] = rng.randrange(100)
    rows = []
    for number in range(rng.choice([1, 3, 80, 130])):
        columns = [column for column, first in begins.items() if number >= first]
        rng.shuffle(columns)
        row = {column: _cell(column, words, rng) for column in columns}
        rows.append({column: cell for column, cell in row.items() if cell != "absent"})
    return rows


def _cell(column, words, rng):
    if column not in NEEDED and (odd := rng.random()) < 0.3:
        return "absent" if odd < 0.1 else None if odd < 0.2 else ""
    if column in NEEDED and rng.random() < 0.02:
        return ""
    if column in ("messages", "conversations"):
        return _turns(column == "conversations", words, rng)
    if column == "tools":
        names = _keys("tools", words, rng)
        properties = {name: {"type": "string"} for name in names}
        function = {"name": words.name(), "description": words(), "parameters": {"properties": properties}}
        return [{"type": "function", "function": function}]
    if column == "history":
        return [[words(), words()] for _ in range(rng.randrange(3))]
    return words()


def _keys(what, words, rng):
    """Keys of an object. Arrow has one order for all rows, that in which it meets them: the first object has all."""
    if what not in words.met:
        words.met.add(what)
        return ["q", "place", "unit"]
    return [key for key in ("q", "place", "unit") if rng.random() < 0.5] or ["q"]


def _turns(sharegpt, words, rng):
    turns = [("user", words())]
    if not sharegpt and rng.random() < 0.3:
        turns.insert(0, (rng.choice(["developer", "tool"]), words()))
    if rng.random() < 0.4:
        arguments = {key: words() for key in _keys("call", words, rng)}
        turns += [("call", {"name": words.name(), "arguments": arguments}), ("tool", words())]
    turns.append(("assistant", words()))
    if sharegpt:
        names = {"user": "human", "assistant": "gpt", "call": "function_call", "tool": "observation"}
        return [{"from": names[role], "value": json.dumps(text) if role == "call" else text} for role, text in turns]
    found = []
    for role, text in turns:
        if role == "call":
            found.append({"role": "assistant", "tool_calls": [{"type": "function", "function": text}]})
        else:
            found.append({"role": role, "content": text, **({"weight": 0} if rng.random() < 0.02 else {})})
    return found


def write(rows, folder):
    """The table in every kind of file."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    columns = list(dict.fromkeys(column for row in rows for column in row))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            cells = (row.get(column) for column in columns)
            writer.writerow(["" if x is None else x if isinstance(x, str) else json.dumps(x) for x in cells])
    lists = {column for column in columns if any(isinstance(row.get(column), list) for row in rows)}
    whole = {  # a column of lists has no place for a blank text
        column: [None if column in lists and row.get(column) == "" else row.get(column) for row in rows]
        for column in columns
    }
    pyarrow.parquet.write_table(pyarrow.table(whole), folder / "rows.parquet")
    Dataset.from_dict(whole).save_to_disk(folder / "saved")
    return ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"]


def outcome(path, renderer):
    """What becomes of a file: of each row its examples, or None where it is refused; or why the task is."""
    task = TaskSection(name="t", data=str(path))
    (part,) = find_source_parts(task, "train", path.parent)
    rows = list(part.rows())
    assert all(isinstance(row, FileRow) for row in rows)
    try:
        reader = make_reader(task, [row.data for row in rows[:50]], lambda column: None)
    except UserError as error:
        return str(error)
    found = []
    for row in rows:
        try:
            found.append(renderer.render(reader(row.data)))
        except RowError:
            found.append(None)
    return found


def check(seeds, template, tmp_path):
    renderer = ChatRenderer(stock(template))
    used = refused = 0
    for seed in seeds:
        rows = random_table(random.Random(seed))
        folder = tmp_path / str(seed)
        folder.mkdir()
        first, *others = write(rows, folder)
        expected = outcome(folder / first, renderer)
        for name in others:
            assert outcome(folder / name, renderer) == expected, f"seed {seed}: {name} is not {first}"
        used += sum(row is not None for row in expected)
        refused += sum(row is None for row in expected)
    return used, refused


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "nemotron_3_nano"])
def test_some_tables(template, tmp_path):
    used, refused = check(range(12), template, tmp_path)
    assert used > 100
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "gptoss", "deepseekv3", "gemma4_v5", "llama3_1"])
def test_many_tables(template, tmp_path):
    used, refused = check(range(100, 200), template, tmp_path)
    assert used > 1000
    assert refused > 0


def test_nulls_that_somebody_wrote_stay(tmp_path):
    """A JSON file's null argument is one; a column of JSON text in Arrow keeps its nulls too."""
    from datasets import Dataset, Features, Json, List, Value

    calls = [{"type": "function", "function": {"name": "f", "arguments": {"q": None}}}]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    features = Features({"messages": List(Json()), "note": Value("string")})
    dataset = Dataset.from_list([row | {"note": "x"}], features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    renderer = ChatRenderer(stock("qwen3"))
    texts = [outcome(tmp_path / name, renderer)[0][0].text for name in ("rows.jsonl", "rows.parquet", "saved")]
    assert texts[0] == texts[1] == texts[2]
    assert '"arguments": {"q": null}' in texts[0]
