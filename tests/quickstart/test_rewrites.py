"""Rows with one right answer, each answered again by a second way: text for the syntax tree, running for the form."""

from __future__ import annotations

import ast
import json
import re

import pytest

from mtft.quickstart.parsed_module import ParsedModule, TaskRow
from mtft.quickstart.rewrites import MOST_CHARACTERS, REWRITES
from mtft.quickstart.stdlib_corpus import SourceFile, library_files

MODULES = 60  # of the real library: every tenth


@pytest.fixture(scope="module")
def modules() -> list[ParsedModule]:
    return [ParsedModule.of(file) for file in library_files()[:: len(library_files()) // MODULES]]


@pytest.fixture
def rows(modules, request) -> list[TaskRow]:
    return [row for module in modules for row in REWRITES[request.param](module)]


def parts(text: str) -> list[str]:
    """Between the commas that no bracket or string holds."""
    found, depth, quote, last = [""], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote and last != "\\" else quote
        elif char in "'\"":
            quote = char
        depth += (char in "([{") - (char in ")]}") if not quote else 0
        if char == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += char
        last = "" if last == "\\" else char
    return [part.strip() for part in found if part.strip()]


def signature(prompt: str) -> tuple[str, dict[str, str | None]]:
    """(name, {parameter: the text of its default}) of "...: def name(...)"."""
    name, _, inside = prompt.partition("def ")[2].partition("(")
    found = {}
    for part in parts(inside.removesuffix(")")):
        if part not in ("/", "*") and not part.startswith("**") and not re.match(r"\*\w", part):
            before, equals, value = part.partition("=")
            found[before.partition(":")[0].strip()] = value.strip() if equals else None
    return name, found


def ids(name: str):
    return pytest.mark.parametrize("rows", [name], indirect=True)


@ids("call")
def test_a_call_names_the_parameters(rows):
    assert len(rows) > 100
    for row in rows:
        name, parameters = signature(row.prompt)
        called, _, inside = row.response.removesuffix(")").partition("(")
        assert (called, inside.split(", ")) == (name, [p for p in parameters if p not in ("self", "cls")])


@ids("defaults")
def test_defaults_are_json(rows):
    assert len(rows) > 100
    for row in rows:
        expected = {name: ast.literal_eval(value) for name, value in signature(row.prompt)[1].items() if value}
        assert list(json.loads(row.response).items()) == list(expected.items()), row


ASSERTIONS = {
    "Equal": "({}) == ({})",
    "NotEqual": "({}) != ({})",
    "In": "({}) in ({})",
    "NotIn": "({}) not in ({})",
    "Is": "({}) is ({})",
    "IsNot": "({}) is not ({})",
    "Greater": "({}) > ({})",
    "GreaterEqual": "({}) >= ({})",
    "Less": "({}) < ({})",
    "LessEqual": "({}) <= ({})",
    "IsNone": "({}) is None",
    "IsNotNone": "({}) is not None",
    "IsInstance": "isinstance({}, {})",
    "False": "not ({})",
    "True": "({})",
}


@ids("pytest")
def test_assertions_say_the_same(rows):
    assert len(rows) > 500
    assert len({row.prompt.partition("(")[0] for row in rows}) == len(ASSERTIONS)
    for row in rows:
        method, inside = re.fullmatch(r"pytest: self\.assert(\w+)\((.*)\)", row.prompt).groups()
        ours, theirs = row.response, "assert " + ASSERTIONS[method].format(*parts(inside))
        assert ast.dump(ast.parse(ours)) == ast.dump(ast.parse(theirs)), row


class Anything:
    """Whatever is done with it works."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_, **__):
        return self

    def __iter__(self):
        return iter((self, self))

    def __index__(self):
        return 1

    def __hash__(self):
        return 1

    def _same(self, *_):
        return self

    def _true(self, *_):
        return True

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = __neg__ = _same
    __mod__ = __floordiv__ = __truediv__ = __lshift__ = __rshift__ = __xor__ = _same
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _true
    __len__ = __int__ = __index__
    __float__ = lambda self: 1.0  # noqa: E731


REAL = {function.__name__: function for function in (bool, bytes, dict, float, hasattr, int, len, list, repr, set)} | {
    function.__name__: function for function in (isinstance, sorted, str, tuple)
}


class Names(dict):
    def __missing__(self, name):
        return Anything()


@ids("type")
def test_types_are_what_the_expressions_give(rows):
    """Run with objects that allow everything in the place of names; what gives such an object says nothing."""
    seen = 0
    for row in rows:
        text = row.prompt.removeprefix("Type: ")
        try:
            found = eval(text, {"__builtins__": {}}, Names(REAL))
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, NameError):
            continue
        if not isinstance(found, Anything):
            seen += 1
            assert type(found).__name__ == row.response, row
    assert seen > len(rows) / 2 > 200


@pytest.mark.parametrize("rows", list(REWRITES), indirect=True)
def test_rows_are_short_and_named_once(rows):
    assert len({row.id for row in rows}) == len(rows)
    assert max(len(row.response) for row in rows) < 2 * MOST_CHARACTERS
    assert all("\n" not in row.prompt + row.response for row in rows)


def test_what_has_no_one_answer_is_left_out(tmp_path):
    path = tmp_path / "a.py"
    splits = "".join(f"{'x' * width} = os.path.split(p)\n{'y' * width} = s.split(p)\n" for width in (1, 2, 3, 4))
    path.write_text(
        "def one(self, a): ...\n"
        "def starred(a, *rest): ...\n"
        "def computed(a, b=len('x')): ...\n"
        f"if a < b < c or a:\n    x, y = 1\n{splits}"
    )
    module = ParsedModule.of(SourceFile("a.py", path))
    made = {name: {row.prompt for row in make(module)} for name, make in REWRITES.items()}
    assert made["call"] == {"Call: def computed(a, b=len('x'))"}
    assert not made["defaults"]
    assert not made["pytest"]
    assert "Type: s.split(p)" in made["type"]
    assert "Type: os.path.split(p)" not in made["type"]
