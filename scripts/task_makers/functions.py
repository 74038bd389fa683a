"""Functions of Python's standard library → their name, and the first line of their docstring.

The rows are cut as the quickstart's are (mtft/quickstart), held-out ones from modules that its base models never saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

from mtft.quickstart.functions import Function, functions_of
from mtft.quickstart.parsed_module import ParsedModule, TaskRow
from mtft.quickstart.stdlib_corpus import SourceFile, library_files
from mtft.quickstart.tasks import docstring, naming
from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, pair

LONGEST = 800  # signs of a prompt
LARGEST = 40_000  # bytes of a module: few rows touch many modules, and larger ones take long to parse

NAME = Wordings(
    seen=("Name the function.\n\n{code}", "What is ____ called?\n\n{code}", "{code}\n\nWhich name fits for ____?"),
    unseen=("Replace the blank ____ by the function's name.\n\n{code}",),
)
DOCSTRING = Wordings(
    seen=(
        "Describe the function.\n\n{code}",
        "Docstring, first line:\n\n{code}",
        "{code}\n\nWhat does it do? One line.",
    ),
    unseen=("Sum up in a line what this code is for.\n\n{code}",),
)


@cache
def modules() -> tuple[list[SourceFile], list[SourceFile]]:
    """Files of training rows and of held-out rows."""
    files = [file for file in library_files() if file.path.stat().st_size <= LARGEST]
    return [file for file in files if not file.is_eval], [file for file in files if file.is_eval]


@cache
def training_lines() -> str:
    return "\n".join(_bare(file.text().split("\n")) for file in library_files() if not file.is_eval)


@cache
def functions_in(file: SourceFile) -> list[Function]:
    return list(functions_of(ParsedModule.of(file)))


@cache
def rows_of(file: SourceFile, cut: Callable[[Function], TaskRow | None]) -> list[TaskRow]:
    """Those of a held-out module whose body stands in no training module."""
    found = ((cut(function), function) for function in functions_in(file))
    short = [(row, function) for row, function in found if row is not None and len(row.prompt) <= LONGEST]
    return [row for row, function in short if not (file.is_eval and _bare(function.body) in training_lines())]


def _bare(lines: Iterable[str]) -> str:
    return "\n".join(filter(None, map(str.strip, lines)))


def draw(rng: random.Random, held_out: bool, cut: Callable[[Function], TaskRow | None], wordings: Wordings) -> MadeRow:
    files = modules()[held_out]
    while not (rows := rows_of(rng.choice(files), cut)):
        pass
    row = rng.choice(rows)
    return pair(row.id, wordings.draw(rng, held_out), row.response, code=row.prompt.partition("\n\n")[2])


TASKS = (
    TaskMaker(
        "function_name",
        lambda rng, held_out: draw(rng, held_out, naming, NAME),
        "a Python function whose name is masked → its name",
        "the module of the standard library",
        max_new_tokens=24,
    ),
    TaskMaker(
        "function_docstring",
        lambda rng, held_out: draw(rng, held_out, docstring, DOCSTRING),
        "a Python function without its docstring → the docstring's first line",
        "the module of the standard library",
        metrics=("loss", "f1", "chrf"),
        max_new_tokens=64,
    ),
)
