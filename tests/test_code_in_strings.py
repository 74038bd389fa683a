"""Code in strings names things that exist: drivers that tests start as processes, and targets of monkeypatch.

No linter reads a string, so a renamed class lives on in one until the slow test that holds it runs.
"""

import ast
import importlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py"))
OURS = ("mtft", "data_mixers", "tests")
PLANTED = {ROOT / "tests" / "test_walls.py", Path(__file__)}  # their strings are wrong on purpose


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def exists(module: str, name: str | None = None) -> bool:
    try:
        found = importlib.import_module(module)
        return name is None or hasattr(found, name) or bool(importlib.import_module(f"{module}.{name}"))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(OURS):
            raise
        return False


def dotted(path: str) -> bool:
    """Whether `mtft.a.b.Class.method` can be walked to its end."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        if exists(".".join(parts[:cut])):
            found = importlib.import_module(".".join(parts[:cut]))
            for name in parts[cut:]:
                if not hasattr(found, name):
                    return False
                found = getattr(found, name)
            return True
    return False


def missing_in_code(code: str) -> Iterator[str]:
    """What a piece of code imports from us, or reads off a module of ours, and is not there."""
    try:
        tree = ast.parse(textwrap.dedent(code))
    except SyntaxError:
        return
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            for alias in node.names:
                if not exists(node.module, alias.name):
                    yield f"from {node.module} import {alias.name}"
                elif exists(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS:
                    if not exists(alias.name):
                        yield f"import {alias.name}"
                    elif alias.asname:
                        modules[alias.asname] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module and not exists(module, node.attr):
                yield f"{module}.{node.attr}"


def missing(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, text in strings(tree):
        if "import " in text and any(name in text for name in OURS):
            yield from ((line, name) for name in missing_in_code(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            target = node.args[0]
            if isinstance(target, ast.Constant) and target.value.startswith(OURS) and not dotted(target.value):
                yield target.lineno, target.value


@pytest.mark.parametrize("folder", ["tests", "scripts"])
def test_they_name_what_exists(folder):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        if path.is_relative_to(ROOT / folder) and path not in PLANTED
        for line, name in missing(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


def test_it_finds_what_is_planted():
    code = '''
DRIVER = """
from mtft.common.errors import UserError, NoSuchError
import mtft.common.errors as errors
import mtft.nowhere
errors.UserError, errors.Gone
"""
def test_x(monkeypatch):
    monkeypatch.setattr("mtft.common.errors.UserError", None)
    monkeypatch.setattr("mtft.common.errors.Missing", None)
'''
    assert [name for _, name in missing(ast.parse(code))] == [
        "from mtft.common.errors import NoSuchError",
        "import mtft.nowhere",
        "mtft.common.errors.Gone",
        "mtft.common.errors.Missing",
    ]
