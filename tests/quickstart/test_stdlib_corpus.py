"""The split is a function of the module's name, and nothing of the held-out side is in the training text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtft.quickstart import stdlib_corpus
from mtft.quickstart.functions import functions_of
from mtft.quickstart.parsed_module import ParsedModule

# From SHA-256, written down once: a change of band or rule must not go unnoticed, since the models know the other side.
HELD_OUT = ["abc", "argparse", "ast", "gettext", "graphlib", "heapq", "mimetypes", "optparse", "pyclbr", "rlcompleter"]
HELD_OUT += ["timeit", "urllib", "xml", "zoneinfo"]
TRAINING = [
    "asyncio",
    "collections",
    "datetime",
    "decimal",
    "email",
    "http",
    "json",
    "logging",
    "os",
    "pickle",
    "typing",
]


@pytest.fixture(scope="module")
def parts() -> tuple[list[stdlib_corpus.SourceFile], list[stdlib_corpus.SourceFile], list[stdlib_corpus.SourceFile]]:
    return stdlib_corpus.pretraining_files()


def test_split_is_pinned() -> None:
    assert all(map(stdlib_corpus.is_eval, HELD_OUT))
    assert not any(map(stdlib_corpus.is_eval, TRAINING))


@pytest.mark.parametrize(
    "name, group",
    [
        ("json/decoder.py", "json"),
        ("heapq.py", "heapq"),
        ("_pydecimal.py", "decimal"),
        ("_pydatetime.py", "datetime"),
        ("sre_parse.py", "re"),
        ("re/_parser.py", "re"),
        ("xmlrpc/client.py", "xml"),
        ("nturl2path.py", "urllib"),
        ("_py_abc.py", "abc"),
    ],
)
def test_near_twins_are_one_group(name: str, group: str) -> None:
    assert stdlib_corpus.group_of(name) == group
    assert stdlib_corpus.group_of(name.replace("/", "\\")) == group


def test_both_sides_are_there(parts: tuple[list, list, list]) -> None:
    library, _, held_out = parts
    assert {file.group for file in held_out} >= set(HELD_OUT)
    assert {file.group for file in library} >= set(TRAINING)
    size = {name: sum(f.path.stat().st_size for f in files) for name, files in (("train", library), ("eval", held_out))}
    assert 0.05 < size["eval"] / (size["train"] + size["eval"]) < 0.2


def test_tests_of_held_out_modules_are_not_trained_on(parts: tuple[list, list, list]) -> None:
    library, tests, held_out = parts
    assert not {file.group for file in library} & {file.group for file in held_out}
    imports = tuple(
        f"{word} {module}{end}" for word in ("import", "from") for module in HELD_OUT for end in (" ", ".", "\n")
    )
    for file in tests:
        assert not any(module in file.name for module in HELD_OUT)
        assert not any((line.strip() + "\n").startswith(imports) for line in file.text().split("\n")), file.name


def test_no_held_out_body_in_the_training_text(parts: tuple[list, list, list]) -> None:
    library, tests, held_out = parts
    known = set()
    for file in [*library, *tests]:
        lines = _squeezed(file.text().split("\n"))
        known.update(hash(tuple(lines[i : i + 4])) for i in range(len(lines) - 3))
    copied = checked = 0
    for file in held_out:
        for function in functions_of(ParsedModule.of(file)):
            lines = _squeezed(function.body)
            runs = [hash(tuple(lines[i : i + 4])) for i in range(len(lines) - 3)]
            checked += bool(runs)
            copied += bool(runs) and all(run in known for run in runs)
    assert copied == 0
    assert checked > 500


def test_copies_are_left_out(tmp_path: Path) -> None:
    lines = [f"value_{i} = {i}" for i in range(6)]
    original, copy, other = (
        stdlib_corpus.SourceFile(f"{n}.py", tmp_path / f"{n}.py") for n in ("heapq", "copy", "other")
    )
    original.path.write_text("\n".join(lines))
    copy.path.write_text("import os\n\n    " + "\n\n    # note\n    ".join(lines))  # indented, with blanks and comments
    other.path.write_text("\n".join(lines[:5]))
    assert list(stdlib_corpus.without_copies([copy, other], [original])) == [other]


def test_fingerprint_sees_content_and_not_order(tmp_path: Path) -> None:
    files = [stdlib_corpus.SourceFile(f"{n}.py", tmp_path / f"{n}.py") for n in "ab"]
    for file in files:
        file.path.write_text(file.name)
    before = stdlib_corpus.fingerprint(files)
    assert stdlib_corpus.fingerprint(files[::-1]) == before
    files[0].path.write_text("changed")
    assert stdlib_corpus.fingerprint(files) != before


def _squeezed(lines: list[str] | tuple[str, ...]) -> list[str]:
    return [stripped for line in lines if (stripped := line.strip())]
