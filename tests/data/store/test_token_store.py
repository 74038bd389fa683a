"""The token store: what goes in comes out, once, whole, or not at all (R10, R18, R20)."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.formats.messages import Conversation
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import SourcePart
from mtft.data.store.build_store import build_store
from mtft.data.store.token_store import open_store, open_stores
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import encode
from mtft.data.tokenize.parallel_encode import RowEncoder, parallel_encode
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    say = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))  # noqa: E731
    return [{"prompt": f"{i} {say(5, 30)}", "response": say(1, 12)} for i in range(n)]


@pytest.fixture
def made():
    return tokenizer(TEMPLATES["chatml"])


def task(path, **options):
    return TaskSection(**({"name": "sums", "data": str(path)} | options))


def open_(path, made, tmp_path, *, which="train", task_options=None, **options):
    options = {"max_length": 512, "cache_dir": tmp_path / "cache"} | options
    return open_store(task(path, **(task_options or {})), which, made, **options)


def test_store_holds_what_encoding_gives(tmp_path, made):
    rows = pairs(300)
    store = open_(write_jsonl(tmp_path / "a.jsonl", rows), made, tmp_path)
    assert len(store) == store.num_examples == 300
    for i, row in enumerate(rows):
        talk = Conversation(
            ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]})
        )
        (expected,) = encode(made, ChatRenderer(made).render(talk))
        found = store.example(i)
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.supervised, expected.supervised)
        assert found.input_ids.dtype == np.int32
        assert store.lengths[i] == len(expected.input_ids)
        assert store.supervised[i] == expected.supervised.sum()
        assert store.ids[i] == f"a.jsonl:{i + 1}"
    assert store.stats["tokens"] == store.lengths.sum()
    assert store.stats["supervised"] == store.supervised.sum()
    assert store.stats["longest"] == store.lengths.max()
    assert store.stats["rows"] == store.stats["examples"] == 300
    with pytest.raises(IndexError):
        store.example(300)


def test_ids_of_rows_and_of_split_conversations(tmp_path):
    talk = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["a", "b", "c", "d"])]
    rows = [{"id": "first", "messages": talk}, {"messages": talk}, {"messages": talk[:2]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    store = open_(path, tokenizer(TEMPLATES["qwen3"]), tmp_path)
    assert list(store.ids) == ["first", "first#2", "a.jsonl:2", "a.jsonl:2#2", "a.jsonl:3"]
    assert store.stats["notes"]["split"] == 2
    assert store.ids[-1] == "a.jsonl:3"


def test_pickles_as_a_path(tmp_path, made):
    store = open_(write_jsonl(tmp_path / "a.jsonl", pairs(2000)), made, tmp_path)
    _ = store.lengths
    data = pickle.dumps(store)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).example(7).input_ids, store.example(7).input_ids)  # noqa: S301


def test_bytes_on_disk_are_bounded(tmp_path, made):
    store = open_(write_jsonl(tmp_path / "a.jsonl", pairs(2000)), made, tmp_path)
    assert store.nbytes() <= 2 * 2 * store.stats["tokens"]  # uint16: two bytes a token


def test_reused_when_equal_rebuilt_when_not(tmp_path, made):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(20))
    first = open_(path, made, tmp_path)
    stamp = (first.path / "ids.bin").stat().st_mtime_ns
    path.touch()
    again = open_(path, made, tmp_path)
    assert again.path == first.path
    assert (again.path / "ids.bin").stat().st_mtime_ns == stamp

    others = [
        open_(path, made, tmp_path, max_length=511),
        open_(path, made, tmp_path, too_long="drop"),
        open_(path, made, tmp_path, bad_rows="skip"),
        open_(path, made, tmp_path, task_options={"limit": 19}),
        open_(path, made, tmp_path, task_options={"format": {"prompt": "response", "response": "prompt"}}),
        open_(path, made, tmp_path, task_options={"template": "{{ prompt }}"}),
        open_(path, tokenizer(TEMPLATES["llama3"]), tmp_path),
    ]
    write_jsonl(path, pairs(20, seed=1))
    others.append(open_(path, made, tmp_path))
    assert len({store.fingerprint for store in [first, *others]}) == 9


def test_padding_left_on_in_the_tokenizer_changes_nothing(tmp_path, made):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(5))
    first = open_(path, made, tmp_path)
    made(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert open_(path, made, tmp_path).path == first.path


def test_added_tokens_and_large_vocabularies(tmp_path, made):
    """R18: ids beyond the old vocabulary, and beyond 16 bits."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "<new>", "response": "<new> fox"}])
    before = open_(path, made, tmp_path)
    made.add_tokens(["<new>"])
    after = open_(path, made, tmp_path)
    assert after.fingerprint != before.fingerprint
    assert made.convert_tokens_to_ids("<new>") in after.example(0).input_ids
    made.add_tokens([f"<t{i}>" for i in range(66_000)])
    write_jsonl(path, [{"prompt": "a", "response": "<t65999>"}])
    large = open_(path, made, tmp_path)
    assert large.meta["dtype"] == "int32"
    assert made.convert_tokens_to_ids("<t65999>") in large.example(0).input_ids


