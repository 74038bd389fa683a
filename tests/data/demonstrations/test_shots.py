"""Demonstrations: whose they are, where they stand, that none of them is learnt, and that they never push a row out."""

import itertools
import random
import sys

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.demonstrations.pool import (
    PoolSource,
    pool_task,
    prompt_of,
    read_pool,
    row_keys,
    with_demonstrations,
)
from mtft.data.formats.messages import Conversation
from mtft.data.formats.task_reader import TaskReader, first_rows
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import SourcePart
from mtft.data.store.build_store import build_store
from mtft.data.store.token_store import open_store, open_stores
from mtft.data.tokenize.encode import runs
from mtft.data.tokenize.parallel_encode import RowEncoder
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection
from tests.data.tokenize.stock import stock
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

MADE = tokenizer(TEMPLATES["chatml"])


def task(path, name="sums", **options):
    return TaskSection(name=name, data=str(path), **options)


def rows(count, seed=0, prompts=None):
    """Rows of which several have one prompt, with and without other spaces, and some are the same altogether."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        asked = rng.randrange(prompts or count)
        words = " ".join(rng.choice(["fox", "dog", "forest", "morning"]) for _ in range(asked % 5))
        row = {"prompt": rng.choice(["", " ", "\n"]) + f"ask {asked} {words}", "response": f"answer {asked % 7} of {i}"}
        made.append(rng.choice(made) if made and rng.random() < 0.2 else row)
    return made


def pool_and_reader(part, section, seed=5):
    parts = [part] if isinstance(part, SourcePart) else part
    peeked, names = first_rows(parts)
    return read_pool(section, PoolSource(section, parts), seed), TaskReader(section, peeked, names.get, seed)


def part_of(path):
    return SourcePart(path.name, str(path))


@pytest.mark.parametrize("retrieve", ["random", "bm25"])
@pytest.mark.parametrize("templates", [None, ("{{ prompt }}", "Say: {{ prompt }}", "{{ prompt | upper }}")])
def test_a_row_is_never_its_own_demonstration(tmp_path, retrieve, templates):
    if retrieve == "bm25":
        pytest.importorskip("bm25s")
    part = part_of(write_jsonl(tmp_path / "a.jsonl", rows(2000, prompts=400)))
    section = task("x", template=templates, shots={"n": 3, "retrieve": retrieve})
    pool, reader = pool_and_reader(part, section)
    plain = lambda text: " ".join(text.removeprefix("Say: ").lower().split())  # noqa: E731
    shown = 0
    for row in part.rows():
        conversation = reader(row)
        chosen = pool.choose(f"{row.file}:{row.line}", conversation, row_keys(reader, row, conversation))
        asked = [plain(turns[0]["content"]) for turns in chosen]
        assert plain(row.data["prompt"]) not in asked, "another spelling of its own prompt"
        assert len(set(asked)) == len(asked) == 3
        shown += len(chosen)
    assert shown == 6000


def test_a_prompt_that_another_task_has_too_is_not_shown(tmp_path):
    """Two tasks that read the same rows (Distilling Step-by-Step): the other's answer would give away this one's."""
    data = [{"q": f"question {i % 10}", "label": f"label {i}", "why": f"because {i}"} for i in range(40)]
    part = part_of(write_jsonl(tmp_path / "a.jsonl", data))
    label = task("x", "label", format={"prompt": "q", "response": "label"}, shots={"n": 4, "from": "why"})
    why = task("x", "why", format={"prompt": "q", "response": "why"})
    peeked, names = first_rows([part])
    reader = TaskReader(label, peeked, names.get)
    pool = read_pool(label, PoolSource(why, [part]), 0)
    for row in part.rows():
        conversation = reader(row)
        chosen = pool.choose(f"{row.file}:{row.line}", conversation, row_keys(reader, row, conversation))
        assert len(chosen) == 4
        for turns in chosen:
            assert turns[0]["content"] != row.data["q"]
            assert turns[1]["content"].startswith("because")


def test_the_same_row_in_another_task_is_not_shown(tmp_path):
    """Known by its content, where another task asks with other words."""
    data = [{"q": f"question {i}", "label": f"label {i}", "why": f"because {i}."} for i in range(8)]
    part = part_of(write_jsonl(tmp_path / "a.jsonl", data))
    label = task("x", "label", format={"prompt": "q", "response": "label"}, shots={"n": 7, "from": "why"})
    why = task("x", "why", template="Why {{ q }}?", format={"response": "why"})
    reader = TaskReader(label, data, lambda column: None)
    pool = read_pool(label, PoolSource(why, [part]), 0)
    for i, row in enumerate(part.rows()):
        conversation = reader(row)
        chosen = pool.choose(f"{row.file}:{row.line}", conversation, row_keys(reader, row, conversation))
        assert {turns[1]["content"] for turns in chosen} == {f"because {j}." for j in range(8) if j != i}


def texts(store, made=MADE):
    return [made.decode(store.example(i).input_ids.tolist()) for i in range(len(store))]


def test_held_out_rows_are_no_demonstrations(tmp_path):
    """Not even where the training rows hold a copy of them, nor those of other held-out rows."""
    train = [{"prompt": f"train {i}", "response": f"yes {i}"} for i in range(30)]
    held = [{"prompt": f"held {i}", "response": f"no {i}"} for i in range(30)]
    copied = [*train, held[3] | {"id": 7}]
    section = task(write_jsonl(tmp_path / "a.jsonl", copied), shots={"n": 5},
                   eval_data=str(write_jsonl(tmp_path / "e.jsonl", held)))  # fmt: skip
    store = open_store(section, "eval", MADE, max_length=512, cache_dir=tmp_path / "cache")
    assert len(store) == 30
    for i, text in enumerate(texts(store)):
        shown = text[: text.rindex("<|im_start|>user")]
        assert text.count("<|im_start|>user") == 6
        assert f"held {i}<" not in shown
        assert all(f"held {j}<" not in shown for j in range(30) if j != 3)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma", "gemma3", "phi3", "deepseekv3", "qwen2_5", "gptoss"])
def test_the_answers_stay_what_is_learnt(name, tmp_path):
    """On stock templates: the same tokens are learnt as without, behind demonstrations and the system prompt."""
    made = stock(name)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"ask {i}", "response": f"answer {i}"} for i in range(20)])
    options = {"max_length": 4096, "cache_dir": tmp_path / "cache"}
    bare = open_store(task(path), "train", made, **options)
    store = open_store(task(path, shots={"n": 2}, system="be brief"), "train", made, **options)
    assert len(bare) == len(store) == 20
    for i in range(20):
        ids, learnt = store.example(i).input_ids, store.example(i).supervised
        before, its = bare.example(i).input_ids, bare.example(i).supervised
        np.testing.assert_array_equal(ids[learnt], before[its])
        text = made.decode(ids.tolist())
        assert text.count("answer") == 3
        assert text.count("be brief") == 1
        assert 0 < text.index("be brief") < text.index("answer")
        assert f"answer {i}" in text[text.rindex("answer") :]


def test_demonstrations_stand_before_the_first_turn(tmp_path):
    talk = [
        ("system", "keep it short"),
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second"),
        ("assistant", "two"),
    ]
    talks = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in talk]} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", talks)
    store = open_store(task(path, shots={"n": 1}), "train", MADE, max_length=512, cache_dir=tmp_path / "cache")
    for i, text in enumerate(texts(store)):
        roles = [piece.split("\n")[0] for piece in text.split("<|im_start|>")[1:]]
        assert roles == ["system", *["user", "assistant"] * 4]
        assert text.startswith(f"<|im_start|>system\nkeep it short {i}<|im_end|>")
        assert text.count("keep it short") == 1
        learnt = [part for part, own in runs(MADE, store.example(i)) if own]
        assert learnt == [f"one {i}<|im_end|>", f"two {i}<|im_end|>"]


def test_only_turns_of_user_and_assistant_are_shown(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    asks = {"role": "user", "content": "odd"}
    odd = [
        [asks, {"role": "assistant", "content": "", "tool_calls": [call]}],
        [{"role": "assistant", "content": "hello"}, asks, {"role": "assistant", "content": "b"}],
        [asks, asks, {"role": "assistant", "content": "b"}],
    ]
    fine = [
        {"role": "developer", "content": "no"},
        {"role": "user", "content": "fine"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ngood", "name": "x"},
    ]
    part = part_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in (*odd, fine)]))
    pool, _ = pool_and_reader(part, task("x", shots={"n": 2}))
    assert pool.turns == [
        ({"role": "user", "content": "fine"}, {"role": "assistant", "content": "good", "train": False})
    ]
    part = part_of(write_jsonl(tmp_path / "b.jsonl", [{"messages": talk} for talk in odd]))
    with pytest.raises(UserError, match=r"can be a demonstration") as caught:
        pool_and_reader(part, task("x", shots={"n": 2}))
    assert caught.value.where == "tasks.sums.shots"


def test_rows_that_count_nothing_are_not_shown(tmp_path):
    """And what else a task says about weights holds for the row, not for what stands in front of it."""
    data = [{"prompt": f"p{i}", "response": f"r{i}", "w": i % 2} for i in range(10)]
    path = write_jsonl(tmp_path / "a.jsonl", data)
    options = {"max_length": 512, "cache_dir": tmp_path / "cache"}
    store = open_store(task(path, shots={"n": 2}, row_weight="w"), "train", MADE, **options)
    assert len(store) == 5
    for text in texts(store):
        assert not any(f"p{i}<" in text for i in range(0, 10, 2))
        assert text.count("<|im_start|>user") == 3
    weighted = open_store(task(path, shots={"n": 2}), "train", MADE, **options, pool=task(path, row_weight="w"))
    bare = open_store(task(path, shots={"n": 2}), "train", MADE, **options)
    assert weighted.fingerprint != bare.fingerprint
    talks = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a", "weight": 0.5}]}
             for i in range(4)]  # fmt: skip
    path = write_jsonl(tmp_path / "b.jsonl", talks)
    half = open_store(task(path, shots={"n": 1}), "train", MADE, **options)
    for i in range(4):
        example = half.example(i)
        assert set(example.weights[example.supervised].tolist()) == {0.5}
        assert example.supervised.sum() == 2, "the answer and its end, once"


def test_a_greeting_has_no_place_for_them():
    greeting = ({"role": "assistant", "content": "hello"}, {"role": "user", "content": "a"})
    shown = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False})
    assert with_demonstrations(Conversation(greeting), [shown]) is None
    assert with_demonstrations(Conversation(greeting[1:]), [shown]).messages == (*shown, greeting[1])


def test_the_farthest_are_left_out_before_a_row_is_cut(tmp_path):
    pytest.importorskip("bm25s")
    words = [f"w{i} " * 8 for i in range(40)]
    data = [{"prompt": " ".join(words[i : i + 8]), "response": f"r{i}"} for i in range(30)]
    data.append({"prompt": "w1 " * 400, "response": "longest"})
    path = write_jsonl(tmp_path / "a.jsonl", data)
    section = task(path, shots={"n": 4, "retrieve": "bm25"})
    whole = open_store(section, "train", MADE, max_length=5000, cache_dir=tmp_path / "cache")
    bare = open_store(task(path), "train", MADE, max_length=5000, cache_dir=tmp_path / "cache")
    limit = 700
    cut = open_store(section, "train", MADE, max_length=limit, cache_dir=tmp_path / "cache")
    fewer = 0
    for i in range(30):
        ids, all_ids, alone = (store.example(i).input_ids.tolist() for store in (cut, whole, bare))
        assert len(ids) <= limit
        assert ids == all_ids[-len(ids) :], "a row with fewer is the end of the row with all: the nearest stay"
        assert ids[-len(alone) :] == alone, "the row itself stays whole"
        shown = MADE.decode(ids).count("assistant") - 1
        fewer += shown < 4
        if shown < 4:  # one more would not have fitted
            more = MADE.decode(all_ids).split("<|im_start|>user")[-shown - 2 :]
            assert len(MADE("<|im_start|>user".join(["", *more]), add_special_tokens=False)["input_ids"]) > limit
    assert fewer > 0
    assert cut.stats["notes"]["shots_left_out"] == fewer + 1
    assert any(f"({fewer + 1} of 31 rows)" in line for line in cut.warnings())
    assert cut.stats["truncated"] == 1
    assert cut.example(30).input_ids.tolist() == bare.example(30).input_ids.tolist()[-limit:], (
        "too long by itself: cut as ever"
    )


def test_too_few_other_rows_are_said(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i % 3}", "response": "r"} for i in range(9)])
    store = open_store(task(path, shots={"n": 5}), "train", MADE, max_length=512, cache_dir=tmp_path / "cache")
    assert store.stats["notes"]["shots_few"] == 9
    assert all(text.count("<|im_start|>user") == 3 for text in texts(store))


def test_bm25_is_the_written_out_formula(tmp_path):
    pytest.importorskip("bm25s")
    from mtft.data.demonstrations.prompt_index import K1, B, PromptIndex, words

    rng = np.random.default_rng(0)
    vocabulary = ["fox", "dog", "Forest", "the", "日", "本", "a1", "x_y"]
    documents = [" ".join(rng.choice(vocabulary, rng.integers(1, 12))) for _ in range(60)] + ["...", "日本の森"]
    index = PromptIndex(documents, "x")
    split = [words(text) for text in documents]
    assert words("日本の森 Fox x_y") == ["日", "本", "の", "森", "fox", "x_y"]
    mean = np.mean([len(d) for d in split])

    def score(query, d):
        total = 0.0
        for t in set(words(query)):
            n = sum(t in other for other in split)
            idf = np.log(1 + (len(split) - n + 0.5) / (n + 0.5))
            total += idf * d.count(t) / (d.count(t) + K1 * (1 - B + B * len(d) / mean)) if n else 0.0
        return total

    for query in ("the fox", "日本", "forest dog dog unknown", "unknown", "", "..."):
        expected = np.array([score(query, d) for d in split])
        found = list(index.ranked(query))
        assert sorted(found) == np.flatnonzero(expected > 0).tolist()
        assert np.all(np.diff(expected[found]) < 1e-6)
        for a, b in itertools.pairwise(found):
            assert a < b or expected[a] > expected[b], "of equals the earlier stands first"
    assert list(PromptIndex(["!", "?"], "x").ranked("fox")) == []


def test_a_ranking_goes_on_behind_its_first_part():
    pytest.importorskip("bm25s")
    from mtft.data.demonstrations.prompt_index import FIRST, PromptIndex

    index = PromptIndex([f"fox {'dog ' * (i % 9)}" for i in range(3 * FIRST)], "x")
    found = list(index.ranked("fox"))
    assert sorted(found) == list(range(3 * FIRST))
    assert [i % 9 for i in found] == sorted(i % 9 for i in range(3 * FIRST))


def test_bm25_shows_what_is_most_alike_last(tmp_path):
    pytest.importorskip("bm25s")
    data = [
        {"prompt": p, "response": "r"} for p in ("red fox runs", "red fox sleeps", "a dog", "red dog", "red fox ran")
    ]
    path = write_jsonl(tmp_path / "a.jsonl", data)
    section = task(path, shots={"n": 3, "retrieve": "bm25"})
    store = open_store(section, "train", MADE, max_length=512, cache_dir=tmp_path / "cache")
    asked = [part.split("<|im_end|>")[0] for part in texts(store)[0].split("user\n")[1:]]
    assert asked == ["red dog", "red fox ran", "red fox sleeps", "red fox runs"]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def build(folder, section, parts, *, processes=1, which="train", pool=None, made=MADE):
    folder.mkdir()
    options = {"max_length": 90, "too_long": "truncate_left", "bad_rows": "skip", "limit": None, "total": 300}
    source = PoolSource(section, parts) if section.shots else None
    build_store(folder, section, which, parts, made, "f", **options, processes=processes, seed=3, pool=pool or source)
    return bytes_of(folder)


def everything(retrieve, **options):
    return {"template": ("{{ prompt }}", "Q: {{ prompt }}"), "system": "be brief", **options,
            "shots": {"n": 3, "retrieve": retrieve}}  # fmt: skip


@pytest.mark.parametrize("retrieve", ["random", "bm25"])
def test_the_order_of_work_does_not_matter(tmp_path, monkeypatch, retrieve):
    if retrieve == "bm25":
        pytest.importorskip("bm25s")
    parts = [part_of(write_jsonl(tmp_path / "a.jsonl", rows(300)))]
    section = task("x", **everything(retrieve))
    whole = build(tmp_path / "whole", section, parts)
    monkeypatch.setattr("mtft.data.tokenize.parallel_encode.BLOCK_ROWS", 7)
    assert build(tmp_path / "blocks", section, parts) == whole
    # and backwards, row by row, in an encoder that has seen other rows before
    peeked, names = first_rows(parts)
    pool = read_pool(section, PoolSource(section, parts), 3)
    encoder = RowEncoder(MADE, section, peeked, names, 3, pool, 90)
    encoded = {row.line: encoder([row]).examples[0][1] for row in reversed(list(parts[0].rows()))}
    ids = np.concatenate([encoded[line].input_ids[-90:] for line in range(1, 301)])
    np.testing.assert_array_equal(np.frombuffer(whole["ids.bin"], np.uint16), ids)


@pytest.mark.slow
@pytest.mark.parametrize("retrieve", ["random", "bm25"])
def test_many_processes_give_the_same_demonstrations(tmp_path, monkeypatch, retrieve):
    if retrieve == "bm25":
        pytest.importorskip("bm25s")
    monkeypatch.setattr("mtft.data.tokenize.parallel_encode.BLOCK_ROWS", 16)
    parts = [part_of(write_jsonl(tmp_path / "a.jsonl", rows(300)))]
    section = task("x", **everything(retrieve))
    one, two = (build(tmp_path / str(count), section, parts, processes=count) for count in (1, 2))
    assert one == two


def test_the_fingerprint_knows_the_demonstrations(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(20))
    other = write_jsonl(tmp_path / "b.jsonl", rows(20, seed=1))
    held = str(write_jsonl(tmp_path / "e.jsonl", [{"prompt": "held", "response": "out"}]))
    options = {"max_length": 512, "cache_dir": tmp_path / "cache"}

    def state(which="eval", seed=0, pool=None, **keys):
        return open_store(task(path, eval_data=held, **keys), which, MADE, **options, seed=seed, pool=pool).fingerprint

    bare = state()
    assert state(seed=1) == bare, "a seed that draws nothing is none of its business"
    assert state(template=["{{ prompt }}"]) == state(template="{{ prompt }}")
    shots = {"n": 2}
    kinds = [
        bare, state(shots=shots), state(shots={"n": 3}), state(shots=shots, seed=1),
        state(shots=shots, pool=task(other)), state(shots=shots, pool=task(path, limit=5)),
        state(shots=shots, pool=task(path, template="{{ prompt }}!")),
        state(system="a"), state(system="b"), state(template=["{{ prompt }}", "Q {{ prompt }}"]),
        state(template=["{{ prompt }}", "Q {{ prompt }}"], seed=1),
    ]  # fmt: skip
    assert len(set(kinds)) == len(kinds)
    before = state(shots=shots)
    write_jsonl(path, [*rows(20), {"prompt": "new", "response": "row"}])
    assert state(shots=shots) != before, "the held-out rows are the same, and what stands in front of them is not"
    assert state() == bare


def recipe(tmp_path, *tasks, seed=17):
    return Recipe.model_validate({
        "name": "r", "seed": seed, "model": {"path": "m"}, "tasks": list(tasks),
        "train": {"steps": 1, "max_length": 512}, "output": {"dir": str(tmp_path / "run")},
    })  # fmt: skip


def test_demonstrations_of_another_task_and_of_none(tmp_path):
    said = {name: [{"prompt": f"{name}{i}", "response": f"{name} says"} for i in range(9)] for name in "abc"}
    a, b, c = (str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in said.items())
    first = {"name": "a", "data": a, "shots": {"n": 2, "from": "b"}}
    inline = {"name": "a", "data": a, "shots": {"n": 2, "from": {"data": b}}}
    second = {"name": "b", "data": b, "shots": {"n": 1, "from": {"data": c, "template": "Q {{ prompt }}", "limit": 4}}}
    one = recipe(tmp_path, first, second)
    assert pool_task(one, one.tasks[0]).name == "b"
    stores = open_stores(one, MADE, "train", cache_dir=tmp_path / "cache")
    assert all(text.count("b says") == 2 and text.count("a says") == 1 for text in texts(stores[0]))
    for text in texts(stores[1]):
        assert text.count("Q c") == text.count("c says") == 1
        assert not any(f"Q c{i}" in text for i in range(4, 9)), "limit"
    again = open_stores(recipe(tmp_path, inline), MADE, "train", cache_dir=tmp_path / "cache")
    assert again[0].fingerprint == stores[0].fingerprint, "by name or written out: the same rows"
    other = open_stores(recipe(tmp_path, first, second, seed=18), MADE, "train", cache_dir=tmp_path / "cache")
    assert texts(other[0]) != texts(stores[0])


@pytest.mark.parametrize("key", [{"shots": {"n": 1}}, {"system": "be brief"}, {"chat_template_kwargs": {"x": 1}}])
def test_plain_text_has_no_prompt(tmp_path, key):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"plain {i}"} for i in range(4)])
    made = tokenizer("{{ x }}" + TEMPLATES["chatml"])
    with pytest.raises(UserError, match="plain text") as caught:
        open_store(task(path, **key), "train", made, max_length=64, cache_dir=tmp_path / "cache")
    assert caught.value.where == f"tasks.sums.{next(iter(key))}"


def test_the_pool_is_bounded(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r" * 10} for i in range(50)])
    section = task("x", shots={"n": 1})
    monkeypatch.setattr("mtft.data.demonstrations.pool.MOST_ROWS", 20)
    pool, _ = pool_and_reader(part_of(path), section)
    assert len(pool.turns) == 20
    monkeypatch.setattr("mtft.data.demonstrations.pool.MOST_CHARACTERS", 100)
    pool, _ = pool_and_reader(part_of(path), section)
    assert len(pool.turns) == 9, "12 characters each: the ninth is beyond"


def test_a_draw_is_a_fair_draw(tmp_path):
    """Each of 20 rows is shown about as often as any other: 4,000 rows with one demonstration each."""
    section = task("x", shots={"n": 1})
    part = part_of(write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(20)]))
    pool, reader = pool_and_reader(part, section)
    counts = dict.fromkeys(pool.prompts, 0)
    for line in range(4000):
        row = FileRow("b.jsonl", line, {"prompt": "other", "response": "x"})
        talk = reader(row)
        (turns,) = pool.choose(f"{row.file}:{row.line}", talk, row_keys(reader, row, talk))
        counts[pool.prompts[pool.turns.index(turns)]] += 1
    spread = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert spread < 43.8, "chi-square with 19 degrees of freedom, at 0.001"


def test_bad_rows_are_told_as_ever(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": ""}, *rows(30)])
    with pytest.raises(UserError, match="is empty") as caught:
        open_store(task(path, shots={"n": 2}), "train", MADE, max_length=512, cache_dir=tmp_path / "cache")
    assert "a.jsonl:1" in caught.value.what


def test_without_the_package_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    path = write_jsonl(tmp_path / "a.jsonl", rows(5))
    section = task(path, shots={"n": 1, "retrieve": "bm25"})
    with pytest.raises(UserError, match="bm25s is not installed") as caught:
        open_store(section, "train", MADE, max_length=64, cache_dir=tmp_path / "cache")
    assert caught.value.where == "tasks.sums.shots.retrieve"
    assert caught.value.do == "pip install 'mtft[retrieve]', or retrieve: random"


def test_prompts_are_compared_by_their_words():
    talk = ({"role": "system", "content": "s"}, {"role": "user", "content": " a\n b"}, {"role": "user", "content": "c"})
    assert prompt_of(Conversation(talk)) == "a b c"
