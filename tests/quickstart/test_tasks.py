"""Rows of the tasks: what they ask, that they are the same every time, and that no answer is in the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mtft.quickstart import TASKS, build_tasks, stdlib_corpus, tasks
from mtft.quickstart.functions import Function, functions_of
from mtft.quickstart.parsed_module import ParsedModule

SOURCE = '''\
class Stack:
    @property
    def peek_top(self, default=None):
        """Return the top item, or *default*.

        The stack keeps it.
        """

        # empty?
        if not self.items:
            return super().peek_top(default)
        return self.items[-1]

    def one(self): return 1

    def size(self): "Just documented."

    def text(self):
        return """
left of the code"""
'''


def _parsed(name: str, path: Path) -> ParsedModule:
    return ParsedModule.of(stdlib_corpus.SourceFile(name, path))


@pytest.fixture
def functions(tmp_path: Path) -> dict[str, Function]:
    path = tmp_path / "json.py"
    path.write_text(SOURCE)
    return {function.name: function for function in functions_of(_parsed("json.py", path))}


def test_function_is_taken_apart(functions: dict[str, Function]) -> None:
    assert set(functions) == {"peek_top", "text"}  # bodies on lines of their own
    peek = functions["peek_top"]
    assert peek.id == "json.py:Stack.peek_top"
    assert peek.header == ("def peek_top(self, default=None):",)
    assert peek.docstring == "Return the top item, or *default*.\n\nThe stack keeps it."
    assert peek.docstring_lines[0] == '    """Return the top item, or *default*.'
    assert peek.body == (
        "    # empty?",
        "    if not self.items:",
        "        return super().peek_top(default)",
        "    return self.items[-1]",
    )
    assert [peek.body[i].strip() for i in peek.starts] == [
        "if not self.items:",
        "return super().peek_top(default)",
        "return self.items[-1]",
    ]
    assert functions["text"].body == ('    return """', 'left of the code"""')


def test_rows_of_one_function(functions: dict[str, Function]) -> None:
    peek = functions["peek_top"]
    made = (tasks.naming, tasks.docstring, tasks.next_line, tasks.code)
    named, described, continued, written = (make(peek) for make in made)
    assert named is not None
    assert named.response == "peek_top"
    assert "peek_top" not in named.prompt
    assert "return super().____(default)" in named.prompt
    assert "top item" not in named.prompt
    assert described is not None
    assert described.response == "Return the top item, or *default*."
    assert "top item" not in described.prompt
    assert continued is not None
    assert continued.response in {"return super().peek_top(default)", "return self.items[-1]"}
    assert continued.response not in continued.prompt
    assert written is not None
    assert "The stack keeps it." in written.prompt
    assert written.response.startswith("# empty?\nif not self.items:\n    return super()")


def test_copies_have_one_key(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        'def f(x):\n    """Doc."""\n    return (x)\n\ndef g(x):\n    # note\n    return x\n\ndef h(x):\n    return -x\n'
    )
    f, g, h = functions_of(_parsed("a.py", path))
    assert f.key == g.key != h.key


def make_library(root: Path) -> Path:
    """A library with one training module and one held-out module; the latter copies one function of the former."""
    body = "def total_of(items):\n    result = 0\n    for item in items:\n        result += item\n    return result\n\n"
    own = "def best_of(items):\n    items = sorted(items)\n    last = items[-1]\n    return last\n\n"
    (root / "json").mkdir(parents=True)
    (root / "json" / "tool.py").write_text(body + body.replace("total_of", "sum_of").replace("result", "total"))
    (root / "argparse.py").write_text(body.replace("total_of", "copied") + own)
    return root


def test_a_copied_function_is_not_evaluated(tmp_path: Path) -> None:
    rows = tasks.build_rows(stdlib_corpus.library_files(make_library(tmp_path)))
    train, evaluation = rows["naming"]
    assert {row.response for row in train} == {"total_of", "sum_of"}
    assert {row.response for row in evaluation} == {"best_of"}


def test_build_is_repeatable_and_lazy(tmp_path: Path) -> None:
    library = make_library(tmp_path / "library")
    first, second = (tasks.build(tmp_path / name, library) for name in ("a", "b"))
    for name in TASKS:
        assert first[name].train.read_bytes() == second[name].train.read_bytes()
        assert first[name].eval.read_bytes() == second[name].eval.read_bytes()

    before = first["naming"].train.stat().st_mtime_ns
    assert tasks.build(tmp_path / "a", library) == first
    assert first["naming"].train.stat().st_mtime_ns == before

    first["naming"].train.unlink()  # something is missing: made again
    assert tasks.build(tmp_path / "a", library) == first
    assert first["naming"].train.read_bytes() == second["naming"].train.read_bytes()

    (library / "json" / "tool.py").write_text("def other(x):\n    y = x\n    return y\n")  # the input has changed
    assert tasks.build(tmp_path / "a", library)["naming"].train_rows == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict], list[dict]]]:
    """All rows of the real library."""
    files = build_tasks(tmp_path_factory.mktemp("tasks"))
    assert tuple(files) == TASKS
    rows = {name: tuple(_read(path) for path in (f.train, f.eval)) for name, f in files.items()}
    assert all(len(rows[n][0]) == f.train_rows and len(rows[n][1]) == f.eval_rows for n, f in files.items())
    return rows


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_sizes(built: dict) -> None:
    sizes = {name: len(train) for name, (train, _) in built.items()}
    assert len(set(sizes.values())) == len(TASKS), "unequal on purpose"
    assert all(500 <= size <= 5000 for size in sizes.values()), sizes
    assert all(100 <= len(evaluation) <= 200 for _, evaluation in built.values())


@pytest.mark.slow
def test_rows_are_well_formed_and_short(built: dict) -> None:
    tokenizer = Tokenizer.from_file(str(tasks.TOKENIZER))
    for train, evaluation in built.values():
        rows = train + evaluation
        assert len({row["id"] for row in rows}) == len(rows)
        assert all(set(row) == {"prompt", "response", "id"} for row in rows)
        # The chat template ends its prompt in a newline: a blank at the start of a response would join it in one token.
        assert all(row["response"] and row["response"] == row["response"].strip() for row in rows)
        for field, most in (("prompt", 320), ("response", 96)):
            assert max(len(ids) for ids in tokenizer.encode_batch([row[field] for row in rows])) <= most


@pytest.mark.slow
def test_rows_keep_the_split(built: dict) -> None:
    for train, evaluation in built.values():
        assert not any(stdlib_corpus.is_eval(stdlib_corpus.group_of(row["id"].split(":")[0])) for row in train)
        assert all(stdlib_corpus.is_eval(stdlib_corpus.group_of(row["id"].split(":")[0])) for row in evaluation)
        known = {(" ".join(row["prompt"].split()), " ".join(row["response"].split())) for row in train}
        assert not any((" ".join(r["prompt"].split()), " ".join(r["response"].split())) in known for r in evaluation)