# --- long examples ---------------------------------------------------------------------------------------------------


def long_rows(tmp_path):
    return write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "fox " * 40, "response": "the end"}, {"prompt": "a", "response": "b"}],
    )


def test_truncate_left_keeps_the_answer_and_the_bos(tmp_path):
    made = tokenizer(TEMPLATES["llama3"])
    path = long_rows(tmp_path)
    whole = open_(path, made, tmp_path).example(0)
    store = open_(path, made, tmp_path, max_length=20)
    cut = store.example(0)
    np.testing.assert_array_equal(cut.input_ids, np.concatenate([whole.input_ids[:1], whole.input_ids[-19:]]))
    assert cut.supervised.sum() == whole.supervised.sum()
    assert (store.stats["truncated"], store.stats["dropped"], store.stats["longest"]) == (1, 0, 20)


def test_truncate_right_drops_what_has_lost_its_answer(tmp_path, made):
    store = open_(long_rows(tmp_path), made, tmp_path, max_length=20, too_long="truncate_right")
    assert store.num_examples == 1
    assert {k: store.stats[k] for k in ("truncated", "dropped", "unsupervised")} == {
        "truncated": 1,
        "dropped": 1,
        "unsupervised": 1,
    }
    assert list(store.ids) == ["a.jsonl:2"]


def test_drop(tmp_path, made):
    store = open_(long_rows(tmp_path), made, tmp_path, max_length=20, too_long="drop")
    assert (store.num_examples, store.stats["dropped"], store.stats["truncated"]) == (1, 1, 0)


def test_error_names_the_rows(tmp_path, made):
    with pytest.raises(UserError, match=r"1 examples are longer than max_length 20:\n +a.jsonl:1: \d+ tokens"):
        open_(long_rows(tmp_path), made, tmp_path, max_length=20, too_long="error")


def test_nothing_is_changed_silently(tmp_path):
    path = long_rows(tmp_path)
    store = open_(path, tokenizer(), tmp_path, max_length=30)
    said = "\n".join(store.warnings())
    assert "sums: the model has no chat template: the default one is used" in said
    assert "sums: 1 examples of 2 rows are cut at 30 tokens" in said
    store = open_(path, tokenizer(TEMPLATES["chatml"]), tmp_path)
    assert store.warnings() == []


# --- tasks that would train on nothing (R10) -------------------------------------------------------------------------


def test_no_supervised_token_is_refused_with_a_drawn_example(tmp_path, made):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "fox " * 40, "response": "the end"}] * 3)
    with pytest.raises(UserError) as caught:
        open_(path, made, tmp_path, max_length=20, too_long="truncate_right")
    assert "task sums has nothing to learn: no supervised token is left" in caught.value.what
    assert "⟦the end<|im_end|>⟧" in caught.value.what
    assert caught.value.where == "tasks.sums.data"


