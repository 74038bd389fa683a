"""10,000 broken rows: each one is used whole, or refused with file and line. Never a traceback, never silence."""

import collections
import itertools
import json
import random
import re

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.formats.columns import make_reader
from mtft.data.formats.messages import RowError
from mtft.data.readers.row_files import FileRow, RowProblem, read_file
from mtft.data.store.token_store import open_store
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import encode, runs
from mtft.data.tokenize.parallel_encode import RowEncoder
from mtft.recipe.schema.task import TaskSection
from tests.data.toy_examples import TEMPLATES, tokenizer

ANSWER = "forest"
GOOD = {
    "messages": {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "the quick fox"},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "the dog"}, {"from": "gpt", "value": ANSWER}]},
    "chat_rounds": {"chat_rounds": [{"role": "human", "content": "the dog"}, {"role": "bot", "content": ANSWER}]},
    "alpaca": {"instruction": "jump", "input": "over", "output": ANSWER},
    "prompt_response": {"prompt": "the lazy dog", "response": ANSWER},
    "multiple_choice": {"question": "where?", "choices": ["forest", "morning"], "answer": 0},
    "classification": {"text": "the question", "label": ANSWER},
    "text": {"text": f"the quick {ANSWER}"},
}
ODD = [
    None, True, 0, -1, 3.5, 1e400, "", " ", "\n\t", "\x00", "🙂", "\ud800", "a" * 3000, [], {}, [[]], [None], ["a"],
    [{}], {"role": "user"}, [{"role": "user", "content": "x"}], "<|im_end|>", "{{ x }}", "</s>", 10**30,
]  # fmt: skip


def places(value, path=()):
    """All paths into a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutate(row, rng):
    row = json.loads(json.dumps(row))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *above, last = rng.choice([path for path in places(row) if path])
        parent = row
        for key in above:
            parent = parent[key]
        action = rng.randrange(4)
        if action == 0:
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            parent[str(last) + rng.choice("xs _")] = parent.pop(last)
        else:
            parent[last] = rng.choice(ODD)
        if not row:
            return row
    return row


def as_bytes(row, rng):
    raw = json.dumps(row).encode()
    if rng.random() < 0.2:
        cut = rng.randrange(len(raw))
        raw = rng.choice([raw[:cut], raw[:cut] + bytes([rng.randrange(256)]) + raw[cut + 1 :], raw + raw[cut:]])
    return raw.replace(b"\n", b" ").replace(b"\r", b" ")


@pytest.mark.parametrize("template", ["chatml", "qwen3", "mistral", "gemma"])
def test_rows(tmp_path, template, capsys):
    rng = random.Random(template)
    made = tokenizer(TEMPLATES[template])
    renderer = ChatRenderer(made)
    happened, refusals, reasons = collections.Counter(), [], collections.Counter()
    for name, good in GOOD.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"\n".join(as_bytes(mutate(good, rng), rng) for _ in range(10_000 // 4 // len(GOOD))))
        reader = make_reader(TaskSection(name="t", data=str(path), format=name), [good], lambda column: None)
        for row in read_file(str(path), path.name):
            assert row.line >= 1
            if isinstance(row, RowProblem):
                happened["unreadable"] += 1
                assert path.name in str(row)
                assert len(str(row)) < 400
                continue
            try:
                rendered = renderer.render(reader(row.data))
            except RowError as error:
                happened["refused"] += 1
                reasons[" ".join(re.split("[;,:]", error.what)[0].split()[:6])] += 1
                refusals.append(str(RowProblem(row.file, row.line, error.what, error.column, error.value)))
                continue
            happened["used"] += 1
            for example in encode(made, rendered):
                learnt = "".join(part for part, learn in runs(made, example) if learn)
                assert learnt.strip(), row  # nothing is accepted that teaches nothing
    with capsys.disabled():
        most = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common(5))
        print(f"\nfuzzed rows, {template}: {dict(happened)}; refused most for: {most}")
    assert max(map(len, refusals)) < 900
    assert sum(happened.values()) >= 10_000 // 4 * 0.95  # a few rows were cut down to nothing
    assert min(happened["unreadable"], happened["refused"], happened["used"]) > 100


BROKEN = {
    "answer removed": lambda row: {key: value for key, value in row.items() if value != ANSWER},
    "answer blank": lambda row: json.loads(json.dumps(row).replace(ANSWER, " ")),
    "answer null": lambda row: json.loads(json.dumps(row).replace(f'"{ANSWER}"', "null")),
    "answer a number": lambda row: json.loads(json.dumps(row).replace(f'"{ANSWER}"', "[7]")),
}


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("multiple_choice", "text")])
@pytest.mark.parametrize("broken", BROKEN)
def test_an_answer_that_is_gone_is_never_accepted(name, broken):
    reader = make_reader(TaskSection(name="t", data="x", format=name), [GOOD[name]], lambda column: None)
    row = BROKEN[broken](GOOD[name])
    if row == GOOD[name]:
        row = {}
    with pytest.raises(RowError):
        reader(row)


def test_random_bytes_are_one_clear_block(tmp_path):
    rng = random.Random(0)
    made = tokenizer(TEMPLATES["chatml"])
    for kind in ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"):
        for size in (0, 1, 50, 5000):
            path = tmp_path / f"rows.{kind}"
            path.write_bytes(rng.randbytes(size))
            with pytest.raises(UserError) as caught:
                open_store(TaskSection(name="t", data=str(path)), "train", made, max_length=64, cache_dir=tmp_path)
            assert len(str(caught.value)) < 5000


WEIGHTS = [
    0,
    1,
    1,
    0.5,
    2,
    1e-6,
    1e6,
    0.0,
    -0.5,
    1e7,
    1e-7,
    True,
    "2",
    "",
    None,
    [],
    {},
    float("nan"),
    float("inf"),
    10**400,
]
WEIGHTS += ["0.25", "nan", "1_0", " 3 ", "x"]
KEYS = {"loss_on": ["all", "last"], "row_weight": [None, "worth"], "thinking_weight": [1.0, 0.0, 0.25, 3.0]}


def as_row_weight(value):
    """The oracle for a row's weight; None: refused."""
    if isinstance(value, str):
        value = {"2": 2.0, "0.25": 0.25, " 3 ": 3.0}.get(value)
    return as_turn_weight(value) if not isinstance(value, bool) else None


