"""System prompts, options of the chat template, and templates by row: the same text wherever a row is rendered."""

import random
from collections import Counter

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.demonstrations.pool import PoolSource, read_pool
from mtft.data.formats.messages import Conversation
from mtft.data.formats.task_reader import TaskReader, template_of, with_system_prompt
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import SourcePart
from mtft.data.store.token_store import open_store
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import clear_first_token
from mtft.data.tokenize.parallel_encode import RowEncoder
from mtft.data.tokenize.template_options import names_read
from mtft.recipe.load import fingerprint
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection
from tests.data.tokenize.stock import STOCK, random_row, stock
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

MADE = tokenizer(TEMPLATES["chatml"])
ASK = ({"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"})


def task(path, **options):
    return TaskSection(name="sums", data=str(path), **options)


def test_without_the_keys_fingerprints_are_those_of_before(tmp_path):
    """Constants of the version before these keys: its stores, ledgers and finished runs stay what they are."""
    rows = [
        {"prompt": "the quick fox", "response": "the lazy dog"},
        {"prompt": "what is", "response": "the answer"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"max_length": 64, "cache_dir": tmp_path / "c", "digest": "tokenizer"}
    found = [
        open_store(task(path, **keys), "train", MADE, **options).fingerprint
        for keys in ({}, {"template": "{{ prompt }}?"})
    ]  # fmt: skip
    assert found == [
        "4d4e4205d0bca69e9898192544c8084bff62056ceb7bf9ce152af0500342734b",
        "c0030bf2a3a226c0a07126786add64d45d145a6704e717bb095d8693a918884d",
    ]
    values = {
        "name": "a", "model": {"path": "m"}, "train": {"steps": 3}, "output": {"dir": "o"},
        "tasks": [{"name": "sums", "data": "a.jsonl"}, {"name": "b", "data": ["b.jsonl"], "template": "{{ x }}"}],
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    values["tasks"][0]["auxiliary"] = True
    assert fingerprint(recipe) != fingerprint(Recipe.model_validate(values))
    bare = recipe.model_dump(mode="json")["tasks"][0]
    assert {"system", "chat_template_kwargs", "shots", "auxiliary"} <= bare.keys()
    assert fingerprint(recipe) == "b58db676aec94a1c93f387530bfc329fffb589d7d4a7b124650bdb96475b366e"


def test_a_system_prompt_stands_where_there_is_none(tmp_path):
    asks = [dict(message) for message in ASK]
    rows = [
        {"messages": asks},
        {"messages": [{"role": "system", "content": "its own"}, *asks]},
        {"messages": [{"role": "developer", "content": "its own"}, *asks]},
        {"messages": [*asks, {"role": "system", "content": "in the middle"}, *asks]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    store = open_store(task(path, system="be brief"), "train", MADE, max_length=64, cache_dir=tmp_path / "c")
    texts = [MADE.decode(store.example(i).input_ids.tolist()) for i in range(4)]
    assert texts[0].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user")
    assert [text.count("be brief") for text in texts] == [1, 0, 0, 0]
    assert with_system_prompt(Conversation((), text="plain"), "be brief").messages == ()
    assert with_system_prompt(Conversation(()), "be brief").messages == ()


@pytest.mark.parametrize("name", ["gemma", "qwen2_5", "llama3_1", "qwen3", "phi3"])
def test_a_default_system_prompt_is_like_one_of_the_row(name):
    """Also where the template has no place for it: Gemma's moves into the first turn of the user."""
    renderer = ChatRenderer(stock(name))
    talk = Conversation(ASK)
    ours = renderer.render(with_system_prompt(talk, "be brief"))
    rows = renderer.render(Conversation(({"role": "system", "content": "be brief"}, *ASK)))
    assert ours == rows
    assert "be brief" in ours[0].text
    assert ("system_folded" in renderer.notes) == (name == "gemma")


def test_qwen3_without_thinking(tmp_path):
    """enable_thinking: false, in training rows and held-out ones alike, and in what is asked before the answer."""
    made = stock("qwen3")
    on, off = ChatRenderer(made), ChatRenderer(made, {"enable_thinking": False})
    assert on.prompt(ASK[:1]).endswith("<|im_start|>assistant\n")
    assert off.prompt(ASK[:1]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    (example,) = off.render(Conversation(ASK))
    assert example.text[: example.spans[0][0]] == off.prompt(ASK[:1])
    assert example.text[slice(*example.spans[0])] == "answer<|im_end|>"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ask", "response": "answer"}])
    section = task(path, eval_data=str(path), chat_template_kwargs={"enable_thinking": False})
    for which in ("train", "eval"):
        store = open_store(section, which, made, max_length=64, cache_dir=tmp_path / "c")
        ids, learnt = store.example(0).input_ids, store.example(0).supervised
        assert made.decode(ids[learnt].tolist()) == "answer<|im_end|>"
        assert made.decode(ids.tolist()) == example.text.rstrip("\n") or made.decode(ids.tolist()) == example.text


def test_lists_reach_the_template(tmp_path):
    made = stock("llama3_1")
    options = {"date_string": "1 May 2030", "builtin_tools": ("brave_search", "code_interpreter")}
    text = ChatRenderer(made, options).prompt(ASK[:1])
    assert "1 May 2030" in text
    assert "Tools: brave_search" in text


READ = {
    "qwen3": {"enable_thinking"}, "llama3_1": {"builtin_tools", "custom_tools", "date_string", "tools_in_user_message"},
    "gemma3": set(), "gptoss": {"builtin_tools", "model_identity", "reasoning_effort"}, "llama3": set(),
    "qwen3_6": {"add_vision_id", "enable_thinking", "preserve_thinking"}, "deepseekv3": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_the_names_that_a_stock_template_reads(name):
    """Read off the templates by hand; names that they set themselves in a branch (`content`) are none of them."""
    from mtft.recipe.rules.task_rules import GIVEN

    assert names_read(stock(name).chat_template) - {*GIVEN} == READ[name]


@pytest.mark.parametrize("source, read", [
    ("{{ a }}{% set a = 1 %}{{ a }}", {"a"}),
    ("{% if b %}{% set a = 1 %}{% endif %}{{ a }}", {"b"}),
    ("{% set a = a | default(1) %}{{ a }}", {"a"}),
    ("{% if a is not defined %}{% set a = 1 %}{% endif %}{{ a }}", {"a"}),
    ("{% for x in a %}{{ x }}{% if x %}{% break %}{% endif %}{% endfor %}", {"a"}),
    ("{% set x %}{{ a }}{% endset %}{{ x }}", {"a"}),
    ("{% macro f(x) %}{{ x }}{{ a }}{% endmacro %}{{ f(b) }}", {"a", "b"}),
    ("{% generation %}{{ a }}{% endgeneration %}", {"a"}),
    ("{{ range(3) }}{{ namespace(a=1).a }}", set()),
])  # fmt: skip
def test_what_a_template_reads(source, read):
    assert names_read(source) == read


@pytest.mark.parametrize("name, options, what, do", [
    ("qwen3", {"enable_thinkin": False}, "never reads 'enable_thinkin'", "did you mean 'enable_thinking'?"),
    ("qwen3", {"content": "x"}, "never reads 'content'", "it reads enable_thinking"),
    ("llama3", {"enable_thinking": False}, "never reads 'enable_thinking'", "it reads none"),
    ("qwen3", {"add_generation_prompt": True}, "not for the recipe to set", "leave it out"),
    ("llama3", {"bos_token": "x"}, "not for the recipe to set", "leave it out"),
])  # fmt: skip
def test_a_name_that_the_template_never_reads(name, options, what, do, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ask", "response": "answer"}])
    with pytest.raises(UserError) as caught:
        open_store(task(path, chat_template_kwargs=options), "train", stock(name), max_length=64, cache_dir=tmp_path)
    assert what in caught.value.what
    assert do in caught.value.do
    assert caught.value.where == "tasks.sums.chat_template_kwargs"


def test_without_a_chat_template_there_is_nothing_to_give():
    with pytest.raises(UserError, match="never reads"):
        ChatRenderer(tokenizer(None), {"enable_thinking": False})


THREE = ("{{ prompt }}", "Q: {{ prompt }}", "{{ prompt }} A:")


def test_each_row_has_one_of_the_templates(tmp_path):
    """As many of each as a fair die gives, the same in any order; held-out rows in the same way."""
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(3000)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    reader = TaskReader(task(path, template=THREE), rows[:50], lambda column: None, seed=4)
    counts = Counter()
    for line in range(3000, 0, -1):
        asked = reader(FileRow("a.jsonl", line, rows[line - 1])).messages[0]["content"]
        number = [f"p{line - 1}", f"Q: p{line - 1}", f"p{line - 1} A:"].index(asked)
        assert number == template_of(f"a.jsonl:{line}", 3, 4)
        counts[number] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 13.8, "chi-square, 2 degrees, at 0.001"
    section = task(path, template=THREE, eval_data=str(path))
    options = {"max_length": 64, "cache_dir": tmp_path / "c", "limit": 200}
    train, held, other = (
        open_store(section, which, MADE, **options, seed=seed)
        for which, seed in (("train", 4), ("eval", 4), ("eval", 5))
    )
    texts = [[MADE.decode(store.example(i).input_ids.tolist()) for i in range(200)] for store in (train, held, other)]
    assert texts[0] == texts[1]
    assert texts[1] != texts[2]


def test_templates_of_different_columns(tmp_path):
    """A column that one of them reads is read; what none reads is said."""
    rows = [{"a": f"a{i}", "b": f"b{i}", "c": "c", "response": "r"} for i in range(40)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    store = open_store(task(path, template=["{{ a }}", "{{ b }}"]), "train", MADE, max_length=64, cache_dir=tmp_path)
    assert store.warnings() == ["sums: column c (40 of 40 rows) is not read"]
    with pytest.raises(UserError, match="no row has the column 'd'") as caught:
        open_store(task(path, template=["{{ a }}", "{{ d }}"]), "train", MADE, max_length=64, cache_dir=tmp_path)
    assert caught.value.where == "tasks.sums.template[1]"


def options_of(name, rng):
    """All keys of a task, as far as the template of this name has a place for them."""
    from mtft.recipe.rules.task_rules import GIVEN

    known = sorted(names_read(stock(name).chat_template) & {"enable_thinking", "date_string"} - {*GIVEN})
    values = {"enable_thinking": rng.random() < 0.5, "date_string": "1 May 2030"}
    return {
        "system": rng.choice([None, "s0z be brief"]),
        "chat_template_kwargs": {key: values[key] for key in known if rng.random() < 0.7},
        "shots": {"n": rng.randrange(1, 4), "retrieve": "random"},
    }


def fuzz(name, count, seed):
    """Random conversations with all keys. The oracle is the same row without them: it is refused or taken alike, and
    its last answer is learnt token for token (a template may write an earlier one otherwise, behind other turns).
    """
    rng = random.Random(f"{name} {seed}")
    made = stock(name)
    keys = options_of(name, rng)
    section = task("x", format="messages", **keys)
    rows = [random_row(rng) for _ in range(count)]
    plain = [{"messages": [{"role": "user", "content": f"q{i}z"}, {"role": "assistant", "content": f"d{i}z"}]}
             for i in range(5)]  # fmt: skip
    part = SourcePart("pool", "x", _Rows(plain))
    pool = read_pool(section, PoolSource(section, [part]), seed)
    bare = RowEncoder(made, task("x", format="messages", chat_template_kwargs=keys["chat_template_kwargs"]), rows, {})
    full = RowEncoder(made, section, rows, {}, seed, pool, 10**6)
    used = 0
    for line, row in enumerate(rows, 1):
        block = [FileRow("a", line, row)]
        before, after = bare(block), full(block)
        notes = after.notes
        whats = [problem.what for _, problem in (*before.problems, *after.problems)]
        assert bool(before.problems) == bool(after.problems), whats
        if whats:
            continue
        used += 1
        examples = [found.examples[-1][1] for found in (before, after)]
        (ids, learnt), (its, own) = ((one.input_ids, one.supervised) for one in examples)
        text = made.decode(its.tolist())
        shots = 0 if notes["shots_no_place"] else keys["shots"]["n"]
        assert sum(f"d{i}z" in text for i in range(5)) == shots, (row, text)
        assert not any(f"d{i}z" in made.decode(its[own].tolist()) for i in range(5)), "a demonstration is learnt"
        last = np.flatnonzero(learnt)[-1]
        first = last - int(np.argmin(learnt[last::-1])) + 1
        np.testing.assert_array_equal(ids[first : last + 1], its[own][-(last + 1 - first) :], err_msg=f"{row}\n{text}")
        assert not clear_first_token(own.copy())[0]
    return used


class _Rows:
    """What SourcePart asks of a data set."""

    features = {}

    def __init__(self, rows):
        self.rows = rows


@pytest.fixture(autouse=True)
def _read_rows(monkeypatch):
    plain = SourcePart.rows

    def rows(self):
        if isinstance(self.dataset, _Rows):
            return iter([FileRow(self.name, line, row) for line, row in enumerate(self.dataset.rows, 1)])
        return plain(self)

    monkeypatch.setattr(SourcePart, "rows", rows)


@pytest.mark.parametrize("name", STOCK[::4])
def test_fuzzed_rows_with_all_keys(name):
    assert fuzz(name, 12, 0) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_two_thousand_fuzzed_rows_with_all_keys(name):
    assert sum(fuzz(name, 25, seed) for seed in (1, 2)) >= 10