def test_all_too_long_is_refused(tmp_path, made):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "fox " * 40, "response": "the end"}] * 3)
    with pytest.raises(UserError, match="all 3 examples are longer than max_length 20"):
        open_(path, made, tmp_path, max_length=20, too_long="drop")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_empty_responses_are_refused_with_a_drawn_example(tmp_path, made, policy):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "fox", "response": ""}] * 12)
    with pytest.raises(UserError) as caught:
        open_(path, made, tmp_path, bad_rows=policy)
    assert "12 of 12 rows" in caught.value.what
    assert "a.jsonl:1: column 'response': is empty (got '')" in caught.value.what
    assert "... and 2 more" in caught.value.what
    assert "⟦(empty)<|im_end|>⟧" in caught.value.what


def test_no_rows(tmp_path, made):
    with pytest.raises(UserError, match="task sums has no rows"):
        open_(write_jsonl(tmp_path / "a.jsonl", []), made, tmp_path)


# --- bad rows ----------------------------------------------------------------------------------------------------


def with_bad(tmp_path, good, bad):
    lines = [json.dumps(row).encode() for row in pairs(good)]
    return tmp_path / "a.jsonl", lines[: good // 2] + bad + lines[good // 2 :]


def test_all_bad_rows_in_one_error(tmp_path, made):
    bad = [b'{"prompt": "a", ', b'{"prompt": "a", "respons": "b"}', b'{"prompt": 3, "response": "b"}', b'"\xff"']
    path, lines = with_bad(tmp_path, 4, bad)
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as caught:
        open_(path, made, tmp_path)
    text = str(caught.value)
    assert "4 of 8 rows" in text
    assert "a.jsonl:3: broken JSON" in text
    assert "a.jsonl:4: column 'response': missing; nearest: 'respons'" in text
    assert "a.jsonl:5: column 'prompt': expected text, found a whole number (got 3)" in text
    assert "a.jsonl:6: invalid UTF-8" in text
    assert not list((tmp_path / "cache" / "stores").glob("*tmp*"))


def test_skip_counts_up_to_one_percent(tmp_path, made):
    path, lines = with_bad(tmp_path, 99, [b"{"])
    path.write_bytes(b"\n".join(lines))
    store = open_(path, made, tmp_path, bad_rows="skip")
    assert (store.num_examples, store.stats["skipped"]) == (99, 1)
    path.write_bytes(b"\n".join([*lines, b"["]))
    with pytest.raises(UserError, match=r"2 of 101 rows of a.jsonl can't be used, more than the 1%"):
        open_(path, made, tmp_path, bad_rows="skip")


def test_what_the_template_refuses_is_a_bad_row(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}])
    with pytest.raises(
        UserError, match=r"a.jsonl:1: message 2 \(user\): the chat template refuses it: roles must alternate"
    ):
        open_(path, tokenizer(TEMPLATES["mistral"]), tmp_path)


def test_full_disk_is_one_clear_block(tmp_path, made):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="can't be written") as caught:
        open_(write_jsonl(tmp_path / "a.jsonl", pairs(2)), made, tmp_path)
    assert "MTFT_CACHE" in caught.value.do


def test_bad_data_of_all_tasks_in_one_error(tmp_path, made):
    write_jsonl(tmp_path / "good.jsonl", pairs(5))
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "respnse": "b"}])
    names = {"a": "bad", "b": "good", "c": "none"}
    recipe = Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": [{"name": task, "data": str(tmp_path / f"{file}.jsonl")} for task, file in names.items()],
            "train": {"steps": 1},
            "output": {"dir": "out"},
        }
    )
    with pytest.raises(UserError) as caught:
        open_stores(recipe, made, "train", cache_dir=tmp_path / "cache")
    assert "the data of 2 tasks can't be used" in caught.value.what
    assert "'response' is near 'respnse'" in caught.value.what
    assert "none.jsonl" in caught.value.what
    assert "tasks.b" not in caught.value.what