def as_turn_weight(value):
    """The oracle for a turn's weight; None: refused."""
    if not isinstance(value, bool | int | float) or value != value:
        return None
    return float(value) if value == 0 or 1e-6 <= value <= 1e6 else None


def talk(rng, name):
    """A conversation of some turns in one of the formats, with the weights that its answers are given."""
    role, content = ("from", "value") if name == "sharegpt" else ("role", "content")
    names = ("user", "assistant") if name == "messages" else ("human", "gpt")
    turns, given = [], []
    for _ in range(rng.choice([1, 1, 2, 3])):
        thought = rng.choice(["", "", "<think>the fox</think>", "<think></think>", "<think>a"])
        turns.append({role: names[0], content: "the dog"})
        turns.append({role: names[1], content: f"{thought}{ANSWER} {len(turns)}"})
        given.append((thought, rng.choice(WEIGHTS) if rng.random() < 0.5 else 1))
        if rng.random() < 0.5 or given[-1][1] != 1:
            turns[-1]["weight"] = given[-1][1]
    return turns, given


@pytest.mark.parametrize("name", ["messages", "sharegpt", "chat_rounds", "prompt_response"])
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_rows_with_weights(template, name):
    """10,000 rows: every token has the weight of its turn, times that of thinking; or the row is refused."""
    rng, made = random.Random(template + name), tokenizer(TEMPLATES[template])
    combinations = [dict(zip(KEYS, values, strict=True)) for values in itertools.product(*KEYS.values())]
    encoders, happened = [], collections.Counter()
    for keys in combinations:
        task = TaskSection(name="t", data="x", format=name, **keys)
        encoders.append(RowEncoder(made, task, [GOOD[name] | {"worth": 1}], {}))
    column = {"sharegpt": "conversations"}.get(name, name)
    for number in range(10_000 // 8 // len(combinations) + 1):
        for keys, encoder in zip(combinations, encoders, strict=True):
            if name == "prompt_response":
                row, given = dict(GOOD[name]), [("", 1)]
            else:
                turns, given = talk(rng, name)
                row = {column: turns}
            if rng.random() < 0.9:
                row["worth"] = rng.choice(WEIGHTS)
            weights = [1.0 if weight is None else as_turn_weight(weight) for _, weight in given]
            worth = as_row_weight(row.get("worth")) if keys["row_weight"] else 1.0
            found = encoder([FileRow("rows", number + 1, row)])
            happened["rows"] += 1
            if worth == 0:
                assert not found.examples
                assert not found.problems
                happened["weight 0"] += 1
                continue
            bad = worth is None or None in weights or not any(weights)
            if bad or any(thought == "<think>a" for (thought, _), weight in zip(given, weights, strict=True)):
                unclosed = not bad and not found.problems  # to some templates a thought is text like any other
                assert unclosed or (found.problems and not found.examples), row
                happened["refused"] += 1
                if not unclosed:
                    assert len(str(found.problems[0][1])) < 700
                    continue
            assert not found.problems, (row, found.problems)
            learnt = [i for i, weight in enumerate(weights) if weight]
            expected = [weights[i] for i in (learnt if keys["loss_on"] == "all" else learnt[-1:])]
            seen = []
            for _, example in found.examples:
                assert example.row_weight == worth
                u = example.supervised.astype(float) if example.weights is None else example.weights
                assert ((u > 0) == example.supervised).all()
                ends = example.input_ids == made.convert_tokens_to_ids("<|im_end|>")
                seen += u[ends & example.supervised].tolist()  # each learnt turn ends with one
                known = np.array([0.0, *expected, *(weight * keys["thinking_weight"] for weight in expected)])
                assert np.isclose(u[:, None], known, rtol=1e-5, atol=0).any(axis=1).all(), row
            assert sorted(seen) == pytest.approx(sorted(expected), rel=1e-5), row
            happened["used"] += 1
    assert happened["rows"] >= 10_000 // 8
    assert happened["weight 0"] > 20
    assert min(happened["refused"], happened["used"]) > 100