# --- one writer, never half a store (R20) -------------------------------------------------------------------------

WRITE = """
import sys
from pathlib import Path
from mtft.data.readers.sources import SourcePart
from mtft.data.store.token_store import open_store, open_stores
from mtft.recipe.schema.task import TaskSection
from tests.data.toy_examples import TEMPLATES, tokenizer
import mtft.data.store.build_store as build
folder = Path(sys.argv[1])
if len(sys.argv) > 2:  # dawdle in the middle of the writing
    import time
    finish = build.StoreWriter.finish
    def slow(self, meta):
        (folder / "writing").touch()
        time.sleep(60)
        finish(self, meta)
    build.StoreWriter.finish = slow
store = open_store(TaskSection(name="sums", data=str(folder / "a.jsonl")), "train",
                   tokenizer(TEMPLATES["chatml"]), max_length=512, cache_dir=folder / "cache")
print(store.num_examples, store.path.stat().st_ino)
"""


def start(tmp_path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path), *arguments], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )


@pytest.mark.slow
def test_kill_9_while_writing(tmp_path, made):
    write_jsonl(tmp_path / "a.jsonl", pairs(200))
    victim = start(tmp_path, "slowly")
    for _ in range(600):
        if (tmp_path / "writing").exists():
            break
        time.sleep(0.1)
    stores = tmp_path / "cache" / "stores"
    assert len(list(stores.glob("*tmp*"))) == 1
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    store = open_(tmp_path / "a.jsonl", made, tmp_path)
    assert store.num_examples == 200
    assert [path.name for path in stores.iterdir()] == [store.path.name]


@pytest.mark.slow
def test_many_processes_share_one_store(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(200))
    racers = [start(tmp_path) for _ in range(3)]
    printed = {racer.communicate()[0] for racer in racers}
    assert len(printed) == 1
    assert printed.pop().startswith("200 ")
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 1


@pytest.mark.slow
def test_many_processes_write_the_same_bytes(tmp_path, made, monkeypatch):
    monkeypatch.setattr("mtft.data.tokenize.parallel_encode.BLOCK_ROWS", 16)
    rows = pairs(300)
    rows[77] = {"prompt": "x", "response": ""}
    parts = [SourcePart("a.jsonl", str(write_jsonl(tmp_path / "a.jsonl", rows)))]
    written = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        options = {"max_length": 40, "too_long": "truncate_left", "bad_rows": "skip", "limit": None, "total": 300}
        build_store(
            folder, task("x", template="{{ prompt }}!"), "train", parts, made, "f", **options, processes=processes
        )
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert json.loads(written[0]["meta.json"])["stats"]["skipped"] == 1


@pytest.mark.slow
def test_dead_workers_cost_time_not_the_build(made):
    rows = [{"prompt": "a", "response": f"fox {i}"} for i in range(6)]
    encoder = RowEncoder(made, task("x"), rows, {})
    blocks = [[FileRow("a", i + 1, row)] for i, row in enumerate(rows)]
    with parallel_encode(encoder, 2) as run:
        found = []
        for block, encoded in run(blocks, lambda: True):
            found.append((block[0].line, made.decode(encoded.examples[0][1].input_ids)))
            for child in multiprocessing.active_children():
                child.kill()
    assert [line for line, _ in found] == [1, 2, 3, 4, 5, 6]
    assert all(f"fox {line - 1}" in text for line, text in found)


def _open_in_child(path, cache, queue):
    store = open_store(task(path), "train", tokenizer(TEMPLATES["chatml"]), max_length=512, cache_dir=cache)
    queue.put((store.num_examples, store.path.name))


def test_two_writers_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(100))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_open_in_child, args=(path, tmp_path / "cache", queue)) for _ in range(2)]
    for child in children:
        child.start()
    found = {queue.get(timeout=600) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 1
    assert [p.name for p in (tmp_path / "cache" / "stores").iterdir()] == [found.pop()[1]]
